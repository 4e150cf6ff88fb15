//! Bytes between an application's socket and a tunnel's stream, or another socket.
//!
//! ```text
//! socket ──readable, capacity──▶ DATA      DATA ──write, then release──▶ socket
//! ```
//! Invariant: an idle connection holds no buffer, and its ends are told truthfully (settled D15): a FIN
//! is an END_STREAM and the reverse, everything else is a reset on both sides.

use crate::hbone::{Counted, GROW_AFTER, Stream};
use bytes::{Buf, Bytes, BytesMut};
use futures::task::AtomicWaker;
use h2::SendStream;
use socket2::SockRef;
use std::{
    cell::RefCell,
    future::poll_fn,
    io,
    net::Shutdown,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    task::Poll,
    time::Duration,
};
use tokio::net::TcpStream;

/// Most bytes that one read takes from a socket.
const READ_BYTES: usize = 64 * 1024;

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
    socket: TcpStream,
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
        let both = async {
            tokio::try_join!(
                to_stream(&socket, send, up),
                from_stream(recv, &socket, down, counted)
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
        Ok(()) => close_cleanly(&socket),
        Err(Fault::Application(_) | Fault::Cut) => stream.reset(),
        Err(Fault::Tunnel(_)) => {}
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

async fn to_stream(socket: &TcpStream, send: &mut SendStream<Bytes>, count: &AtomicU64) -> Result<(), Fault> {
    loop {
        // Readiness first: neither a buffer nor window is held while the application is silent.
        socket.readable().await.map_err(Fault::Application)?;
        let capacity = capacity(send).await.map_err(Fault::Tunnel)?;
        match read(socket, capacity) {
            Ok(chunk) if chunk.is_empty() => {
                return send.send_data(chunk, true).map_err(Fault::Tunnel);
            }
            Ok(chunk) => {
                count.fetch_add(chunk.len() as u64, Ordering::Relaxed);
                send.send_data(chunk, false).map_err(Fault::Tunnel)?;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(Fault::Application(error)),
        }
    }
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

fn read(socket: &TcpStream, most: usize) -> io::Result<Bytes> {
    BLOCK.with_borrow_mut(|block| {
        if block.capacity() < READ_BYTES / 4 {
            block.reserve(READ_BYTES);
        }
        let mut limited = bytes::BufMut::limit(&mut *block, most.min(READ_BYTES));
        socket.try_read_buf(&mut limited)?;
        Ok(block.split().freeze())
    })
}

async fn from_stream(
    recv: &mut h2::RecvStream,
    socket: &TcpStream,
    count: &AtomicU64,
    counted: &Counted,
) -> Result<(), Fault> {
    while let Some(chunk) = recv.data().await {
        let chunk = chunk.map_err(Fault::Tunnel)?;
        let length = chunk.len();
        write_all(socket, chunk).await.map_err(Fault::Application)?;
        let before = count.fetch_add(length as u64, Ordering::Relaxed);
        if before < GROW_AFTER && before + length as u64 >= GROW_AFTER {
            counted.moves_bulk();
        }
        recv.flow_control()
            .release_capacity(length)
            .map_err(Fault::Tunnel)?;
    }
    finish(socket)
}

async fn write_all(socket: &TcpStream, mut chunk: Bytes) -> io::Result<()> {
    while chunk.has_remaining() {
        match socket.try_write(&chunk) {
            Ok(written) => chunk.advance(written),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => socket.writable().await?,
            Err(error) => return Err(error),
        }
    }
    Ok(())
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
pub async fn relay_plain(client: TcpStream, server: TcpStream, flow: &Flow) -> Result<(), Fault> {
    reset(&client);
    reset(&server);
    let both = async {
        tokio::try_join!(
            to_socket(&client, &server, &flow.received),
            to_socket(&server, &client, &flow.sent)
        )
        .map(|_| ())
    };
    let outcome = tokio::select! {
        biased;
        () = flow.until_cut() => Err(Fault::Cut),
        ended = both => ended,
    };
    if outcome.is_ok() {
        close_cleanly(&client);
        close_cleanly(&server);
    }
    outcome
}

async fn to_socket(from: &TcpStream, to: &TcpStream, count: &AtomicU64) -> Result<(), Fault> {
    loop {
        from.readable().await.map_err(Fault::Application)?;
        match read(from, READ_BYTES) {
            Ok(chunk) if chunk.is_empty() => return finish(to),
            Ok(chunk) => {
                let length = chunk.len();
                write_all(to, chunk).await.map_err(Fault::Application)?;
                count.fetch_add(length as u64, Ordering::Relaxed);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(Fault::Application(error)),
        }
    }
}
