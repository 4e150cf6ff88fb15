//! The loads: what a client does, and how much of it got done.
//!
//! Invariant: a load counts only what was answered, and the same code drives every path.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use culvert_e2e::lab::Endpoint;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use crate::serve::{PAGE, REQUEST};

/// How long one answer may take.
const WAIT: Duration = Duration::from_secs(20);

/// Connections that keep-alive requests go over.
pub const KEPT_CONNECTIONS: usize = 16;
/// Threads that open connections.
pub const CONNECTING_THREADS: usize = 16;

/// What a load got done.
#[derive(Debug, Clone, Copy)]
pub struct Done {
    /// Bytes, requests or connections.
    pub units: f64,
    pub took: Duration,
}

impl Done {
    pub fn rate(&self) -> f64 {
        self.units / self.took.as_secs_f64()
    }
}

/// One stream of bytes for `time`; units are bytes.
pub fn bulk(from: &Endpoint, to: SocketAddr, time: Duration) -> Result<Done> {
    let mut socket = from.connect(to)?;
    socket.set_read_timeout(Some(WAIT))?;
    socket.set_write_timeout(Some(WAIT))?;
    let block = vec![0x5a; 256 << 10];
    let start = Instant::now();
    let mut sent = 0;
    while start.elapsed() < time {
        socket.write_all(&block)?;
        sent += block.len() as u64;
    }
    socket.shutdown(Shutdown::Write)?;
    let mut count = [0; 8];
    socket.read_exact(&mut count).context("no count of the bytes")?;
    ensure!(u64::from_le_bytes(count) == sent, "bytes were lost");
    Ok(Done {
        units: sent as f64,
        took: start.elapsed(),
    })
}

/// Requests over connections that stay open, each with one request in flight; units are answers.
pub fn keep_alive(from: &Endpoint, to: SocketAddr, time: Duration) -> Result<Done> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let mut clients = Vec::new();
    for id in 0..KEPT_CONNECTIONS {
        let socket = from.connect(to)?;
        socket.set_nodelay(true)?;
        socket.set_nonblocking(true)?;
        epoll.add(socket.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, id as u64))?;
        clients.push((socket, 0));
    }
    let start = Instant::now();
    let mut answers = 0u64;
    for (socket, _) in &clients {
        (&*socket).write_all(REQUEST)?;
    }
    let mut events = vec![EpollEvent::empty(); KEPT_CONNECTIONS];
    let mut block = vec![0; 64 << 10];
    let wait = EpollTimeout::try_from(WAIT)?;
    while start.elapsed() < time {
        let count = epoll.wait(&mut events, wait)?;
        ensure!(count > 0, "no answer within {WAIT:?}");
        for event in &events[..count] {
            let (socket, received) = &mut clients[event.data() as usize];
            match socket.read(&mut block) {
                Ok(0) => anyhow::bail!("the server has closed"),
                Ok(length) => *received += length,
                Err(error) if error.kind() == ErrorKind::WouldBlock => continue,
                Err(error) => return Err(error.into()),
            }
            if *received == PAGE.len() {
                *received = 0;
                answers += 1;
                socket.write_all(REQUEST)?;
            }
        }
    }
    Ok(Done {
        units: answers as f64,
        took: start.elapsed(),
    })
}

/// Until when connections are opened.
#[derive(Debug, Clone, Copy)]
pub enum Until {
    Time(Duration),
    Count(u64),
}

/// What opening connections got done.
#[derive(Debug)]
pub struct Opened {
    pub done: Done,
    pub failed: u64,
    /// When each fifth of a counted run was complete, since its start.
    pub fifths: Vec<Duration>,
}

/// Connections of one byte each way, one after the other on every thread; units are connections.
/// `at_fifth` is called as each fifth of a counted run completes.
pub fn connections(
    from: &Endpoint,
    to: SocketAddr,
    until: Until,
    at_fifth: &(dyn Fn() + Sync),
) -> Result<Opened> {
    let (started, completed, failed) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
    let fifths = Mutex::new(Vec::new());
    let start = Instant::now();
    let one_after_the_other = || {
        loop {
            let go_on = match until {
                Until::Time(time) => start.elapsed() < time,
                Until::Count(count) => started.fetch_add(1, Ordering::Relaxed) < count,
            };
            if !go_on {
                return;
            }
            if let Err(error) = one_byte(to) {
                if failed.fetch_add(1, Ordering::Relaxed) == 0 {
                    eprintln!("bench: a connection failed: {error}");
                }
                continue;
            }
            let number = completed.fetch_add(1, Ordering::Relaxed) + 1;
            if let Until::Count(count) = until
                && number % (count / 5) == 0
            {
                at_fifth();
                fifths.lock().expect("nobody panics here").push(start.elapsed());
            }
        }
    };
    from.inside(|| {
        thread::scope(|scope| {
            for _ in 0..CONNECTING_THREADS {
                scope.spawn(one_after_the_other);
            }
        });
    })?;
    let done = Done {
        units: completed.load(Ordering::Relaxed) as f64,
        took: start.elapsed(),
    };
    ensure!(done.units > 0.0, "no connection succeeded");
    Ok(Opened {
        done,
        failed: failed.load(Ordering::Relaxed),
        fifths: fifths.into_inner().unwrap_or_default(),
    })
}

fn one_byte(to: SocketAddr) -> std::io::Result<()> {
    let mut socket = TcpStream::connect(to)?;
    socket.set_read_timeout(Some(WAIT))?;
    socket.write_all(b"x")?;
    let mut answer = [0];
    socket.read_exact(&mut answer)
}

/// Opens `count` connections, each proved by one byte both ways, and leaves them open.
pub fn idle(from: &Endpoint, to: SocketAddr, count: usize) -> Result<Vec<TcpStream>> {
    from.inside(|| {
        (0..count)
            .map(|number| {
                let mut socket = TcpStream::connect(to)?;
                socket.set_read_timeout(Some(WAIT))?;
                socket.write_all(b"x")?;
                socket
                    .read_exact(&mut [0])
                    .with_context(|| format!("idle connection {number}"))?;
                Ok(socket)
            })
            .collect()
    })?
}
