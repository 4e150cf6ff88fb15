//! What a peer's frames cost us, counted before the HTTP/2 engine sees them.
//!
//! ```text
//! TLS ──plaintext──▶ Metered: frame heads ──▶ Meter ──▶ Verdict ──▶ the tunnel's driver
//!                       └──────── the bytes, unchanged ────────▶ h2
//! ```
//! The engine bounds memory; it does not bound work: PINGs, SETTINGS, window updates, frames without
//! payload and streams that are reset as soon as they are open are answered for as long as they come.
//! Invariant: an honest peer, however busy, never spends a budget; who does is told to calm down and
//! loses this one tunnel. Nothing is read of frames but their heads.

use super::RESETS;
use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
    task::{Context, Poll},
    time::Instant,
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Bytes that one poll of a tunnel's driver takes from its peer before other tasks of the thread have
/// their turn: opening as many takes a fraction of a millisecond.
const TURN: usize = 256 * 1024;

/// Length of the client's preface, which is no frame (RFC 9113 §3.4).
const PREFACE: usize = 24;

const HEAD: usize = 9;

/// What shall become of the tunnel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    Calm,
    /// No new streams on this one; those that are open go on.
    Drain,
    /// At once.
    End,
}

/// Whether the peer began the tunnel: only then may it begin streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    Client,
    Server,
}

/// A kind of frame that costs more than it carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Headers,
    Reset,
    /// DATA without payload or end.
    Empty,
    WindowUpdate,
    /// PING, SETTINGS, PRIORITY and what is not known.
    Control,
}

/// So many at once, and so many a second after that.
#[derive(Debug)]
pub(super) struct Bucket {
    left: u32,
    burst: u32,
    per_second: u32,
    /// When `left` was last filled.
    filled: Instant,
}

impl Bucket {
    pub fn new((burst, per_second): (u32, u32), now: Instant) -> Self {
        Self {
            left: burst,
            burst,
            per_second,
            filled: now,
        }
    }

    /// The clock is looked at only when the bucket is empty.
    pub fn take(&mut self, now: impl Fn() -> Instant) -> bool {
        if self.left == 0 {
            let now = now();
            let earned = now.duration_since(self.filled).as_secs_f64() * f64::from(self.per_second);
            if earned < 1.0 {
                return false;
            }
            // A float that is too large becomes the largest number there is.
            self.left = (earned as u32).min(self.burst);
            self.filled = now;
        }
        self.left -= 1;
        true
    }
}

/// Counts frames in a stream of bytes that is cut anywhere.
#[derive(Debug)]
struct Meter {
    /// Bytes that are no head: of the preface, or of a payload.
    skip: usize,
    head: [u8; HEAD],
    have: usize,
    headers: Bucket,
    resets: Bucket,
    empty: Bucket,
    window_updates: Bucket,
    control: Bucket,
    verdict: Verdict,
}

impl Meter {
    /// For what `peer` sends.
    fn new(peer: Side, now: Instant) -> Self {
        // A server resets and answers only what we have asked for.
        let (headers, resets) = match peer {
            Side::Client => ((40_000, 20_000), RESETS),
            Side::Server => ((u32::MAX, u32::MAX), (u32::MAX, u32::MAX)),
        };
        Self {
            skip: if peer == Side::Client { PREFACE } else { 0 },
            head: [0; HEAD],
            have: 0,
            headers: Bucket::new(headers, now),
            resets: Bucket::new(resets, now),
            empty: Bucket::new((200, 20), now),
            window_updates: Bucket::new((100_000, 50_000), now),
            control: Bucket::new((1_000, 100), now),
            verdict: Verdict::Calm,
        }
    }

    fn feed(&mut self, mut bytes: &[u8], now: impl Fn() -> Instant) -> Verdict {
        loop {
            let skipped = self.skip.min(bytes.len());
            self.skip -= skipped;
            bytes = &bytes[skipped..];
            if bytes.is_empty() {
                return self.verdict;
            }
            let taken = (HEAD - self.have).min(bytes.len());
            self.head[self.have..self.have + taken].copy_from_slice(&bytes[..taken]);
            self.have += taken;
            bytes = &bytes[taken..];
            if self.have == HEAD {
                self.have = 0;
                self.frame(&now);
            }
        }
    }

    fn frame(&mut self, now: impl Fn() -> Instant) {
        let [high, middle, low, kind, flags, ..] = self.head;
        let length = usize::from(high) << 16 | usize::from(middle) << 8 | usize::from(low);
        self.skip = length;
        let kind = match (kind, flags & 1) {
            (0, 0) if length == 0 => Kind::Empty,
            (0, _) => return,
            (1, _) => Kind::Headers,
            (3, _) => Kind::Reset,
            // What answers ours.
            (4 | 6, 1) => return,
            // The last word, and parts of a header list, which the engine bounds.
            (7 | 9, _) => return,
            (8, _) => Kind::WindowUpdate,
            _ => Kind::Control,
        };
        self.count(kind, now);
    }

