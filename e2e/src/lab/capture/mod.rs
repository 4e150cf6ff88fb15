//! Packet capture on one link: what crossed it, as flows, and whether a canary did.
//!
//! ```text
//! AF_PACKET ──frame──▶ packet ──segment──▶ stream (reassembly) ──▶ head of each direction ──▶ tls
//!                         └── canary search in each frame, and again in the stream
//! ```
//! Invariant: memory is bounded whatever crosses the link. Of each direction the head is kept, the rest
//! is searched and counted; a hole in a stream is counted too, never skipped in silence.

mod packet;
mod stream;
pub mod tls;

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use memchr::memmem::Finder;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, LinkAddr, SockFlag, SockProtocol, SockType, recvfrom, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

use super::namespaces::NetNs;
use packet::{Packet, Transport};
use stream::Stream;

/// The largest frame that a veth carries with segmentation left to the receiver, and its headers.
const FRAME_BYTES: usize = 65_536 + 256;

/// Frames wait here while the capture thread is behind.
const QUEUE_BYTES: usize = 64 << 20;

/// A running capture.
#[derive(Debug)]
pub struct Capture {
    stop: Arc<AtomicBool>,
    frames: Arc<AtomicU64>,
    worker: Option<JoinHandle<Recording>>,
}

impl Capture {
    pub(super) fn start(ns: &NetNs, ifindex: u32, canaries: &[&[u8]]) -> Result<Self> {
        let socket = ns.run(open)?.context("cannot open a packet socket")?;
        let stop = Arc::new(AtomicBool::new(false));
        let frames = Arc::new(AtomicU64::new(0));
        let mut recording = Recording::new(canaries);
        let worker = {
            let (stop, frames) = (stop.clone(), frames.clone());
            thread::Builder::new().name("capture".into()).spawn(move || {
                let mut frame = vec![0; FRAME_BYTES];
                loop {
                    match recvfrom::<LinkAddr>(socket.as_raw_fd(), &mut frame) {
                        Ok((length, Some(from))) if from.ifindex() == ifindex as usize => {
                            frames.fetch_add(1, Ordering::Relaxed);
                            recording.frame(&frame[..length]);
                        }
                        Ok(_) | Err(Errno::EINTR) => {}
                        // The queue is empty: everything that crossed before `stop` has been read.
                        Err(Errno::EAGAIN) if stop.load(Ordering::Acquire) => return recording,
                        Err(Errno::EAGAIN) => {}
                        Err(_) => return recording,
                    }
                }
            })?
        };
        Ok(Self {
            stop,
            frames,
            worker: Some(worker),
        })
    }

    /// Frames seen so far.
    pub fn frames(&self) -> u64 {
        self.frames.load(Ordering::Relaxed)
    }

    /// Ends the capture after everything that has crossed the link until now.
    pub fn stop(mut self) -> Result<Recording> {
        self.stop.store(true, Ordering::Release);
        let worker = self
            .worker
            .take()
            .ok_or_else(|| anyhow!("the capture has been stopped"))?;
        let deadline = Instant::now() + Duration::from_secs(30);
        while !worker.is_finished() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(2));
        }
        anyhow::ensure!(worker.is_finished(), "the capture does not catch up");
        worker.join().map_err(|_| anyhow!("the capture thread panicked"))
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
    }
}

fn open() -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let fd = socket(AddressFamily::Packet, SockType::Raw, flags, SockProtocol::EthAll)?;
    setsockopt(&fd, sockopt::RcvBufForce, &QUEUE_BYTES)?;
    setsockopt(&fd, sockopt::ReceiveTimeout, &TimeVal::milliseconds(20))?;
    Ok(fd)
}

/// What a capture has seen.
#[derive(Debug)]
pub struct Recording {
    canaries: Vec<Finder<'static>>,
    /// In the order in which they were first seen.
    flows: Vec<Flow>,
    /// The latest flow of each pair of ends.
    latest: HashMap<FlowKey, usize>,
    others: BTreeMap<Other, u64>,
    sightings: Vec<Sighting>,
}

/// A canary that crossed the link in the clear.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sighting {
    pub canary: String,
    /// Which packet or stream it was in.
    pub place: String,
}

/// Traffic that is no TCP, by its name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Other(pub String);

impl fmt::Display for Other {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Both directions of a TCP connection.
#[derive(Debug)]
pub struct Flow {
    /// The end that sent the first SYN; of a connection older than the capture, the end first seen.
    pub client: SocketAddr,
    pub server: SocketAddr,
    /// Whether the capture saw it open.
    pub opened: bool,
    pub reset: bool,
    from_client: Stream,
    from_server: Stream,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct FlowKey(SocketAddr, SocketAddr);

impl Flow {
    /// Payload bytes of both directions.
    pub fn payload_bytes(&self) -> u64 {
        self.from_client.bytes() + self.from_server.bytes()
    }

