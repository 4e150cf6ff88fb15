//! A child behind the filter tries what it must not do.

use super::*;
use crate::privilege;
use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns, unshare},
    sys::{
        signal::kill,
        socket::{AddressFamily, SockFlag, SockType, socket},
        uio::{RemoteIoVec, process_vm_readv},
    },
    unistd::{Gid, Pid, Uid, chroot, getppid, pivot_root, setgroups, sethostname, setresgid, setresuid},
};
use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::IoSliceMut,
    process::Command,
};

const CHILD: &str = "CULVERT_CONFINED_CHILD";
const USER: u32 = 65532;

/// Runs the test named `confined_child` in a process of its own: what it gives up is given up for good.
#[test]
fn f67_what_ztunnel_must_not_do_it_cannot_do() {
    let child = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "seccomp::tests::confined_child",
            "--nocapture",
            "--test-threads=1",
        ])
        .env(CHILD, "1")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&child.stdout).into_owned() + &String::from_utf8_lossy(&child.stderr);
    assert!(child.status.success(), "{said}");
    assert!(
        said.contains("every attempt was refused"),
        "the child did nothing: {said}"
    );
}

#[test]
fn confined_child() {
    if std::env::var_os(CHILD).is_none() {
        return;
    }
    let own_namespace = File::open("/proc/self/ns/net").unwrap();
    if Uid::effective().is_root() {
        let (uid, gid) = (Uid::from_raw(USER), Gid::from_raw(USER));
        setgroups(&[]).unwrap();
        setresgid(gid, gid, gid).unwrap();
        setresuid(uid, uid, uid).unwrap();
    }
    privilege::give_up().unwrap();
    confine().unwrap();
    let parent = getppid();
    let none: Option<&str> = None;
    let socket = |family, kind| socket(family, kind, SockFlag::empty(), None).map(drop);
    let flags = MsFlags::MS_BIND;
    let read_parent = || {
        let mut byte = [0];
        let remote = RemoteIoVec { base: 4096, len: 1 };
        process_vm_readv(parent, &mut [IoSliceMut::new(&mut byte)], &[remote]).map(drop)
    };
    for (what, attempt) in [
        (
            "enter a namespace",
            setns(&own_namespace, CloneFlags::CLONE_NEWNET),
        ),
        ("make a network namespace", unshare(CloneFlags::CLONE_NEWNET)),
        ("make a user namespace", unshare(CloneFlags::CLONE_NEWUSER)),
        ("make a mount namespace", unshare(CloneFlags::CLONE_NEWNS)),
        ("mount", mount(Some("/tmp"), "/mnt", none, flags, none)),
        ("unmount", umount2("/proc", MntFlags::MNT_DETACH)),
        ("change the root", chroot("/tmp")),
        ("swap the root", pivot_root("/", "/")),
        ("signal another process", kill(parent, None)),
        ("signal process 1", kill(Pid::from_raw(1), None)),
        ("read another's memory", read_parent()),
        ("a raw socket", socket(AddressFamily::Inet, SockType::Raw)),
        (
            "a raw socket of IPv6",
            socket(AddressFamily::Inet6, SockType::Raw),
        ),
        ("a packet socket", socket(AddressFamily::Packet, SockType::Raw)),
        (
            "a datagram packet socket",
            socket(AddressFamily::Packet, SockType::Datagram),
        ),
        ("netlink", socket(AddressFamily::Netlink, SockType::Raw)),
        (
            "netlink by datagrams",
            socket(AddressFamily::Netlink, SockType::Datagram),
        ),
        (
            "a socket to the hypervisor",
            socket(AddressFamily::Vsock, SockType::Stream),
        ),
        (
            "the kernel's ciphers",
            socket(AddressFamily::Alg, SockType::SeqPacket),
        ),
        (
            "become root",
            setresuid(Uid::from_raw(0), Uid::from_raw(0), Uid::from_raw(0)),
        ),
        (
            "become root's group",
            setresgid(Gid::from_raw(0), Gid::from_raw(0), Gid::from_raw(0)),
        ),
        ("name the host", sethostname("mine")),
        ("let itself be dumped", nix::sys::prctl::set_dumpable(true)),
    ] {
        assert_eq!(attempt, Err(Errno::EPERM), "{what}");
    }
    // The file system is for the kernel's permissions to refuse.
    for path in [
        "/proc/1/root",
        "/proc/1/mem",
        "/proc/1/ns/net",
        "/etc/shadow",
        "/dev/mem",
    ] {
        let error = fs::read_dir(path)
            .map(drop)
            .and_then(|()| File::open(path).map(drop));
        assert!(error.is_err(), "{path} is open");
        assert!(
            File::options().write(true).open(path).is_err(),
            "{path} can be written"
        );
    }
    let program = Command::new("/bin/true").spawn();
    assert!(program.is_err(), "a program was started");
    // What it lives on still works: threads, memory, files, sockets.
    std::thread::spawn(|| vec![1u8; 1 << 20].len()).join().unwrap();
    socket(AddressFamily::Inet, SockType::Stream).unwrap();
    let status = fs::read_to_string("/proc/thread-self/status").unwrap();
    for line in ["Seccomp:\t2", "NoNewPrivs:\t1", "CapEff:\t0000000000000000"] {
        assert!(status.lines().any(|found| found == line), "{line} in\n{status}");
    }
    println!("every attempt was refused");
}

