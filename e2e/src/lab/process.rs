//! Processes of the lab: started in an endpoint's namespace, bounded, and killed with what owns them.
//!
//! Invariant: every wait has a deadline, and a signal reaches only a process that has not been reaped.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustix::thread::CapabilitySet;

use super::limits::Limits;
use super::namespaces::{FirstProcess, NetNs};

/// What to start and with which rights.
#[derive(Debug)]
pub struct Start {
    pub command: Command,
    /// Runs as this uid and gid, with no capability in any set, the bounding set included.
    pub uid: Option<u32>,
    /// Hard and soft limit of open files.
    pub nofile: Option<u64>,
    /// Limits that it shares with others.
    pub limits: Option<Arc<Limits>>,
}

impl From<Command> for Start {
    fn from(command: Command) -> Self {
        Self {
            command,
            uid: None,
            nofile: None,
            limits: None,
        }
    }
}

impl Start {
    pub fn as_uid(mut self, uid: u32) -> Self {
        self.uid = Some(uid);
        self
    }

    pub fn nofile(mut self, limit: u64) -> Self {
        self.nofile = Some(limit);
        self
    }

    /// Puts what limits it into the command, which must have no streams yet: a command does not tell what they
    /// are. A process that looks at its control group finds the limits there from its first instruction on.
    fn limit(&mut self) {
        let mut first = String::new();
        if self.limits.is_some() {
            first.push_str("read -r _ && ");
        }
        if let Some(limit) = self.nofile.take() {
            first.push_str(&format!("ulimit -n {limit} && "));
        }
        if !first.is_empty() {
            let command = std::mem::replace(&mut self.command, Command::new("/bin/sh"));
            self.command = after(&first, command);
        }
    }

    pub fn limits(mut self, limits: &Arc<Limits>) -> Self {
        self.limits = Some(limits.clone());
        self
    }

    pub(super) fn spawn(self, place: &Place<'_>) -> Result<Child> {
        let program = self.command.get_program().to_string_lossy().into_owned();
        let mut command = self.command;
        // A group of its own: Ctrl-C at the terminal is for the owner of the lab, who ends it in order.
        command.process_group(0);
        if self.limits.is_some() {
            command.stdin(Stdio::piped());
        }
        let uid = self.uid;
        let mut child = place
            .first
            .run(place.net, place.resolv_conf, || -> Result<Child> {
                if let Some(uid) = uid {
                    for capability in CapabilitySet::all().iter() {
                        // A kernel that lacks the newest ones answers EINVAL: nothing to drop.
                        let _ = rustix::thread::remove_capability_from_bounding_set(capability);
                    }
                    command.uid(uid).gid(uid);
                }
                Ok(command.spawn()?)
            })
            .flatten()
            .with_context(|| format!("cannot start {program}"))?;
        if let Some(limits) = &self.limits {
            let taken = limits.take(child.id());
            let stdin = child.stdin.take().context("no way to say go");
            if let Err(error) = taken.and_then(|()| Ok(stdin?.write_all(b"\n")?)) {
                child.kill()?;
                child.wait()?;
                return Err(error);
            }
        }
        Ok(child)
    }
}

/// Where a process starts.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place<'a> {
    pub first: &'a FirstProcess,
    pub net: &'a NetNs,
    /// What it sees as `/etc/resolv.conf`, a path inside the lab.
    pub resolv_conf: Option<&'a Path>,
}

/// The same command once a shell has done what is `first`, and becomes the program.
fn after(first: &str, command: Command) -> Command {
    let mut shell = Command::new("/bin/sh");
    shell
        .arg("-c")
        .arg(format!("{first}exec \"$0\" \"$@\""))
        .arg(command.get_program());
    shell.args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => shell.env(name, value),
            None => shell.env_remove(name),
        };
    }
    if let Some(folder) = command.get_current_dir() {
        shell.current_dir(folder);
    }
    shell
}

/// A running process of the lab. Dropped, it is killed and reaped.
#[derive(Debug)]
pub struct Process {
    name: String,
    log: PathBuf,
    pid: u32,
    child: Mutex<Child>,
    /// Kept for as long as the process may live.
    _limits: Option<Arc<Limits>>,
}

