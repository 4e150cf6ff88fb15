//! The tunnel: user connections as HTTP/2 CONNECT streams over one mutual-TLS connection.
//!
//! ```text
//! dial:   socket ─TLS─▶ HTTP/2 ─▶ Tunnel::open(Connect) ─▶ Stream ◀─relay─▶ application socket
//! accept: socket ─TLS─▶ HTTP/2 ─▶ Incoming::next ─▶ (Connect, Responder) ─accept─▶ Stream
//! ```
//! What is above sees [`Stream`]s and not the transport. Invariant: no byte of the client's reaches a
//! [`Stream`] before the responder has accepted it, and none is sent before the 200 has come.

mod ahead;
mod client;
mod meter;
mod server;
mod stream;

pub use client::{DialError, OpenError, Tunnel, dial};
pub use server::{AcceptError, Incoming, Responder, accept};
pub(crate) use stream::Counted;
pub use stream::{Peer, Stream, Watch};

use std::time::Duration;

/// Streams that one tunnel carries at once; advertised by the accepting end.
pub const MAX_STREAMS: u32 = 200;

/// Receive window of a stream at first.
pub const STREAM_WINDOW: u32 = 256 * 1024;

/// Receive window of a stream once a stream of its tunnel has moved [`GROW_AFTER`] bytes and its workload
/// has room for more.
pub const GROWN_STREAM_WINDOW: u32 = 1024 * 1024;

/// Bytes that one stream moves before its tunnel's windows grow.
pub const GROW_AFTER: u64 = 4 * 1024 * 1024;

/// Receive window of the whole tunnel: every stream may stall with a full window and the next one still
/// moves (settled D16). A promise, not memory: what a stream may buffer is bounded by its own window.
const CONNECTION_WINDOW: u32 = MAX_STREAMS * GROWN_STREAM_WINDOW;

/// Largest DATA frame. A frame is handed on once it is whole, so a larger one saves heads and costs
/// latency.
const MAX_FRAME: u32 = 64 * 1024;

/// What unread DATA frames may cost before a connection is ended. The library's default, half the
/// connection window counted at 255 bytes a frame, lets one stalled reader of small frames end a tunnel
/// that others share; flow control already bounds what a stream can hold.
const DATA_FRAME_BUDGET: usize = 256 * 1024 * 1024;

/// Streams that an accepted tunnel serves at once, those included that the peer has ended or reset and we
/// are still clearing up: a peer that resets what it has just opened gains no more work from us than this.
const MAX_SERVED: usize = 2 * MAX_STREAMS as usize;

/// Streams that an application may cancel on one tunnel, at once and a second after that; with the next one
/// the tunnel takes no new stream, and what it carries goes on. Well below what [`RESETS`] lets a peer do, so
/// that nothing open is lost to honest cancels, however late we hear of the peer's patience (F29).
const CANCELS: (u32, u32) = (500, 250);

/// Resets that a peer may send, at once and a second after that, before it is told to go elsewhere; as many
/// again, and its tunnel ends.
const RESETS: (u32, u32) = (2_000, 1_000);

/// Streams reset before they were accepted that wait to be thrown away. One turn of reading brings more than
/// a peer may serve at once, so this bounds memory alone: [`RESETS`] ends floods.
const MAX_RESET_UNACCEPTED: usize = 2 * RESETS.0 as usize + 100;

/// Streams that are remembered for a second after we have reset them: all that [`CANCELS`] allows. A frame of
/// one that is forgotten would be answered with one more reset.
const MAX_REMEMBERED_RESETS: usize = 1_000;

/// Streams that the accepting end resets of itself before it ends the tunnel (CVE-2025-8671).
const MAX_LOCAL_RESETS: usize = 10_000;

/// Bytes of decoded headers that a request may have.
const MAX_HEADER_LIST: u32 = 16 * 1024;

/// How long a peer that dialled us may take, from being accepted to the end of the TLS handshake and HTTP/2
/// preface.
pub const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(10);

/// How long we wait for the handshake of a peer whose kernel has taken the connection. Its ztunnel may be
/// away: the listener stays with its agent, and what waits there is served by the next one.
pub const DIAL_PATIENCE: Duration = Duration::from_secs(120);

/// A tunnel without an answer to a PING is asked again after this, and given up after the second.
const PING_INTERVAL: Duration = Duration::from_secs(10);
const PING_DEADLINE: Duration = Duration::from_secs(20);

/// Answers PINGs' absence: returns once the peer has not answered one in time.
async fn keep_alive(mut pings: h2::PingPong) {
    loop {
        tokio::time::sleep(PING_INTERVAL).await;
        match tokio::time::timeout(PING_DEADLINE, pings.ping(h2::Ping::opaque())).await {
            Ok(Ok(_)) => {}
            Ok(Err(_)) | Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests;
