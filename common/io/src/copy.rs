//! Bytes between an application's socket and a tunnel's stream, or another socket.
//!
//! ```text
//! socket ──readable, capacity──▶ DATA      DATA ──write, then release──▶ socket
//! ```
//! Invariant: an idle connection holds no buffer, and its ends are told truthfully (settled D15): a FIN
//! is an END_STREAM and the reverse, everything else is a reset on both sides.

use crate::hbone::{Counted, GROW_AFTER, Stream};
use bytes::{Bytes, BytesMut};
use futures::task::AtomicWaker;
use h2::{RecvStream, SendStream};
use socket2::SockRef;
use std::{
    cell::RefCell,
    future::poll_fn,
    io::{self, IoSlice},
    net::Shutdown,
    pin::{Pin, pin},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    task::{Context, Poll, ready},
    time::Duration,
};
use tokio::{
    io::{AsyncWrite, AsyncWriteExt},
    net::{
        TcpStream,
        tcp::{ReadHalf, WriteHalf},
    },
};
use tokio_util::io::poll_read_buf;

/// Most bytes that one read takes from a socket.
///
/// A TLS record carries at most 2^14 bytes (RFC 8446 §5.1) and the HTTP/2 frame header takes 9 of them
/// (RFC 9113 §4.1): one read then fills four records instead of spilling into a fifth.
const READ_BYTES: usize = 4 * (1 << 14) - 9;

/// Bytes that a relay takes before it lets the tunnel send them: they are still in the cache then, and the
/// other end has something to do.
const BURST_BYTES: usize = 4 * READ_BYTES;

/// What a relay counts and obeys; shared with whoever lists or cuts connections.
#[derive(Debug, Default)]
pub struct Flow {
    /// Bytes from the connection's initiator.
    pub received: AtomicU64,
    /// Bytes back to it.
    pub sent: AtomicU64,
    cut: AtomicBool,
    relay: AtomicWaker,
}

impl Flow {
    /// Resets the connection on both sides; for good.
    pub fn cut(&self) {
        self.cut.store(true, Ordering::Release);
        self.relay.wake();
    }

    pub fn is_cut(&self) -> bool {
        self.cut.load(Ordering::Acquire)
    }

