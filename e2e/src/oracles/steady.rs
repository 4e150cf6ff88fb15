//! The load itself: one thread a client pod, one task a kind of traffic and pair.
//!
//! ```text
//! attempts   four a second: connect, say one numbered request, hear it back, close
//! a stream   ten numbered blocks a second, each compared byte for byte; opened again when it ends early
//! idle       says one thing when opened and one at the end; in between only an end is heard
//! intruders  two a second and client, to what policy refuses
//! ```
//! Invariant: everything has a number, so a byte that is lost, doubled or delivered to another is seen.

use std::io;
use std::net::SocketAddr;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use anyhow::Result;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};

use super::CANARY;
use crate::load::{Attempt, Failure, echo, in_a_runtime};

const ATTEMPT_EVERY: Duration = Duration::from_millis(250);
const BLOCK_EVERY: Duration = Duration::from_millis(100);
const BLOCK_BYTES: usize = 4 << 10;
const INTRUSION_EVERY: Duration = Duration::from_millis(500);
/// How long after its end a stream is opened again.
const REOPEN_AFTER: Duration = Duration::from_millis(200);

/// A client and a server that it may reach, at one address.
#[derive(Debug, Clone)]
pub(super) struct Pair {
    pub name: String,
    pub to: SocketAddr,
}

/// The load of one pod.
#[derive(Debug)]
pub(super) struct Client {
    pub pairs: Vec<Pair>,
    /// What policy refuses to this pod.
    pub forbidden: Vec<SocketAddr>,
    pub patience: Duration,
}

/// What became of an open stream or an idle socket.
#[derive(Debug, Clone, Copy)]
pub struct StreamEnd {
    pub kind: &'static str,
    pub opened: Instant,
    pub ended: Instant,
    /// Messages that came back whole.
    pub blocks: u64,
    /// `None` when it lasted until the load was stopped.
    pub failure: Option<Failure>,
}

/// What became of an attempt that policy refuses.
#[derive(Debug, Clone, Copy)]
pub struct Intrusion {
    /// Its own end; port 0 when it never had a connection.
    pub from: SocketAddr,
    pub to: SocketAddr,
    pub started: Instant,
    pub took: Duration,
    /// How it failed; `None` when it was answered.
    pub end: Option<Failure>,
}

impl Intrusion {
    /// Whether a connection came about, so that somebody had to refuse it.
    pub fn connected(&self) -> bool {
        self.from.port() != 0 && self.end.is_some_and(Failure::is_refusal)
    }
}

impl Failure {
    /// A refusal is a reset, at once or after the first bytes; a clean end is none.
    pub fn is_refusal(self) -> bool {
        match self {
            Self::Connect(kind) => kind == io::ErrorKind::ConnectionRefused || is_reset(kind),
            Self::Lost(kind) => is_reset(kind),
            Self::Differs | Self::Silence => false,
        }
    }
}

/// A reset, or what a write after one says.
pub(super) fn is_reset(kind: io::ErrorKind) -> bool {
    matches!(
        kind,
        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe | io::ErrorKind::NotConnected
    )
}

/// All that one client, or all of them, did.
#[derive(Debug, Default)]
pub(super) struct Tally {
    pub attempts: Vec<Attempt>,
    pub streams: Vec<StreamEnd>,
    pub intrusions: Vec<Intrusion>,
}

impl Tally {
    pub fn add(&mut self, other: Self) {
        self.attempts.extend(other.attempts);
        self.streams.extend(other.streams);
        self.intrusions.extend(other.intrusions);
    }
}

impl Client {
    /// Runs until stopped; says once for each stream and idle socket that it is up.
    pub fn run(self, ready: &Sender<()>, stopped: watch::Receiver<bool>) -> Result<Tally> {
        in_a_runtime(async {
            let mut tasks = JoinSet::new();
            for (number, pair) in self.pairs.into_iter().enumerate() {
                let delay = ATTEMPT_EVERY / 5 * number as u32;
                tasks.spawn(attempts(pair.clone(), delay, self.patience, stopped.clone()));
                tasks.spawn(streams(
                    pair.clone(),
                    self.patience,
                    ready.clone(),
                    stopped.clone(),
                ));
                tasks.spawn(idles(pair, self.patience, ready.clone(), stopped.clone()));
            }
            tasks.spawn(intrusions(self.forbidden, self.patience, stopped));
            let mut tally = Tally::default();
            while let Some(part) = tasks.join_next().await {
                tally.add(part?);
            }
            Ok(tally)
        })
    }
}

/// A request as a small HTTP client sends it, with its number and the canary.
fn message(pair: &Pair, number: u64) -> Vec<u8> {
    let body = format!("{CANARY} {} {number:020}", pair.name);
    format!(
        "POST /{number} HTTP/1.1\r\nhost: {}\r\ncontent-length: {}\r\n\r\n{body}",
        pair.to,
        body.len()
    )
    .into_bytes()
}

