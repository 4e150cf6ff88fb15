//! One user connection inside a tunnel.

use bytes::Bytes;
use futures::task::AtomicWaker;
use h2::{Reason, RecvStream, SendStream};
use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

/// What the streams of a tunnel and its driver tell each other.
#[derive(Debug, Default)]
pub(super) struct Shared {
    /// A stream has moved enough for the windows to grow.
    pub grow: AtomicBool,
    pub driver: AtomicWaker,
    pub streams: AtomicUsize,
    pub closed: AtomicBool,
}

/// Counts a stream for as long as it lives.
#[derive(Debug)]
pub(crate) struct Counted(Arc<Shared>);

impl Counted {
    /// Lets the tunnel's windows grow: this stream moves bulk.
    pub fn moves_bulk(&self) {
        if !self.0.grow.swap(true, Ordering::Relaxed) {
            self.0.driver.wake();
        }
    }

    pub(super) fn new(shared: &Arc<Shared>) -> Self {
        shared.streams.fetch_add(1, Ordering::Relaxed);
        Self(shared.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.streams.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A stream in both directions. Dropped before its ends are sent, the peer sees a reset.
#[derive(Debug)]
pub struct Stream {
    pub(crate) send: SendStream<Bytes>,
    pub(crate) recv: RecvStream,
    pub(crate) counted: Counted,
}

impl Stream {
    pub(super) fn new(send: SendStream<Bytes>, recv: RecvStream, counted: Counted) -> Self {
        Self { send, recv, counted }
    }

    /// Ends both directions with `CONNECT_ERROR`: the application's own connection was reset
    /// (RFC 9113 §8.5).
    pub fn reset(mut self) {
        self.send.send_reset(Reason::CONNECT_ERROR);
    }
}