    /// Waits for [`Flow::cut`]. One task waits at a time.
    pub async fn until_cut(&self) {
        poll_fn(|cx| {
            self.relay.register(cx.waker());
            if self.is_cut() {
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        })
        .await
    }
}

/// How a connection ended, when not cleanly.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    #[error("application: {0}")]
    Application(#[source] io::Error),
    #[error("tunnel: {0}")]
    Tunnel(#[source] h2::Error),
    #[error("cut: it is no longer allowed")]
    Cut,
    #[error("its reader is slow, and its workload buffers all that it may")]
    Overload,
}

/// Which of the two ends began the connection: the socket's, or the stream's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Initiator {
    Socket,
    Stream,
}

/// Moves bytes both ways until both directions have ended, one fails, or the flow is cut. The socket is
/// reset unless both ended cleanly.
pub async fn relay(
    mut socket: TcpStream,
    mut stream: Stream,
    flow: &Flow,
    initiator: Initiator,
) -> Result<(), Fault> {
    let (up, down) = match initiator {
        Initiator::Socket => (&flow.received, &flow.sent),
        Initiator::Stream => (&flow.sent, &flow.received),
    };
    // From now on the kernel resets the application should this process die (settled D15).
    reset(&socket);
    let outcome = {
        let Stream { send, recv, counted } = &mut stream;
        let (read, write) = socket.split();
        let both = async {
            tokio::try_join!(
                to_stream(read, send, up, counted),
                from_stream(recv, write, down, counted)
            )
            .map(|_| ())
        };
        tokio::select! {
            biased;
            () = flow.until_cut() => Err(Fault::Cut),
            ended = both => ended,
        }
    };
    match &outcome {
        Ok(()) => {
            close_cleanly(&socket);
            stream.counted.closed();
        }
        Err(Fault::Application(_) | Fault::Cut | Fault::Overload) => stream.reset(),
        Err(Fault::Tunnel(_)) => stream.counted.closed(),
    }
    outcome
}

/// Both directions have ended: what is still on its way is delivered after the close.
fn close_cleanly(socket: &TcpStream) {
    let _ = SockRef::from(socket).set_linger(None);
}

/// Closes a socket with RST when it is dropped: what was not delivered is not claimed to be.
pub fn reset(socket: &TcpStream) {
    // It fails only on a socket that is gone already.
    let _ = SockRef::from(socket).set_linger(Some(Duration::ZERO));
}

async fn to_stream(
    mut socket: ReadHalf<'_>,
    send: &mut SendStream<Bytes>,
    count: &AtomicU64,
    counted: &Counted,
) -> Result<(), Fault> {
    let mut burst = 0;
    loop {
        // Readiness first: neither a buffer nor window is held while the application is silent.
        readable(&socket).await.map_err(Fault::Application)?;
        let capacity = capacity(send).await.map_err(Fault::Tunnel)?;
        counted.room().await;
        match read(&mut socket, capacity).await.map_err(Fault::Application)? {
            Some(chunk) if chunk.is_empty() => {
                return send.send_data(chunk, true).map_err(Fault::Tunnel);
            }
            Some(chunk) => {
                count.fetch_add(chunk.len() as u64, Ordering::Relaxed);
                burst += chunk.len();
                send.send_data(counted.charged(chunk), false)
                    .map_err(Fault::Tunnel)?;
                if burst >= BURST_BYTES {
                    burst = 0;
                    tokio::task::yield_now().await;
                }
            }
            None => {}
        }
    }
}

async fn readable(socket: &ReadHalf<'_>) -> io::Result<()> {
    poll_fn(|cx| socket.as_ref().poll_read_ready(cx)).await
}

/// How much may be sent now; waits until it is more than nothing.
async fn capacity(send: &mut SendStream<Bytes>) -> Result<usize, h2::Error> {
    send.reserve_capacity(READ_BYTES);
    loop {
        let capacity = send.capacity();
        if capacity > 0 {
            return Ok(capacity);
        }
        if let Some(grown) = poll_fn(|cx| send.poll_capacity(cx)).await {
            grown?;
        } else {
            // The stream was closed for sending: the peer has reset it.
            return Err(h2::Reason::CANCEL.into());
        }
    }
}

thread_local! {
    /// The block that this thread reads into; what has been read is split off and shared.
    static BLOCK: RefCell<BytesMut> = RefCell::new(BytesMut::new());
}

/// What is there to read, at most `most` bytes; empty at the end, none if there is nothing after all.
///
/// A read that is cut short by what was there takes the readiness with it, so that no call asks in vain.
async fn read(socket: &mut ReadHalf<'_>, most: usize) -> io::Result<Option<Bytes>> {
    poll_fn(|cx| {
        let polled = BLOCK.with_borrow_mut(|block| {
            if block.capacity() < READ_BYTES / 4 {
                block.reserve(READ_BYTES);
            }
            let mut limited = bytes::BufMut::limit(&mut *block, most.min(READ_BYTES));
            poll_read_buf(Pin::new(&mut *socket), cx, &mut limited).map_ok(|_| block.split().freeze())
        });
        match polled {
            Poll::Ready(read) => Poll::Ready(read.map(Some)),
            Poll::Pending => Poll::Ready(Ok(None)),
        }
    })
    .await
}

async fn from_stream(
    recv: &mut RecvStream,
    mut socket: WriteHalf<'_>,
    count: &AtomicU64,
    counted: &Counted,
) -> Result<(), Fault> {
    while let Some(batch) = poll_fn(|cx| poll_batch(recv, cx)).await {
        let batch = batch.map_err(Fault::Tunnel)?;
        let length = batch.length;
        deliver(pin!(batch.write(&mut socket)), recv, counted).await?;
        drop(batch);
        let before = count.fetch_add(length as u64, Ordering::Relaxed);
        if before < GROW_AFTER && before + length as u64 >= GROW_AFTER {
            counted.moves_bulk();
        }
        recv.flow_control()
            .release_capacity(length)
            .map_err(Fault::Tunnel)?;
    }
    finish(socket.as_ref())
}

/// How often a stream whose reader is slow counts what it holds.
const STALL_COUNTED_EVERY: Duration = Duration::from_millis(100);

/// Writes a batch out. While the reader is slow, what its stream holds is charged to the workload; beyond the
/// workload's share the stream is given up.
async fn deliver(
    mut write: Pin<&mut impl Future<Output = io::Result<()>>>,
    recv: &mut RecvStream,
    counted: &Counted,
) -> Result<(), Fault> {
    match poll_fn(|cx| Poll::Ready(write.as_mut().poll(cx))).await {
        Poll::Ready(done) => done.map_err(Fault::Application),
        // Boxed, so that a connection that never stalls carries neither a timer nor a charge.
        Poll::Pending => Box::pin(stalled(write, recv, counted)).await,
    }
}

async fn stalled(
    mut write: Pin<&mut impl Future<Output = io::Result<()>>>,
    recv: &mut RecvStream,
    counted: &Counted,
) -> Result<(), Fault> {
    let mut held = counted.charge(0);
    loop {
        held.set(recv.flow_control().used_capacity());
        if !counted.has_room() {
            return Err(Fault::Overload);
        }
        tokio::select! {
            biased;
            done = &mut write => return done.map_err(Fault::Application),
            () = tokio::time::sleep(STALL_COUNTED_EVERY) => {}
        }
    }
}

/// DATA that is written by one call: frames that have come since the last one.
struct Batch {
    first: Bytes,
    more: Vec<Bytes>,
    length: usize,
}

/// Most bytes that one write hands to a socket.
const WRITE_BYTES: usize = 256 * 1024;

/// Most frames of one write.
const WRITE_FRAMES: usize = 16;

/// What has arrived in the stream, as much as one write takes; none at its end.
fn poll_batch(recv: &mut RecvStream, cx: &mut Context<'_>) -> Poll<Option<Result<Batch, h2::Error>>> {
    let first = match ready!(recv.poll_data(cx)) {
        Some(Ok(first)) => first,
        Some(Err(error)) => return Poll::Ready(Some(Err(error))),
        None => return Poll::Ready(None),
    };
    let mut batch = Batch {
        length: first.len(),
        first,
        more: vec![],
    };
    // An end or an error that comes meanwhile is found again at the next call.
    while batch.length < WRITE_BYTES
        && batch.more.len() + 1 < WRITE_FRAMES
        && let Poll::Ready(Some(Ok(next))) = recv.poll_data(cx)
    {
        batch.length += next.len();
        batch.more.push(next);
    }
    Poll::Ready(Some(Ok(batch)))
}

impl Batch {
    async fn write(&self, socket: &mut WriteHalf<'_>) -> io::Result<()> {
        if self.more.is_empty() {
            return socket.write_all(&self.first).await;
        }
        let mut written = 0;
        while written < self.length {
            match poll_fn(|cx| self.poll_write(socket, written, cx)).await? {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                count => written += count,
            }
        }
        Ok(())
    }