    fn count(&mut self, kind: Kind, now: impl Fn() -> Instant) {
        let bucket = match kind {
            Kind::Headers => &mut self.headers,
            Kind::Reset => &mut self.resets,
            Kind::Empty => &mut self.empty,
            Kind::WindowUpdate => &mut self.window_updates,
            Kind::Control => &mut self.control,
        };
        if bucket.take(now) {
            return;
        }
        match (kind, self.verdict) {
            // An application that cancels a lot is served on another tunnel, and this one winds down with what
            // is open on it; a peer that goes on here does not mean to.
            (Kind::Headers | Kind::Reset, Verdict::Calm) => {
                bucket.left = bucket.burst;
                self.verdict = Verdict::Drain;
            }
            _ => self.verdict = Verdict::End,
        }
    }
}

/// The verdict as the tunnel's driver sees it.
#[derive(Debug, Clone)]
pub struct Notice(Arc<AtomicU8>);

impl Notice {
    pub fn verdict(&self) -> Verdict {
        match self.0.load(Ordering::Relaxed) {
            0 => Verdict::Calm,
            1 => Verdict::Drain,
            _ => Verdict::End,
        }
    }
}

/// A TLS stream whose peer's frames are counted.
#[derive(Debug)]
pub struct Metered<IO> {
    io: IO,
    meter: Meter,
    notice: Notice,
    /// Bytes taken in this turn.
    taken: usize,
}

impl<IO> Metered<IO> {
    pub fn new(io: IO, peer: Side) -> (Self, Notice) {
        let notice = Notice(Arc::default());
        let metered = Self {
            io,
            meter: Meter::new(peer, Instant::now()),
            notice: notice.clone(),
            taken: 0,
        };
        (metered, notice)
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for Metered<IO> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.meter.verdict == Verdict::End {
            // The driver sees the verdict after this poll, and ends the tunnel.
            return Poll::Pending;
        }
        if this.taken >= TURN {
            this.taken = 0;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let before = buf.filled().len();
        let polled = Pin::new(&mut this.io).poll_read(cx, buf);
        if polled.is_pending() {
            this.taken = 0;
            return polled;
        }
        let read = &buf.filled()[before..];
        this.taken += read.len();
        let verdict = this.meter.feed(read, Instant::now);
        this.notice.0.store(verdict as u8, Ordering::Relaxed);
        polled
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for Metered<IO> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn frame(kind: u8, flags: u8, payload: usize) -> Vec<u8> {
        let mut bytes = vec![0, (payload >> 8) as u8, payload as u8, kind, flags, 0, 0, 0, 1];
        bytes.resize(HEAD + payload, 0xff);
        bytes
    }

    /// The verdict on `count` frames that all come at once.
    fn on(count: usize, frame: &[u8]) -> Verdict {
        let now = Instant::now();
        let mut meter = Meter::new(Side::Client, now);
        meter.feed(&[0; PREFACE], || now);
        for _ in 0..count {
            meter.feed(frame, || now);
        }
        meter.verdict
    }

    #[test]
    fn f27_floods_are_told_from_work() {
        use Verdict::{Calm, Drain, End};
        for (case, frame, count, want) in [
            ("pings", frame(6, 0, 8), 1_000, Calm),
            ("more pings", frame(6, 0, 8), 1_001, End),
            ("answers to ours", frame(6, 1, 8), 100_000, Calm),
            ("settings", frame(4, 0, 6), 1_001, End),
            ("acknowledged settings", frame(4, 1, 0), 100_000, Calm),
            ("priorities", frame(2, 0, 5), 1_001, End),
            ("unknown frames", frame(0x42, 0, 100), 1_001, End),
            ("empty data", frame(0, 0, 0), 201, End),
            ("ends", frame(0, 1, 0), 100_000, Calm),
            ("data", frame(0, 0, 1), 100_000, Calm),
            ("window updates", frame(8, 0, 4), 100_000, Calm),
            ("a flood of window updates", frame(8, 0, 4), 100_001, End),
            ("resets", frame(3, 0, 4), 2_000, Calm),
            ("many resets", frame(3, 0, 4), 2_001, Drain),
            ("resets on and on", frame(3, 0, 4), 4_002, End),
            ("requests", frame(1, 5, 40), 40_001, Drain),
        ] {
            assert_eq!(on(count, &frame), want, "{count} {case}");
        }
    }

    #[test]
    fn heads_are_found_however_the_bytes_are_cut() {
        let mut bytes = vec![b'P'; PREFACE];
        for _ in 0..1_001 {
            bytes.extend(frame(0, 0, 300));
            bytes.extend(frame(6, 0, 8));
        }
        for cut in [1, 2, 7, 9, 10, 24, 333, 5_000] {
            let now = Instant::now();
            let mut meter = Meter::new(Side::Client, now);
            for chunk in bytes[..bytes.len() - 1].chunks(cut) {
                meter.feed(chunk, || now);
            }
            assert_eq!(meter.control.left, 0, "chunks of {cut}");
            assert_eq!(meter.verdict, Verdict::End, "chunks of {cut}");
        }
    }

    #[test]
    fn a_budget_comes_back_with_time() {
        let start = Instant::now();
        let mut meter = Meter::new(Side::Client, start);
        meter.feed(&[0; PREFACE], || start);
        let ping = frame(6, 0, 8);
        for second in 0..20 {
            for _ in 0..99 {
                meter.feed(&ping, || start + Duration::from_secs(second));
            }
        }
        assert_eq!(meter.verdict, Verdict::Calm, "99 pings a second");
    }
}
