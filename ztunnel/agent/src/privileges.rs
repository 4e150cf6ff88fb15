//! What the agent may do: enter namespaces and program their networks, and nothing else.
//!
//! Invariant: once [`keep_two`] has run on a thread, that thread and those it starts have two capabilities.
//! SYS_ADMIN is a broad one, so the system calls that it opens and that the agent has no use for are shut.

use nix::{
    libc::{self, c_long},
    sys::resource::{Resource, getrlimit, setrlimit},
};
use rustix::{
    process::{DumpableBehavior, set_dumpable_behavior},
    thread::{
        CapabilitySet, CapabilitySets, remove_capability_from_bounding_set, set_capabilities,
        set_no_new_privs,
    },
};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};
use std::io;

/// Entering a namespace takes SYS_ADMIN; rules, marks and transparent sockets take NET_ADMIN.
const KEPT: CapabilitySet = CapabilitySet::SYS_ADMIN.union(CapabilitySet::NET_ADMIN);

/// What holds for the whole process: no core, no debugger, no new privileges, and as many descriptors as
/// the container allows, since every pod takes some.
pub fn close_process() -> io::Result<()> {
    setrlimit(Resource::RLIMIT_CORE, 0, 0)?;
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    set_no_new_privs(true)?;
    for capability in CapabilitySet::all().difference(KEPT).iter() {
        // One that this kernel does not know cannot be had either.
        if let Err(error) = remove_capability_from_bounding_set(capability)
            && error != rustix::io::Errno::INVAL
        {
            return Err(error.into());
        }
    }
    shut(SHUT).map_err(io::Error::other)
}

/// Programs, other processes, new namespaces, file systems but for a bind mount, the kernel and its clock.
///
/// A list of what is shut, not of what is open: what netlink, mounts and sockets in other namespaces need
/// is the dangerous part, and that stays open.
const SHUT: &[c_long] = &[
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_pidfd_getfd,
    libc::SYS_kcmp,
    libc::SYS_unshare,
    libc::SYS_chroot,
    libc::SYS_pivot_root,
    libc::SYS_open_by_handle_at,
    libc::SYS_fsopen,
    libc::SYS_fsmount,
    libc::SYS_fsconfig,
    libc::SYS_fspick,
    libc::SYS_open_tree,
    libc::SYS_move_mount,
    libc::SYS_mount_setattr,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_acct,
    libc::SYS_quotactl,
    libc::SYS_syslog,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_adjtimex,
    libc::SYS_clock_adjtime,
];

/// Lets this thread and those it starts have EPERM for these system calls.
fn shut(calls: &[c_long]) -> Result<(), seccompiler::Error> {
    let architecture = TargetArch::try_from(std::env::consts::ARCH).map_err(seccompiler::Error::Backend)?;
    let filter = SeccompFilter::new(
        calls.iter().map(|call| (*call, vec![])).collect(),
        SeccompAction::Allow,
        SeccompAction::Errno(libc::EPERM.unsigned_abs()),
        architecture,
    )
    .map_err(seccompiler::Error::Backend)?;
    let program = BpfProgram::try_from(filter).map_err(seccompiler::Error::Backend)?;
    seccompiler::apply_filter(&program)
}

/// Leaves this thread the two capabilities that it needs.
pub fn keep_two() -> io::Result<()> {
    let sets = CapabilitySets {
        effective: KEPT,
        permitted: KEPT,
        inheritable: CapabilitySet::empty(),
    };
    Ok(set_capabilities(None, sets)?)
}