    /// Writes what comes after the first `written` bytes.
    fn poll_write(
        &self,
        socket: &mut WriteHalf<'_>,
        written: usize,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<usize>> {
        let mut parts = [IoSlice::new(&[]); WRITE_FRAMES];
        let chunks = std::iter::once(&self.first).chain(&self.more);
        for (part, chunk) in parts.iter_mut().zip(chunks) {
            *part = IoSlice::new(chunk);
        }
        let mut left = &mut parts[..=self.more.len()];
        IoSlice::advance_slices(&mut left, written);
        Pin::new(socket).poll_write_vectored(cx, left)
    }
}

/// Sends FIN and leaves the other direction open.
fn finish(socket: &TcpStream) -> Result<(), Fault> {
    match SockRef::from(socket).shutdown(Shutdown::Write) {
        // The other end has reset it: its reader reports that.
        Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
        other => other.map_err(Fault::Application),
    }
}

/// Moves bytes between two sockets, for destinations outside the mesh. Either socket's fault resets both.
pub async fn relay_plain(mut client: TcpStream, mut server: TcpStream, flow: &Flow) -> Result<(), Fault> {
    reset(&client);
    reset(&server);
    let outcome = {
        let ((from_client, to_client), (from_server, to_server)) = (client.split(), server.split());
        let both = async {
            tokio::try_join!(
                to_socket(from_client, to_server, &flow.received),
                to_socket(from_server, to_client, &flow.sent)
            )
            .map(|_| ())
        };
        tokio::select! {
            biased;
            () = flow.until_cut() => Err(Fault::Cut),
            ended = both => ended,
        }
    };
    if outcome.is_ok() {
        close_cleanly(&client);
        close_cleanly(&server);
    }
    outcome
}

async fn to_socket(mut from: ReadHalf<'_>, mut to: WriteHalf<'_>, count: &AtomicU64) -> Result<(), Fault> {
    loop {
        readable(&from).await.map_err(Fault::Application)?;
        match read(&mut from, READ_BYTES).await.map_err(Fault::Application)? {
            Some(chunk) if chunk.is_empty() => return finish(to.as_ref()),
            Some(chunk) => {
                to.write_all(&chunk).await.map_err(Fault::Application)?;
                count.fetch_add(chunk.len() as u64, Ordering::Relaxed);
            }
            None => {}
        }
    }
}
