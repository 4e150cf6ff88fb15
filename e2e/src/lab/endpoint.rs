//! An endpoint: a network namespace with addresses, in which sockets are made and processes run.
//!
//! Invariant: sockets are made on a thread inside the namespace and then belong to the caller's thread;
//! the caller never leaves its own namespace.

use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Result, bail};

use super::Grounds;
use super::capture::Capture;
use super::faults::Place;
use super::namespaces::NetNs;
use super::process::{self, Process, Start};
use super::wires::{self, Addresses};

/// A wait that nobody chose ends after this.
pub const DEFAULT_WAIT: Duration = Duration::from_secs(30);

/// How long a connection attempt of a test may take.
const CONNECT_WAIT: Duration = Duration::from_secs(10);

/// A node, a pod or a host of the lab, as a place to make sockets and run programs in.
#[derive(Debug, Clone)]
pub struct Endpoint {
    pub(super) grounds: Arc<Grounds>,
    pub(super) name: String,
    pub(super) ns: Arc<NetNs>,
    pub(super) addresses: Addresses,
    /// The link that joins it to the rest of the lab.
    pub(super) link: &'static str,
    /// Where it is on the fabric; a pod is behind its node.
    pub(super) place: Option<Place>,
    /// What programs here see as `/etc/resolv.conf`, if not the machine's: a path inside the lab.
    pub(super) resolv_conf: Option<PathBuf>,
}

impl Endpoint {
    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn addresses(&self) -> Addresses {
        self.addresses
    }

    /// Its address of the family of `like`.
    pub fn ip_like(&self, like: IpAddr) -> IpAddr {
        match like {
            IpAddr::V4(_) => self.addresses.v4.into(),
            IpAddr::V6(_) => self.addresses.v6.into(),
        }
    }

    pub fn netns(&self) -> &NetNs {
        &self.ns
    }

    /// Runs `f` on a thread of its own inside this namespace.
    pub fn inside<T: Send>(&self, f: impl FnOnce() -> T + Send) -> io::Result<T> {
        self.ns.run(f)
    }

    /// Starts a thread that lives inside this namespace: a place for a runtime with many sockets.
    pub fn spawn_inside<T: Send + 'static>(
        &self,
        name: &str,
        f: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> io::Result<JoinHandle<Result<T>>> {
        self.ns.spawn(name, f)
    }

    /// Connects from here; the socket then works on any thread.
    pub fn connect(&self, to: impl Into<SocketAddr>) -> io::Result<TcpStream> {
        self.connect_within(to, CONNECT_WAIT)
    }

    pub fn connect_within(&self, to: impl Into<SocketAddr>, within: Duration) -> io::Result<TcpStream> {
        let to = to.into();
        self.inside(|| TcpStream::connect_timeout(&to, within))?
    }

    /// Listens here on `port` (0: any), for both families.
    pub fn listen(&self, port: u16) -> io::Result<TcpListener> {
        self.inside(|| TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)))?
    }

    pub fn udp(&self, bind: impl Into<SocketAddr>) -> io::Result<UdpSocket> {
        let bind = bind.into();
        self.inside(|| UdpSocket::bind(bind))?
    }

    /// Starts a program here that runs until it is dropped; its output goes to a log.
    pub fn spawn(&self, name: &str, start: impl Into<Start>) -> Result<Process> {
        let log = self
            .grounds
            .log(&format!("{}.{name}", self.name.replace('/', ".")))?;
        Process::start(name, start.into(), log, &self.start_place())
    }

    /// Runs a program here to its end.
    pub fn run(&self, start: impl Into<Start>) -> Result<Output> {
        self.run_within(start, DEFAULT_WAIT)
    }

    pub fn run_within(&self, start: impl Into<Start>, within: Duration) -> Result<Output> {
        process::run(start.into(), within, &self.start_place())
    }

    fn start_place(&self) -> process::Place<'_> {
        let resolv_conf = self.resolv_conf.as_deref();
        process::Place {
            first: &self.grounds.first,
            net: &self.ns,
            resolv_conf,
        }
    }

    /// A command, for people, that opens a shell here while this process lives.
    pub fn shell_command(&self) -> String {
        let (owner, fd) = (std::process::id(), self.ns.as_fd().as_raw_fd());
        let first = self.grounds.first.pid();
        format!("sudo nsenter --net=/proc/{owner}/fd/{fd} --target {first} --mount --pid")
    }

    /// Runs a shell script here and returns what it wrote; fails unless it succeeds.
    pub fn shell(&self, script: &str) -> Result<String> {
        let mut command = Command::new("/bin/sh");
        command.args(["-ec", script]);
        let output = self.run(command)?;
        if !output.status.success() {
            bail!(
                "{script:?} in {}: {}: {}",
                self.name,
                output.status,
                String::from_utf8_lossy(&output.stderr)
            );
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Records every packet on the link that joins this endpoint to the lab, from now on.
    pub fn capture(&self, canaries: &[&[u8]]) -> Result<Capture> {
        Capture::start(&self.ns, wires::index(&self.ns, self.link)?, canaries)
    }

    /// Where this process sees a file of the lab; inside it is `inside`.
    pub fn path(&self, inside: &str) -> PathBuf {
        self.grounds.first.path(inside)
    }

    /// Sets `net/NAME` here.
    pub fn sysctl(&self, name: &str, value: &str) -> Result<()> {
        self.inside(|| wires::sysctl(name, value))?
    }

    pub fn set_mtu(&self, mtu: u32) -> Result<()> {
        wires::set_mtu(&self.ns, self.link, mtu)
    }
}
