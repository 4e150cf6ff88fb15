//! Servers and clients of the tests' own, where no real program says enough.
//!
//! ```text
//! Server: one thread, one runtime, a task a connection       Digest: what was sent, what arrived
//! ```
//! Invariant: sockets come from the lab and keep to their namespace; everything ends with its owner.

use std::future::Future;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use sha2::{Digest as _, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream as AsyncStream;
use tokio::sync::oneshot;

/// A TCP server in the lab, until dropped.
#[derive(Debug)]
pub struct Server {
    accepted: Arc<AtomicU64>,
    _stop: oneshot::Sender<()>,
}

impl Server {
    /// Serves each connection of `listener` with `answer`, which gets the client's address as accepted.
    pub fn start<F>(
        listener: TcpListener,
        answer: impl Fn(AsyncStream, SocketAddr) -> F + Send + 'static,
    ) -> Result<Self>
    where
        F: Future<Output = io::Result<()>> + Send + 'static,
    {
        listener.set_nonblocking(true)?;
        let accepted = Arc::new(AtomicU64::new(0));
        let (stop, stopped) = oneshot::channel();
        let counter = accepted.clone();
        thread::Builder::new()
            .name("server".into())
            .spawn(move || -> io::Result<()> {
                let runtime = tokio::runtime::Builder::new_current_thread()
                    .enable_all()
                    .build()?;
                let serve = async {
                    let listener = tokio::net::TcpListener::from_std(listener)?;
                    loop {
                        let (socket, peer) = match listener.accept().await {
                            Ok(accepted) => accepted,
                            // Out of descriptors, perhaps: that passes.
                            Err(_) => {
                                tokio::time::sleep(Duration::from_millis(20)).await;
                                continue;
                            }
                        };
                        counter.fetch_add(1, Ordering::Relaxed);
                        let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
                        tokio::spawn(answer(socket, peer));
                    }
                };
                runtime.block_on(async {
                    tokio::select! {
                        failed = serve => failed,
                        _ = stopped => Ok(()),
                    }
                })
            })?;
        Ok(Self {
            accepted,
            _stop: stop,
        })
    }

    /// Sends back what it gets, until the client has sent its end; then ends as well.
    pub fn echo(listener: TcpListener) -> Result<Self> {
        Self::start(listener, |mut socket, _| async move {
            let (mut from, mut to) = socket.split();
            tokio::io::copy(&mut from, &mut to).await?;
            to.shutdown().await
        })
    }

    /// Speaks first: a line that names the client's address; then echoes.
    pub fn greet(listener: TcpListener) -> Result<Self> {
        Self::start(listener, |mut socket, peer| async move {
            socket
                .write_all(format!("220 {}\r\n", peer.ip()).as_bytes())
                .await?;
            let (mut from, mut to) = socket.split();
            tokio::io::copy(&mut from, &mut to).await?;
            to.shutdown().await
        })
    }

    /// Reads to the end, then answers with the hexadecimal SHA-256 of all it read.
    pub fn digest(listener: TcpListener) -> Result<Self> {
        Self::start(listener, |mut socket, _| async move {
            let mut digest = Sha256::new();
            let mut block = vec![0; 256 << 10];
            loop {
                let count = socket.read(&mut block).await?;
                if count == 0 {
                    break;
                }
                digest.update(&block[..count]);
            }
            socket.write_all(hex(&digest.finalize()).as_bytes()).await?;
            socket.shutdown().await
        })
    }

    /// Reads to the end, then answers with how many bytes that were.
    pub fn count(listener: TcpListener) -> Result<Self> {
        Self::start(listener, |mut socket, _| async move {
            let mut block = vec![0; 256 << 10];
            let mut bytes = 0;
            loop {
                match socket.read(&mut block).await? {
                    0 => break,
                    count => bytes += count as u64,
                }
            }
            socket.write_all(bytes.to_string().as_bytes()).await?;
            socket.shutdown().await
        })
    }

    /// Connections accepted so far.
    pub fn accepted(&self) -> u64 {
        self.accepted.load(Ordering::Relaxed)
    }
}

/// Sends `bytes` of a pattern that repeats nowhere near and returns its digest in hexadecimal; the
/// direction is closed after it.
pub fn send_pattern(mut socket: &TcpStream, bytes: u64, seed: u64) -> Result<String> {
    let mut digest = Sha256::new();
    let mut pattern = Pattern(seed);
    let mut block = vec![0; 256 << 10];
    let mut left = bytes;
    while left > 0 {
        let count = usize::try_from(left.min(block.len() as u64))?;
        pattern.fill(&mut block[..count]);
        digest.update(&block[..count]);
        socket
            .write_all(&block[..count])
            .with_context(|| format!("{left} of {bytes} bytes to go"))?;
        left -= count as u64;
    }
    socket.shutdown(Shutdown::Write)?;
    Ok(hex(&digest.finalize()))
}

/// Sends `message`, and checks that it comes back.
pub fn echo_once(mut socket: &TcpStream, message: &[u8]) -> Result<()> {
    socket.write_all(message)?;
    let mut answer = vec![0; message.len()];
    socket.read_exact(&mut answer).context("no echo")?;
    ensure!(answer == message, "the echo differs");
    Ok(())
}

/// SplitMix64: cheap, and without a period that a lost or doubled block could hide in.
struct Pattern(u64);

impl Pattern {
    fn fill(&mut self, block: &mut [u8]) {
        for chunk in block.chunks_mut(8) {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut word = self.0;
            word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            word ^= word >> 31;
            chunk.copy_from_slice(&word.to_le_bytes()[..chunk.len()]);
        }
    }
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// SHA-256 in hexadecimal.
pub fn digest_of(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}
