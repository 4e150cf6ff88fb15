//! Steady load, and an account of every part of it.
//!
//! ```text
//! Attempts  at a fixed rate, whatever becomes of them: connect, echo one numbered message, close
//! Streams   open connections that echo numbered blocks at a pace (an idle one: at a slow pace)
//! ```
//! Invariant: what was started is accounted for: each attempt has an outcome, each stream an end. The rate
//! does not wait for answers, so a pause shows as latency and not as fewer attempts.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, timeout};

use crate::lab::Endpoint;

/// In every message of `Attempts` and every block of `Streams` that has room for it: whoever sees it has seen
/// plaintext.
pub const CANARY: &[u8] = b"canary-load-81f3b7a40c";

/// Bytes of a message of `Attempts`; every message differs from every other.
const MESSAGE_BYTES: usize = 64;

/// What became of one attempt.
#[derive(Debug, Clone)]
pub struct Attempt {
    pub started: Instant,
    /// From the start until the echo was complete, or until it failed.
    pub took: Duration,
    pub outcome: Result<(), Failure>,
}

/// How an attempt or a stream failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Failure {
    /// The connection did not come about.
    Connect(io::ErrorKind),
    /// It came about, and was lost.
    Lost(io::ErrorKind),
    /// Other bytes came back.
    Differs,
    /// Nothing came back in time.
    Silence,
}

/// Attempts in progress.
#[derive(Debug)]
pub struct Attempts {
    stop: watch::Sender<bool>,
    started: Arc<AtomicU64>,
    worker: JoinHandle<Result<Vec<Attempt>>>,
}

impl Attempts {
    /// Starts `per_second` attempts a second from `from` to `to`; each may take `patience`.
    pub fn start(from: &Endpoint, to: SocketAddr, per_second: u32, patience: Duration) -> Result<Self> {
        let (stop, stopped) = watch::channel(false);
        let started = Arc::new(AtomicU64::new(0));
        let counter = started.clone();
        let worker = from.spawn_inside("attempts", move || {
            in_a_runtime(attempts(to, per_second, patience, counter, stopped))
        })?;
        Ok(Self {
            stop,
            started,
            worker,
        })
    }

    /// How many have been started.
    pub fn started(&self) -> u64 {
        self.started.load(Ordering::Relaxed)
    }

    /// Starts no more, and waits for those under way, each at most its patience.
    pub fn stop(self) -> Result<Vec<Attempt>> {
        let _ = self.stop.send(true);
        self.worker
            .join()
            .map_err(|_| anyhow!("the thread of the attempts panicked"))?
    }
}

async fn attempts(
    to: SocketAddr,
    per_second: u32,
    patience: Duration,
    counter: Arc<AtomicU64>,
    mut stopped: watch::Receiver<bool>,
) -> Result<Vec<Attempt>> {
    let mut ticks = interval(Duration::from_secs(1) / per_second.max(1));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let mut under_way = JoinSet::new();
    let mut done = Vec::new();
    loop {
        tokio::select! {
            _ = ticks.tick() => {
                let number = counter.fetch_add(1, Ordering::Relaxed);
                under_way.spawn(async move {
                    let started = Instant::now();
                    let outcome = match timeout(patience, attempt(to, number)).await {
                        Ok(outcome) => outcome,
                        Err(_) => Err(Failure::Silence),
                    };
                    Attempt { started, took: started.elapsed(), outcome }
                });
            }
            Some(attempt) = under_way.join_next() => done.push(attempt?),
            _ = stopped.changed() => break,
        }
    }
    while let Some(attempt) = under_way.join_next().await {
        done.push(attempt?);
    }
    Ok(done)
}

async fn attempt(to: SocketAddr, number: u64) -> Result<(), Failure> {
    let mut socket = TcpStream::connect(to)
        .await
        .map_err(|e| Failure::Connect(e.kind()))?;
    let mut message = [0; MESSAGE_BYTES];
    for word in message.chunks_mut(8) {
        word.copy_from_slice(&number.to_be_bytes());
    }
    message[8..8 + CANARY.len()].copy_from_slice(CANARY);
    echo(&mut socket, &message).await
}

pub(crate) async fn echo(socket: &mut TcpStream, message: &[u8]) -> Result<(), Failure> {
    let lost = |e: io::Error| Failure::Lost(e.kind());
    socket.write_all(message).await.map_err(lost)?;
    let mut answer = vec![0; message.len()];
    socket.read_exact(&mut answer).await.map_err(lost)?;
    if answer == message {
        Ok(())
    } else {
        Err(Failure::Differs)
    }
}

/// What became of one stream.
#[derive(Debug, Clone, Copy)]
pub struct StreamEnd {
    /// Blocks that came back whole.
    pub blocks: u64,
    /// When and how it failed; `None` when it lasted until `stop`.
    pub failure: Option<(Instant, Failure)>,
}