/// What the kernel would answer, by carrying out the filter: the value that it returns.
fn verdict(program: &BpfProgram, call: i64, arguments: [u64; 6]) -> u32 {
    let mut data = [0; 64];
    data[..4].copy_from_slice(&(call as u32).to_le_bytes());
    let architecture: u32 = if cfg!(target_arch = "x86_64") {
        0xc000_003e
    } else {
        0xc000_00b7
    };
    data[4..8].copy_from_slice(&architecture.to_le_bytes());
    for (index, argument) in arguments.into_iter().enumerate() {
        data[16 + 8 * index..24 + 8 * index].copy_from_slice(&argument.to_le_bytes());
    }
    let (mut at, mut accumulator) = (0, 0u32);
    loop {
        let step = &program[at];
        let jump = |holds: bool| usize::from(if holds { step.jt } else { step.jf });
        at += 1;
        match step.code {
            0x20 => {
                let from = step.k as usize;
                accumulator = u32::from_le_bytes(data[from..from + 4].try_into().unwrap());
            }
            0x05 => at += step.k as usize,
            0x06 => return step.k,
            0x15 => at += jump(accumulator == step.k),
            0x25 => at += jump(accumulator > step.k),
            0x35 => at += jump(accumulator >= step.k),
            0x45 => at += jump(accumulator & step.k != 0),
            0x54 => accumulator &= step.k,
            code => panic!("instruction {code:#x}"),
        }
    }
}

const ALLOW: u32 = 0x7fff_0000;
const REFUSE: u32 = 0x0005_0000 | 1;

#[test]
fn f67_every_call_that_is_not_on_the_list_answers_eperm() {
    let program = program().unwrap();
    let listed: BTreeSet<i64> = ALLOWED.iter().chain(ALLOWED_HERE).copied().collect();
    let looked_at = [
        libc::SYS_socket,
        libc::SYS_socketpair,
        libc::SYS_clone,
        libc::SYS_clone3,
    ];
    for call in (0..1024).filter(|call| !looked_at.contains(call)) {
        let want = if listed.contains(&call) { ALLOW } else { REFUSE };
        assert_eq!(verdict(&program, call, [0; 6]), want, "call {call}");
    }
    for call in [
        libc::SYS_bpf,
        libc::SYS_perf_event_open,
        libc::SYS_ptrace,
        libc::SYS_process_vm_readv,
        libc::SYS_process_vm_writev,
        libc::SYS_pidfd_open,
        libc::SYS_pidfd_getfd,
        libc::SYS_pidfd_send_signal,
        libc::SYS_io_uring_setup,
        libc::SYS_userfaultfd,
        libc::SYS_keyctl,
        libc::SYS_add_key,
        libc::SYS_init_module,
        libc::SYS_finit_module,
        libc::SYS_kexec_load,
        libc::SYS_open_by_handle_at,
        libc::SYS_mount,
        libc::SYS_fsopen,
        libc::SYS_open_tree,
        libc::SYS_move_mount,
        libc::SYS_setns,
        libc::SYS_unshare,
        libc::SYS_execve,
        libc::SYS_execveat,
        libc::SYS_chroot,
        libc::SYS_setuid,
        libc::SYS_capset,
        libc::SYS_seccomp,
        libc::SYS_personality,
        libc::SYS_quotactl,
        libc::SYS_mknodat,
    ] {
        assert_eq!(verdict(&program, call, [0; 6]), REFUSE, "call {call}");
    }
}

#[test]
fn f67_a_thread_may_be_made_and_neither_a_process_nor_a_namespace() {
    let program = program().unwrap();
    let flags = |all: &[i32]| {
        all.iter()
            .fold(0, |sum, flag| sum | u64::from(flag.unsigned_abs()))
    };
    // As pthread_create(3) has them.
    let thread = flags(&[
        libc::CLONE_VM,
        libc::CLONE_FS,
        libc::CLONE_FILES,
        libc::CLONE_SIGHAND,
        libc::CLONE_THREAD,
        libc::CLONE_SYSVSEM,
        libc::CLONE_SETTLS,
        libc::CLONE_PARENT_SETTID,
        libc::CLONE_CHILD_CLEARTID,
    ]);
    for (what, flags, want) in [
        ("a thread", thread, ALLOW),
        ("a fork", flags(&[libc::SIGCHLD]), REFUSE),
        (
            "a vfork",
            flags(&[libc::CLONE_VM, libc::CLONE_VFORK, libc::SIGCHLD]),
            REFUSE,
        ),
        (
            "a user namespace",
            flags(&[libc::CLONE_NEWUSER, libc::SIGCHLD]),
            REFUSE,
        ),
        ("a network namespace", flags(&[libc::CLONE_NEWNET]), REFUSE),
    ] {
        assert_eq!(
            verdict(&program, libc::SYS_clone, [flags, 0, 0, 0, 0, 0]),
            want,
            "{what}"
        );
    }
    let other = without_clone3().unwrap();
    let missing = 0x0005_0000 | libc::ENOSYS.unsigned_abs();
    assert_eq!(verdict(&other, libc::SYS_clone3, [0; 6]), missing);
    assert_eq!(verdict(&other, libc::SYS_clone, [0; 6]), ALLOW);
}
