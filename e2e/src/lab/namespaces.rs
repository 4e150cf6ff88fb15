//! The namespaces that a lab lives in, and the threads that enter them.
//!
//! ```text
//! test process ──pipe──▶ first process (PID 1 of the lab; reads until end of file, then exits)
//!      │                      └─ its death ends every process of its PID namespace
//!      └─ file descriptors of every network namespace
//! ```
//! Invariant: a lab leaves nothing that outlives this process. Processes die with the first process,
//! which dies with the pipe; mounts die with the mount namespace; network namespaces are held by file
//! descriptors alone. No thread of a runtime ever changes its namespace: each entry is a thread of its own.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};

/// A network namespace, held by a file descriptor.
#[derive(Debug)]
pub struct NetNs {
    fd: OwnedFd,
}

impl NetNs {
    /// A new and empty namespace.
    pub fn fresh() -> io::Result<Self> {
        on_a_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            Ok(Self {
                fd: File::open("/proc/thread-self/ns/net")?.into(),
            })
        })?
    }

    /// Runs `f` on a thread of its own inside the namespace. Sockets made there stay there.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> io::Result<T> {
        on_a_thread(|| {
            setns(&self.fd, CloneFlags::CLONE_NEWNET)?;
            Ok(f())
        })?
    }

    /// Starts a thread that lives inside the namespace, and whose own threads and sockets do too.
    pub fn spawn<T: Send + 'static>(
        &self,
        name: &str,
        f: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> io::Result<JoinHandle<Result<T>>> {
        let fd = self.fd.try_clone()?;
        thread::Builder::new().name(name.to_owned()).spawn(move || {
            setns(&fd, CloneFlags::CLONE_NEWNET)?;
            f()
        })
    }

    /// The inode that `/proc/PID/ns/net` of a process inside shows.
    pub fn inode(&self) -> io::Result<u64> {
        Ok(File::from(self.fd.try_clone()?).metadata()?.ino())
    }
}

impl AsFd for NetNs {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The first process of a lab, and the PID and mount namespaces that it keeps alive.
#[derive(Debug)]
pub struct FirstProcess {
    child: Child,
    /// Its standard input; the first process exits when this closes, however we ended.
    lifeline: Option<ChildStdin>,
    pid_ns: OwnedFd,
    mount_ns: OwnedFd,
}

const RESOLV_CONF: &str = "/etc/resolv.conf";

/// Reaps the orphans it adopts (an ignored SIGCHLD does that) and ends with its standard input.
const FIRST_PROCESS: &str = "trap '' CHLD; exec cat >/dev/null";

impl FirstProcess {
    pub fn start() -> Result<Self> {
        let mut child = on_a_thread(|| -> Result<Child> {
            unshare(CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET)
                .context("cannot make namespaces")?;
            mount_nothing_outside()?;
            mount(
                Some("tmpfs"),
                "/run",
                Some("tmpfs"),
                MsFlags::MS_NOSUID,
                Some("mode=755"),
            )
            .context("cannot mount the lab's /run")?;
            keep_resolv_conf()?;
            let child = Command::new("/bin/sh")
                .args(["-c", FIRST_PROCESS])
                .stdin(Stdio::piped())
                .stdout(Stdio::null())
                .process_group(0)
                .spawn()
                .context("cannot start the lab's first process")?;
            let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
            mount(Some("proc"), "/proc", Some("proc"), flags, None::<&str>)
                .context("cannot mount the lab's /proc")?;
            Ok(child)
        })??;
        let namespace = |kind: &str| -> Result<OwnedFd> {
            let path = format!("/proc/{}/ns/{kind}", child.id());
            Ok(File::open(&path).with_context(|| path)?.into())
        };
        let (pid_ns, mount_ns) = (namespace("pid")?, namespace("mnt")?);
        let lifeline = child.stdin.take();
        Ok(Self {
            child,
            lifeline,
            pid_ns,
            mount_ns,
        })
    }

    /// Where this process sees a file of the lab's mount namespace.
    pub fn path(&self, inside: impl AsRef<Path>) -> PathBuf {
        let inside = inside.as_ref();
        Path::new("/proc")
            .join(self.child.id().to_string())
            .join("root")
            .join(inside.strip_prefix("/").unwrap_or(inside))
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Runs `f` on a thread whose children are born in the lab's PID and mount namespaces and in `net`.
    ///
    /// `resolv_conf`, a path inside the lab, is what they see as `/etc/resolv.conf`.
    pub fn run<T: Send>(
        &self,
        net: &NetNs,
        resolv_conf: Option<&Path>,
        f: impl FnOnce() -> T + Send,
    ) -> Result<T> {
        on_a_thread(|| {
            // A mount namespace is entered only by a thread that shares its root and directory with none.
            unshare(CloneFlags::CLONE_FS)?;
            setns(net, CloneFlags::CLONE_NEWNET)?;
            setns(&self.mount_ns, CloneFlags::CLONE_NEWNS)?;
            if let Some(path) = resolv_conf {
                unshare(CloneFlags::CLONE_NEWNS)?;
                mount(
                    Some(path),
                    RESOLV_CONF,
                    None::<&str>,
                    MsFlags::MS_BIND,
                    None::<&str>,
                )
                .with_context(|| format!("cannot put {} over {RESOLV_CONF}", path.display()))?;
            }
            // Last: with another PID namespace for its children a thread can start no thread.
            setns(&self.pid_ns, CloneFlags::CLONE_NEWPID)?;
            Ok(f())
        })?
    }
}

impl Drop for FirstProcess {
    fn drop(&mut self) {
        drop(self.lifeline.take());
        // Every process of the lab that we started has been waited for, so the end is near; the bound is
        // for a process that somebody forgot, which init waits for and nobody reaps.
        let deadline = Instant::now() + Duration::from_secs(5);
        let _ = self.child.kill();
        while Instant::now() < deadline {
            match self.child.try_wait() {
                Ok(None) => thread::sleep(Duration::from_millis(2)),
                _ => return,
            }
        }
    }
}

/// Fails unless this process may make a lab, in one line that says what to do.
pub fn require_root() -> Result<()> {
    if nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    bail!("the lab needs root to make network namespaces: run this command again with sudo -E");
}

/// Mounts made from here on stay in this namespace.
fn mount_nothing_outside() -> Result<()> {
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .context("cannot make the lab's mounts private")
}

/// Where `/etc/resolv.conf` points into `/run`, as systemd-resolved has it, the new `/run` needs a file there
/// for another to be mounted over.
fn keep_resolv_conf() -> Result<()> {
    let Ok(target) = fs::read_link(RESOLV_CONF) else {
        return Ok(());
    };
    let target = Path::new("/etc").join(target);
    if let Some(folder) = target.parent()
        && !target.exists()
    {
        fs::create_dir_all(folder)?;
        fs::write(&target, "").with_context(|| target.display().to_string())?;
    }
    Ok(())
}

fn on_a_thread<T: Send>(f: impl FnOnce() -> T + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let worker = thread::Builder::new().name("lab".into()).spawn_scoped(scope, f)?;
        worker
            .join()
            .map_err(|_| io::Error::other("a thread of the lab panicked"))
    })
}
