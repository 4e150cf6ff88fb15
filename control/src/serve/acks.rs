//! What every node has taken: the lowest number of a world that all open streams have acknowledged.
//!
//! Invariant: a stream counts from its first request for workloads until it ends; one that is gone is not waited for.

use parking_lot::Mutex;
use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};
use tokio::sync::watch;

/// Of all streams. Clones share.
#[derive(Clone)]
pub struct Acks(Arc<Inner>);

struct Inner {
    streams: Mutex<Streams>,
    lowest: watch::Sender<u64>,
}

#[derive(Default)]
struct Streams {
    next: u64,
    taken: HashMap<u64, u64>,
    /// How many streams have taken which number.
    counts: BTreeMap<u64, usize>,
}

impl Default for Acks {
    fn default() -> Self {
        Self(Arc::new(Inner {
            streams: Mutex::default(),
            lowest: watch::Sender::new(u64::MAX),
        }))
    }
}

/// One stream's place; it is given up when dropped.
pub struct Entry {
    acks: Acks,
    stream: u64,
}

impl Acks {
    pub fn enter(&self) -> Entry {
        let mut streams = self.0.streams.lock();
        streams.next += 1;
        Entry {
            acks: self.clone(),
            stream: streams.next,
        }
    }

    /// Tells when every stream has taken more; the highest number while there is none.
    pub fn lowest(&self) -> watch::Receiver<u64> {
        self.0.lowest.subscribe()
    }

    fn set(&self, stream: u64, number: Option<u64>) {
        let mut streams = self.0.streams.lock();
        let before = match number {
            Some(number) => streams.taken.insert(stream, number),
            None => streams.taken.remove(&stream),
        };
        if before == number {
            return;
        }
        if let Some(number) = number {
            *streams.counts.entry(number).or_default() += 1;
        }
        if let Some(before) = before {
            let count = streams.counts.entry(before).or_default();
            *count -= 1;
            if *count == 0 {
                streams.counts.remove(&before);
            }
        }
        let lowest = streams.counts.keys().next().copied().unwrap_or(u64::MAX);
        // Under the lock, so that an older value never overtakes a newer one.
        self.0
            .lowest
            .send_if_modified(|now| std::mem::replace(now, lowest) != lowest);
    }
}

impl Entry {
    /// The stream has everything up to this world.
    pub fn taken(&self, number: u64) {
        self.acks.set(self.stream, Some(number));
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.acks.set(self.stream, None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slowest_open_stream_counts_and_one_that_is_gone_does_not() {
        let acks = Acks::default();
        let lowest = acks.lowest();
        assert_eq!(*lowest.borrow(), u64::MAX, "nobody is waited for");
        let (fast, slow) = (acks.enter(), acks.enter());
        slow.taken(0);
        fast.taken(7);
        assert_eq!(*lowest.borrow(), 0);
        slow.taken(5);
        fast.taken(9);
        assert_eq!(*lowest.borrow(), 5);
        drop(slow);
        assert_eq!(*lowest.borrow(), 9);
        drop(fast);
        assert_eq!(*lowest.borrow(), u64::MAX);
    }
}