impl Process {
    pub(super) fn start(name: &str, mut start: Start, log: PathBuf, place: &Place<'_>) -> Result<Self> {
        let out = File::options().create(true).append(true).open(&log)?;
        start.limit();
        start
            .command
            .stdin(Stdio::null())
            .stdout(out.try_clone()?)
            .stderr(out);
        let limits = start.limits.clone();
        let child = start.spawn(place)?;
        Ok(Self {
            name: name.to_owned(),
            log,
            pid: child.id(),
            child: Mutex::new(child),
            _limits: limits,
        })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its PID as this process sees it, outside of the lab.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Everything it has written to standard output and standard error.
    pub fn log(&self) -> String {
        read_lossy(&self.log)
    }

    pub fn log_path(&self) -> &Path {
        &self.log
    }

    pub fn signal(&self, signal: Signal) -> Result<()> {
        let mut child = self.child();
        if let Some(status) = child.try_wait()? {
            bail!("{} has ended already: {status}", self.name);
        }
        kill(Pid::from_raw(i32::try_from(self.pid)?), signal)
            .with_context(|| format!("{signal} {}", self.name))
    }

    /// SIGKILL, and gone when this returns.
    pub fn kill(&self) -> Result<()> {
        let mut child = self.child();
        child.kill()?;
        child.wait()?;
        Ok(())
    }

    /// SIGSTOP until `resume`.
    pub fn pause(&self) -> Result<()> {
        self.signal(Signal::SIGSTOP)
    }

    pub fn resume(&self) -> Result<()> {
        self.signal(Signal::SIGCONT)
    }

    pub fn terminate(&self) -> Result<()> {
        self.signal(Signal::SIGTERM)
    }

    /// How it ended, if it has.
    pub fn ended(&self) -> Result<Option<ExitStatus>> {
        Ok(self.child().try_wait()?)
    }

    pub fn wait(&self, within: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + within;
        loop {
            if let Some(status) = self.ended()? {
                return Ok(status);
            }
            if Instant::now() >= deadline {
                bail!("{} still runs after {within:?}", self.name);
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Polls `ready` as `poll_until` does, but fails as soon as this process has ended.
    pub fn poll_until<T>(
        &self,
        what: &str,
        within: Duration,
        mut ready: impl FnMut() -> Result<Option<T>>,
    ) -> Result<T> {
        let polled = poll_until(what, within, || match self.ended()? {
            Some(status) => Ok(Some(Err(anyhow!("{} has ended: {status}", self.name)))),
            None => Ok(ready()?.map(Ok)),
        });
        polled
            .flatten()
            .with_context(|| format!("last lines of {}:\n{}", self.name, tail(&self.log(), 15)))
    }

    /// Waits until its log holds `text`, fails at once when it ends without.
    pub fn wait_for_log(&self, text: &str, within: Duration) -> Result<()> {
        self.poll_until(&format!("{text:?} in the log of {}", self.name), within, || {
            Ok(self.log().contains(text).then_some(()))
        })
    }

    /// A line of `/proc/PID/status`, such as `CapEff`.
    pub fn status_field(&self, field: &str) -> Result<String> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid))?;
        status
            .lines()
            .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))
            .map(|value| value.trim().to_owned())
            .with_context(|| format!("no {field} in /proc/{}/status", self.pid))
    }

    fn child(&self) -> MutexGuard<'_, Child> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}

/// Runs `start` to its end and collects what it wrote; killed after `within`.
pub(super) fn run(mut start: Start, within: Duration, place: &Place<'_>) -> Result<Output> {
    let line = describe(&start.command);
    start.limit();
    start
        .command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = start.spawn(place)?;
    let stdout = collect(child.stdout.take());
    let stderr = collect(child.stderr.take());
    let deadline = Instant::now() + within;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if Instant::now() >= deadline {
            child.kill()?;
            child.wait()?;
            let (out, err) = (received(&stdout), received(&stderr));
            bail!(
                "{line:?} still ran after {within:?}; stdout: {:?} stderr: {:?}",
                tail(&String::from_utf8_lossy(&out), 10),
                tail(&String::from_utf8_lossy(&err), 10),
            );
        }
        thread::sleep(Duration::from_millis(2));
    };
    Ok(Output {
        status: ExitStatus::from_raw(status.into_raw()),
        stdout: received(&stdout),
        stderr: received(&stderr),
    })
}

fn collect(pipe: Option<impl Read + Send + 'static>) -> mpsc::Receiver<Vec<u8>> {
    let (done, result) = mpsc::channel();
    thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            let _ = pipe.read_to_end(&mut bytes);
        }
        let _ = done.send(bytes);
    });
    result
}

/// A process that left children behind may hold its pipe open: what comes in a second is what there is.
fn received(pipe: &mpsc::Receiver<Vec<u8>>) -> Vec<u8> {
    pipe.recv_timeout(Duration::from_secs(1)).unwrap_or_default()
}

fn describe(command: &Command) -> OsString {
    let mut line = command.get_program().to_owned();
    for argument in command.get_args() {
        line.push(" ");
        line.push(argument);
    }
    line
}

pub(super) fn read_lossy(path: &Path) -> String {
    fs::read(path)
        .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
        .unwrap_or_default()
}

/// The last `lines` lines of `text`.
pub fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

/// Polls `ready` every few milliseconds until it answers, for at most `within`.
pub fn poll_until<T>(
    what: &str,
    within: Duration,
    mut ready: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let deadline = Instant::now() + within;
    loop {
        let last = match ready() {
            Ok(Some(value)) => return Ok(value),
            Ok(None) => None,
            Err(error) => Some(error),
        };
        if Instant::now() >= deadline {
            return match last {
                Some(error) => Err(error.context(format!("{what}: not within {within:?}"))),
                None => bail!("{what}: not within {within:?}"),
            };
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// Raises the soft limit of open files to the hard one: a lab holds many descriptors.
pub(super) fn raise_nofile() -> io::Result<()> {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    Ok(setrlimit(
        Resource::Nofile,
        Rlimit {
            current: limit.maximum,
            maximum: limit.maximum,
        },
    )?)
}
