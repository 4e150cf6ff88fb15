//! What the stream to control has carried, for metrics.

use super::decode::TYPES;
use parking_lot::Mutex;
use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant, SystemTime},
};

/// How a stream ended, in the field's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Termination {
    /// It did not come up.
    ConnectionError,
    /// It broke, or control ended it with an error.
    Error,
    /// Control ended it in order.
    Complete,
}

impl Termination {
    pub const ALL: [Self; 3] = [Self::ConnectionError, Self::Error, Self::Complete];

    pub fn word(self) -> &'static str {
        match self {
            Self::ConnectionError => "ConnectionError",
            Self::Error => "Error",
            Self::Complete => "Complete",
        }
    }
}

/// Counters of one type.
#[derive(Debug, Default)]
struct Of {
    messages: AtomicU64,
    bytes: AtomicU64,
    refused: AtomicU64,
}

/// Counters and states of the stream.
pub struct Stats {
    types: [Of; TYPES.len()],
    ended: [AtomicU64; Termination::ALL.len()],
    link: Mutex<Link>,
}

struct Link {
    up: bool,
    /// When control was last known to agree with what is known here.
    confirmed: Instant,
    /// When control published the latest change that it has pushed.
    published: Option<SystemTime>,
}

/// What was counted of one type of resource.
pub struct Carried {
    pub url: &'static str,
    pub messages: u64,
    pub bytes: u64,
    pub refused: u64,
}

impl Default for Stats {
    fn default() -> Self {
        Self {
            types: Default::default(),
            ended: Default::default(),
            link: Mutex::new(Link {
                up: false,
                confirmed: Instant::now(),
                published: None,
            }),
        }
    }
}

impl Stats {
    /// By type of resource.
    pub fn carried(&self) -> impl Iterator<Item = Carried> {
        TYPES.into_iter().zip(&self.types).map(|(url, of)| Carried {
            url,
            messages: of.messages.load(Ordering::Relaxed),
            bytes: of.bytes.load(Ordering::Relaxed),
            refused: of.refused.load(Ordering::Relaxed),
        })
    }

    /// Streams that ended, by how.
    pub fn ended(&self, how: Termination) -> u64 {
        self.ended[how as usize].load(Ordering::Relaxed)
    }

    /// Whether the stream to control is up.
    pub fn is_up(&self) -> bool {
        self.link.lock().up
    }

    /// How old what is known may be: nothing while the stream is up, whose end keep-alives tell within 20 s;
    /// after that, the time since it ended.
    pub fn age(&self) -> Duration {
        let link = self.link.lock();
        if link.up {
            Duration::ZERO
        } else {
            link.confirmed.elapsed()
        }
    }

    /// When control published the latest change that it pushed, once for each such change.
    pub fn take_published(&self) -> Option<SystemTime> {
        self.link.lock().published.take()
    }

    pub(super) fn pushed(&self, published: SystemTime) {
        self.link.lock().published = Some(published);
    }

    pub(super) fn came_up(&self) {
        self.link.lock().up = true;
    }

    pub(super) fn went_down(&self, how: Termination) {
        self.ended[how as usize].fetch_add(1, Ordering::Relaxed);
        let mut link = self.link.lock();
        if link.up {
            link.up = false;
            link.confirmed = Instant::now();
        }
    }

    pub(super) fn arrived(&self, url: &str, bytes: u64) {
        if let Some(of) = self.of(url) {
            of.messages.fetch_add(1, Ordering::Relaxed);
            of.bytes.fetch_add(bytes, Ordering::Relaxed);
        }
    }

    pub(super) fn refused(&self, url: &str) {
        if let Some(of) = self.of(url) {
            of.refused.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn of(&self, url: &str) -> Option<&Of> {
        let index = TYPES.iter().position(|known| *known == url)?;
        self.types.get(index)
    }
}
