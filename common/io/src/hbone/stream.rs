//! One user connection inside a tunnel.

use super::{
    CANCELS,
    meter::{Bucket, Side},
};
use crate::{
    budget::{Account, Budget, Charge},
    tls::{LeafError, leaf_expiry, leaf_identity},
};
use bytes::Bytes;
use culvert_core::ids::SpiffeId;
use futures::task::AtomicWaker;
use h2::{Reason, RecvStream, SendStream};
use parking_lot::Mutex;
use rustls_pki_types::CertificateDer;
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

/// What the streams of a tunnel and its driver tell each other.
#[derive(Debug)]
pub(super) struct Shared {
    /// A stream has moved enough for the windows to grow.
    pub grow: AtomicBool,
    pub driver: AtomicWaker,
    pub streams: AtomicUsize,
    pub closed: AtomicBool,
    /// Takes no new stream; what is open goes on.
    pub retired: AtomicBool,
    /// Ends now, with all of its streams.
    pub cut: AtomicBool,
    /// What is left of the streams that we may cancel; the accepting end may cancel all.
    cancels: Option<Mutex<Bucket>>,
    account: Arc<Account>,
}

impl Shared {
    pub fn new(budget: &Arc<Budget>, own: Side) -> Arc<Self> {
        let cancels = match own {
            Side::Client => Some(Mutex::new(Bucket::new(CANCELS, Instant::now()))),
            Side::Server => None,
        };
        Arc::new(Self {
            grow: AtomicBool::new(false),
            driver: AtomicWaker::new(),
            streams: AtomicUsize::new(0),
            closed: AtomicBool::new(false),
            retired: AtomicBool::new(false),
            cut: AtomicBool::new(false),
            cancels,
            account: Account::new(budget),
        })
    }

    /// A stream was reset by this end: one too many, and the next one is opened elsewhere.
    fn cancelled(&self) {
        if let Some(cancels) = &self.cancels
            && !cancels.lock().take(Instant::now)
        {
            self.retired.store(true, Ordering::Relaxed);
        }
    }

    /// Whether the tunnel's windows shall grow, and its workload has room for what they promise.
    pub fn may_grow(&self) -> bool {
        self.grow.load(Ordering::Relaxed) && !self.account.is_pressed()
    }
}

/// Says that the tunnel is closed, however it ends.
#[derive(Debug)]
pub(super) struct CloseOnDrop(pub Arc<Shared>);

impl Drop for CloseOnDrop {
    fn drop(&mut self) {
        self.0.closed.store(true, Ordering::Relaxed);
    }
}

/// Who is at the other end, as its certificate has proved.
#[derive(Debug, Clone)]
pub struct Peer {
    pub id: SpiffeId,
    /// When its leaf ends.
    pub not_after: SystemTime,
    /// Its chain, leaf first: to be judged again by newer bundles.
    pub chain: Arc<[CertificateDer<'static>]>,
}

impl Peer {
    pub(super) fn of(chain: Option<&[CertificateDer<'static>]>) -> Result<Self, LeafError> {
        let chain = chain.unwrap_or_default();
        let leaf = chain.first().ok_or(LeafError::NoName)?;
        Ok(Self {
            id: leaf_identity(leaf)?,
            not_after: leaf_expiry(leaf)?,
            chain: chain.into(),
        })
    }
}

/// A view of a tunnel that does not keep it open, and the means to end it.
#[derive(Debug, Clone)]
pub struct Watch {
    pub(super) shared: Arc<Shared>,
    pub peer: Peer,
}

impl Watch {
    pub fn is_closed(&self) -> bool {
        self.shared.closed.load(Ordering::Relaxed)
    }

    /// Streams open now.
    pub fn streams(&self) -> usize {
        self.shared.streams.load(Ordering::Relaxed)
    }

    /// The accepting end asks its peer to open streams elsewhere (GOAWAY); the dialling end needs no asking.
    pub fn retire(&self) {
        if !self.shared.retired.swap(true, Ordering::Relaxed) {
            self.shared.driver.wake();
        }
    }

    /// Ends the tunnel at once: its streams are reset.
    pub fn cut(&self) {
        if !self.shared.cut.swap(true, Ordering::Relaxed) {
            self.shared.driver.wake();
        }
    }
}

/// How often who waits for room looks again.
const ROOM_EVERY: Duration = Duration::from_millis(5);

/// Counts a stream for as long as it lives. Unless told otherwise it ends with a reset of ours.
#[derive(Debug)]
pub(crate) struct Counted {
    shared: Arc<Shared>,
    closed: bool,
}

impl Counted {
    /// It has ended, and no reset of ours was needed for that.
    pub fn closed(&mut self) {
        self.closed = true;
    }

    /// Lets the tunnel's windows grow: this stream moves bulk.
    pub fn moves_bulk(&self) {
        if !self.shared.grow.swap(true, Ordering::Relaxed) {
            self.shared.driver.wake();
        }
    }

    /// Waits until the tunnel may buffer more: until then the application's bytes stay in the kernel.
    pub async fn room(&self) {
        while !self.has_room() {
            Box::pin(tokio::time::sleep(ROOM_EVERY)).await;
        }
    }

    pub fn has_room(&self) -> bool {
        self.shared.account.has_room()
    }

    pub fn may_begin(&self) -> bool {
        self.shared.account.may_begin()
    }

    /// The chunk, charged to its workload until it has left.
    pub fn charged(&self, chunk: Bytes) -> Bytes {
        if chunk.is_empty() {
            return chunk;
        }
        let charge = self.charge(chunk.len());
        Bytes::from_owner(Charged {
            chunk,
            _charge: charge,
        })
    }

    pub fn charge(&self, bytes: usize) -> Charge {
        Charge::new(&self.shared.account, bytes)
    }

    pub(super) fn new(shared: &Arc<Shared>) -> Self {
        shared.streams.fetch_add(1, Ordering::Relaxed);
        Self {
            shared: shared.clone(),
            closed: false,
        }
    }
}

struct Charged {
    chunk: Bytes,
    _charge: Charge,
}

impl AsRef<[u8]> for Charged {
    fn as_ref(&self) -> &[u8] {
        &self.chunk
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.shared.streams.fetch_sub(1, Ordering::Relaxed);
        if !self.closed {
            self.shared.cancelled();
        }
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