async fn attempts(
    pair: Pair,
    delay: Duration,
    patience: Duration,
    mut stopped: watch::Receiver<bool>,
) -> Tally {
    sleep(delay).await;
    let mut ticks = interval(ATTEMPT_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let mut under_way = JoinSet::new();
    let mut tally = Tally::default();
    let mut number = 0;
    loop {
        tokio::select! {
            _ = ticks.tick() => {
                let (to, message) = (pair.to, message(&pair, number));
                number += 1;
                under_way.spawn(async move {
                    let started = Instant::now();
                    let outcome = timeout(patience, exchange(to, &message)).await;
                    let outcome = outcome.unwrap_or(Err(Failure::Silence));
                    Attempt { started, took: started.elapsed(), outcome }
                });
            }
            Some(done) = under_way.join_next() => tally.attempts.extend(done.ok()),
            _ = stopped.changed() => break,
        }
    }
    tally.attempts.extend(under_way.join_all().await);
    tally
}

async fn connect(to: SocketAddr) -> Result<TcpStream, Failure> {
    TcpStream::connect(to)
        .await
        .map_err(|e| Failure::Connect(e.kind()))
}

async fn exchange(to: SocketAddr, message: &[u8]) -> Result<(), Failure> {
    echo(&mut connect(to).await?, message).await
}

/// Keeps one stream open, over and over.
async fn streams(
    pair: Pair,
    patience: Duration,
    ready: Sender<()>,
    mut stopped: watch::Receiver<bool>,
) -> Tally {
    let mut tally = Tally::default();
    let mut ready = Some(ready);
    while !*stopped.borrow() {
        let opened = Instant::now();
        let mut blocks = 0;
        let outcome = stream(&pair, patience, &mut blocks, &mut ready, &mut stopped).await;
        tally.streams.push(end("a stream", opened, blocks, outcome.err()));
        if outcome.is_err() {
            sleep(REOPEN_AFTER).await;
        }
    }
    tally
}

fn end(kind: &'static str, opened: Instant, blocks: u64, failure: Option<Failure>) -> StreamEnd {
    StreamEnd {
        kind,
        opened,
        ended: Instant::now(),
        blocks,
        failure,
    }
}

async fn stream(
    pair: &Pair,
    patience: Duration,
    blocks: &mut u64,
    ready: &mut Option<Sender<()>>,
    stopped: &mut watch::Receiver<bool>,
) -> Result<(), Failure> {
    let mut socket = within(patience, connect(pair.to)).await?;
    let mut ticks = interval(BLOCK_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            early = unasked(&socket) => return Err(early),
            _ = stopped.changed() => break,
        }
        let mut block = message(pair, *blocks);
        let fill = *blocks as usize;
        block.extend((block.len()..BLOCK_BYTES).map(|at| (at.wrapping_mul(31) + fill) as u8));
        within(patience, echo(&mut socket, &block)).await?;
        *blocks += 1;
        if let Some(ready) = ready.take() {
            let _ = ready.send(());
        }
    }
    // Nothing may follow the last block but the end.
    let lost = |e: io::Error| Failure::Lost(e.kind());
    socket.shutdown().await.map_err(lost)?;
    let rest = async { socket.read(&mut [0; 1]).await.map_err(lost) };
    match within(patience, rest).await? {
        0 => Ok(()),
        _ => Err(Failure::Differs),
    }
}

/// Waits for what nobody has asked for: an end, a reset, or bytes of somebody else.
async fn unasked(socket: &TcpStream) -> Failure {
    match socket.peek(&mut [0; 1]).await {
        Ok(0) => Failure::Lost(io::ErrorKind::UnexpectedEof),
        Ok(_) => Failure::Differs,
        Err(e) => Failure::Lost(e.kind()),
    }
}

async fn within<T>(patience: Duration, work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    timeout(patience, work).await.unwrap_or(Err(Failure::Silence))
}

/// Keeps one silent socket open, over and over.
async fn idles(
    pair: Pair,
    patience: Duration,
    ready: Sender<()>,
    mut stopped: watch::Receiver<bool>,
) -> Tally {
    let mut tally = Tally::default();
    let mut ready = Some(ready);
    while !*stopped.borrow() {
        let opened = Instant::now();
        let mut blocks = 0;
        let silent = async {
            let mut socket = within(patience, connect(pair.to)).await?;
            within(patience, echo(&mut socket, &message(&pair, 0))).await?;
            blocks = 1;
            if let Some(ready) = ready.take() {
                let _ = ready.send(());
            }
            tokio::select! {
                early = unasked(&socket) => return Err(early),
                _ = stopped.changed() => {}
            }
            within(patience, echo(&mut socket, &message(&pair, 1))).await
        };
        let outcome = silent.await;
        tally
            .streams
            .push(end("an idle socket", opened, blocks, outcome.err()));
        if outcome.is_err() {
            sleep(REOPEN_AFTER).await;
        }
    }
    tally
}

/// Tries what policy refuses, one target after the other.
async fn intrusions(
    targets: Vec<SocketAddr>,
    patience: Duration,
    mut stopped: watch::Receiver<bool>,
) -> Tally {
    let mut tally = Tally::default();
    let mut ticks = interval(INTRUSION_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    for &to in targets.iter().cycle() {
        tokio::select! {
            _ = ticks.tick() => {}
            _ = stopped.changed() => break,
        }
        let started = Instant::now();
        let mut from = SocketAddr::new(to.ip(), 0);
        let tried = async {
            let mut socket = connect(to).await?;
            from = socket.local_addr().map_err(|e| Failure::Connect(e.kind()))?;
            echo(&mut socket, CANARY.as_bytes()).await
        };
        let end = within(patience, tried).await.err();
        tally.intrusions.push(Intrusion {
            from,
            to,
            started,
            took: started.elapsed(),
            end,
        });
    }
    tally
}