/// Open streams.
#[derive(Debug)]
pub struct Streams {
    stop: watch::Sender<bool>,
    worker: JoinHandle<Result<Vec<StreamEnd>>>,
}

/// How a stream behaves.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// Bytes of a block, at least eight.
    pub block: usize,
    /// From one block to the next.
    pub every: Duration,
    /// How long the echo of a block may take.
    pub patience: Duration,
}

impl Pace {
    /// A block of 16 KiB twenty times a second.
    pub const BUSY: Self = Self {
        block: 16 << 10,
        every: Duration::from_millis(50),
        patience: Duration::from_secs(10),
    };
    /// A few bytes every two seconds.
    pub const IDLE: Self = Self {
        block: 16,
        every: Duration::from_secs(2),
        patience: Duration::from_secs(10),
    };
}

impl Streams {
    /// Opens `count` streams from `from` to `to`; returns when each has echoed its first block, or failed.
    pub fn start(from: &Endpoint, to: SocketAddr, count: usize, pace: Pace) -> Result<Self> {
        let (stop, stopped) = watch::channel(false);
        let (ready, up) = std::sync::mpsc::channel();
        let worker = from.spawn_inside("streams", move || {
            in_a_runtime(async move {
                let mut streams = JoinSet::new();
                for number in 0..count {
                    streams.spawn(stream(to, number as u64, pace, ready.clone(), stopped.clone()));
                }
                drop(ready);
                let mut ends = Vec::new();
                while let Some(end) = streams.join_next().await {
                    ends.push(end?);
                }
                Ok(ends)
            })
        })?;
        for _ in 0..count {
            up.recv_timeout(Duration::from_secs(60))
                .map_err(|_| anyhow!("streams do not start"))?;
        }
        Ok(Self { stop, worker })
    }

    /// Ends the streams after their block under way.
    pub fn stop(self) -> Result<Vec<StreamEnd>> {
        let _ = self.stop.send(true);
        self.worker
            .join()
            .map_err(|_| anyhow!("the thread of the streams panicked"))?
    }
}

async fn stream(
    to: SocketAddr,
    number: u64,
    pace: Pace,
    ready: std::sync::mpsc::Sender<()>,
    mut stopped: watch::Receiver<bool>,
) -> StreamEnd {
    let mut blocks = 0;
    let failed = |blocks, failure| StreamEnd {
        blocks,
        failure: Some((Instant::now(), failure)),
    };
    let mut socket = match timeout(pace.patience, TcpStream::connect(to)).await {
        Ok(Ok(socket)) => socket,
        Ok(Err(e)) => {
            let _ = ready.send(());
            return failed(blocks, Failure::Connect(e.kind()));
        }
        Err(_) => {
            let _ = ready.send(());
            return failed(blocks, Failure::Silence);
        }
    };
    let mut block = vec![0; pace.block.max(8)];
    if let Some(room) = block.get_mut(8..8 + CANARY.len()) {
        room.copy_from_slice(CANARY);
    }
    let mut ticks = interval(pace.every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        // A reset is noticed when it comes, not at the next block.
        let mut unasked = [0; 1];
        tokio::select! {
            _ = ticks.tick() => {}
            early = socket.read(&mut unasked) => {
                let failure = match early {
                    Ok(0) => Failure::Lost(io::ErrorKind::UnexpectedEof),
                    Ok(_) => Failure::Differs,
                    Err(e) => Failure::Lost(e.kind()),
                };
                return failed(blocks, failure);
            }
            _ = stopped.changed() => return StreamEnd { blocks, failure: None },
        }
        block[..8].copy_from_slice(&(number << 32 | blocks).to_be_bytes());
        match timeout(pace.patience, echo(&mut socket, &block)).await {
            Ok(Ok(())) => blocks += 1,
            Ok(Err(failure)) => {
                let _ = ready.send(());
                return failed(blocks, failure);
            }
            Err(_) => {
                let _ = ready.send(());
                return failed(blocks, Failure::Silence);
            }
        }
        if blocks == 1 {
            let _ = ready.send(());
        }
    }
}

/// Fails, naming the worst, unless every attempt had its echo.
pub fn all_complete(attempts: &[Attempt]) -> Result<()> {
    let failed: Vec<_> = attempts
        .iter()
        .filter_map(|attempt| attempt.outcome.err())
        .collect();
    match failed[..] {
        [] => Ok(()),
        [first, ..] => Err(anyhow!(
            "{} of {} attempts failed, first: {first:?}",
            failed.len(),
            attempts.len()
        )),
    }
}

/// The attempt time that `percent` of a hundred attempts do not exceed.
pub fn percentile(attempts: &[Attempt], percent: usize) -> Duration {
    let mut took: Vec<_> = attempts.iter().map(|attempt| attempt.took).collect();
    took.sort_unstable();
    took.get((took.len() * percent / 100).min(took.len().saturating_sub(1)))
        .copied()
        .unwrap_or_default()
}

pub(crate) fn in_a_runtime<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(work)
}