    pub fn client_bytes(&self) -> u64 {
        self.from_client.bytes()
    }

    pub fn server_bytes(&self) -> u64 {
        self.from_server.bytes()
    }

    /// The first bytes that the client sent.
    pub fn client_head(&self) -> &[u8] {
        self.from_client.head()
    }

    pub fn server_head(&self) -> &[u8] {
        self.from_server.head()
    }

    /// Bytes that the capture missed.
    pub fn missed_bytes(&self) -> u64 {
        self.from_client.missed() + self.from_server.missed()
    }

    /// What the server selected, if this is TLS.
    pub fn server_hello(&self) -> Result<tls::ServerHello, tls::NotTls> {
        tls::server_hello(self.server_head())
    }
}

impl fmt::Display for Flow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (up, down) = (self.client_bytes(), self.server_bytes());
        write!(f, "{} -> {} ({up} B up, {down} B down)", self.client, self.server)
    }
}

impl Recording {
    fn new(canaries: &[&[u8]]) -> Self {
        Self {
            canaries: canaries
                .iter()
                .map(|canary| Finder::new(canary).into_owned())
                .collect(),
            flows: Vec::new(),
            latest: HashMap::new(),
            others: BTreeMap::new(),
            sightings: Vec::new(),
        }
    }

    /// TCP connections, in the order in which they were first seen.
    pub fn flows(&self) -> impl Iterator<Item = &Flow> {
        self.flows.iter()
    }

    /// TCP connections that carried payload.
    pub fn flows_with_payload(&self) -> impl Iterator<Item = &Flow> {
        self.flows().filter(|flow| flow.payload_bytes() > 0)
    }

    /// Connections between the two addresses, either way round.
    pub fn flows_between(&self, a: IpAddr, b: IpAddr) -> impl Iterator<Item = &Flow> {
        self.flows().filter(move |flow| {
            let ends = (flow.client.ip(), flow.server.ip());
            ends == (a, b) || ends == (b, a)
        })
    }

    /// Packets of everything that is no TCP, by name.
    pub fn others(&self) -> &BTreeMap<Other, u64> {
        &self.others
    }

    /// Where canaries were seen in the clear.
    pub fn sightings(&self) -> &[Sighting] {
        &self.sightings
    }

    fn frame(&mut self, frame: &[u8]) {
        let packet = Packet::parse(frame);
        for canary in &self.canaries {
            if canary.find(frame).is_some() {
                note(&mut self.sightings, canary, format!("a packet of {packet}"));
            }
        }
        let Transport::Tcp(segment) = packet.transport else {
            *self.others.entry(Other(packet.kind())).or_default() += 1;
            return;
        };
        let (Some(source), Some(destination)) = (packet.source, packet.destination) else {
            return;
        };
        let source = SocketAddr::new(source, segment.source_port);
        let destination = SocketAddr::new(destination, segment.destination_port);
        let key = FlowKey(source.min(destination), source.max(destination));
        let opening = segment.syn && !segment.ack;
        let known = self.latest.get(&key).copied().filter(|&index| {
            // A port used again is a new connection.
            let flow = &self.flows[index];
            !opening || !flow.opened || flow.stream_from(source).is_opened_by(segment.sequence)
        });
        let index = known.unwrap_or_else(|| {
            let (client, server) = if segment.syn && segment.ack {
                (destination, source)
            } else {
                (source, destination)
            };
            self.flows.push(Flow {
                client,
                server,
                opened: opening,
                reset: false,
                from_client: Stream::new(self.canaries.len()),
                from_server: Stream::new(self.canaries.len()),
            });
            self.latest.insert(key, self.flows.len() - 1);
            self.flows.len() - 1
        });
        let flow = &mut self.flows[index];
        flow.reset |= segment.rst;
        let label = format!("{source} -> {destination}");
        let stream = if source == flow.client {
            &mut flow.from_client
        } else {
            &mut flow.from_server
        };
        for canary in stream.segment(&segment, &self.canaries) {
            note(
                &mut self.sightings,
                &self.canaries[canary],
                format!("the stream {label}"),
            );
        }
    }
}

impl Flow {
    fn stream_from(&self, source: SocketAddr) -> &Stream {
        if source == self.client {
            &self.from_client
        } else {
            &self.from_server
        }
    }
}

/// Most sightings kept: one is enough to fail a test, a few show where.
const SIGHTINGS: usize = 64;

fn note(sightings: &mut Vec<Sighting>, canary: &Finder<'_>, place: String) {
    let canary = String::from_utf8_lossy(canary.needle()).into_owned();
    let sighting = Sighting { canary, place };
    if sightings.len() < SIGHTINGS && !sightings.contains(&sighting) {
        sightings.push(sighting);
    }
}

#[cfg(test)]
mod tests;
