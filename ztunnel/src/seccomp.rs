//! The system calls that ztunnel may make.
//!
//! Invariant: everything that is not on the list answers EPERM, in every thread. What is missing on purpose:
//! programs and other processes (`execve`, `fork`, `ptrace`, `kill`), namespaces and mounts (`setns`, `unshare`,
//! `mount`), the kernel itself (`bpf`, `perf_event_open`, `io_uring_*`, modules, keys), and sockets other than
//! streams and datagrams of the internet and Unix families.

use nix::libc::{self, c_long};
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};
use std::collections::BTreeMap;

/// Why the filter is not in place.
#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    #[error("seccomp filter: {0}")]
    Filter(#[from] BackendError),
    #[error("seccomp filter: {0}")]
    Install(#[from] seccompiler::Error),
    #[error("seccomp filter: this architecture is not known")]
    Architecture,
}

/// Memory, threads, time, files, sockets that exist.
const ALLOWED: &[c_long] = &[
    libc::SYS_brk,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    libc::SYS_membarrier,
    libc::SYS_set_robust_list,
    libc::SYS_get_robust_list,
    libc::SYS_rseq,
    libc::SYS_set_tid_address,
    libc::SYS_futex,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_tgkill,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_gettimeofday,
    libc::SYS_getrandom,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_prlimit64,
    libc::SYS_getrlimit,
    libc::SYS_uname,
    libc::SYS_sysinfo,
    libc::SYS_openat,
    libc::SYS_close,
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_lseek,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_readlinkat,
    libc::SYS_getcwd,
    libc::SYS_getdents64,
    libc::SYS_mkdirat,
    libc::SYS_unlinkat,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_ftruncate,
    libc::SYS_fcntl,
    libc::SYS_ioctl,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_pipe2,
    libc::SYS_eventfd2,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_ppoll,
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_accept4,
    libc::SYS_connect,
    libc::SYS_shutdown,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_sendto,
    libc::SYS_recvfrom,
    libc::SYS_sendmsg,
    libc::SYS_recvmsg,
    libc::SYS_sendmmsg,
    libc::SYS_recvmmsg,
];

/// The same calls under the names that only this architecture still has.
#[cfg(target_arch = "x86_64")]
const ALLOWED_HERE: &[c_long] = &[
    libc::SYS_arch_prctl,
    libc::SYS_poll,
    libc::SYS_epoll_wait,
    libc::SYS_open,
    libc::SYS_stat,
    libc::SYS_lstat,
    libc::SYS_access,
    libc::SYS_readlink,
    libc::SYS_mkdir,
    libc::SYS_unlink,
    libc::SYS_rename,
    libc::SYS_chmod,
];
#[cfg(not(target_arch = "x86_64"))]
const ALLOWED_HERE: &[c_long] = &[];

/// Confines this thread, and every thread that it starts from now on.
pub fn confine() -> Result<(), SeccompError> {
    seccompiler::apply_filter(&without_clone3()?)?;
    Ok(seccompiler::apply_filter(&program()?)?)
}

fn program() -> Result<BpfProgram, SeccompError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = ALLOWED
        .iter()
        .chain(ALLOWED_HERE)
        .map(|call| (*call, vec![]))
        .collect();
    for call in [libc::SYS_socket, libc::SYS_socketpair] {
        rules.insert(call, sockets()?);
    }
    rules.insert(libc::SYS_clone, vec![threads()?]);
    rules.insert(libc::SYS_prctl, vec![names()?]);
    // The other filter answers it.
    rules.insert(libc::SYS_clone3, vec![]);
    let refused = SeccompAction::Errno(libc::EPERM.unsigned_abs());
    let filter = SeccompFilter::new(rules, refused, SeccompAction::Allow, architecture()?)?;
    Ok(filter.try_into()?)
}

/// A thread, and never a process or a namespace: the flags of `clone` can be looked at.
fn threads() -> Result<SeccompRule, BackendError> {
    let thread = u64::from(libc::CLONE_THREAD.unsigned_abs());
    let condition =
        SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::MaskedEq(thread), thread)?;
    SeccompRule::new(vec![condition])
}

/// A thread's name, so that a look at the threads shows which is which, and nothing else that `prctl` does.
fn names() -> Result<SeccompRule, BackendError> {
    let name = u64::from(libc::PR_SET_NAME.unsigned_abs());
    let condition = SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, name)?;
    SeccompRule::new(vec![condition])
}

/// Those of `clone3` lie in memory, where no filter sees them: it is said not to exist, and the C library
/// uses `clone`.
fn without_clone3() -> Result<BpfProgram, SeccompError> {
    let filter = SeccompFilter::new(
        [(libc::SYS_clone3, vec![])].into(),
        SeccompAction::Allow,
        SeccompAction::Errno(libc::ENOSYS.unsigned_abs()),
        architecture()?,
    )?;
    Ok(filter.try_into()?)
}

fn architecture() -> Result<TargetArch, SeccompError> {
    TargetArch::try_from(std::env::consts::ARCH).map_err(|_| SeccompError::Architecture)
}

/// Streams, datagrams and packets in order, of three families.
fn sockets() -> Result<Vec<SeccompRule>, BackendError> {
    const KIND: u64 = 0xf;
    let mut rules = vec![];
    for family in [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6] {
        for kind in [libc::SOCK_STREAM, libc::SOCK_DGRAM, libc::SOCK_SEQPACKET] {
            let equal = |argument, operator, value: i32| {
                SeccompCondition::new(
                    argument,
                    SeccompCmpArgLen::Dword,
                    operator,
                    u64::from(value.unsigned_abs()),
                )
            };
            rules.push(SeccompRule::new(vec![
                equal(0, SeccompCmpOp::Eq, family)?,
                equal(1, SeccompCmpOp::MaskedEq(KIND), kind)?,
            ])?);
        }
    }
    Ok(rules)
}

#[cfg(test)]
mod tests;
