//! What every node has taken: the lowest number of a world that all open streams have acknowledged.
//!
//! ```text
//!                 first request          ended                 30 s
//! expected ─────▶ counts, as it ACKs ───────▶ gone: its last number ─────▶ not waited for
//! ```
//! Invariant: a stream counts from its first request for workloads until it ends, and a node that has none left for
//! `PATIENCE` longer, because it goes on serving what it took last. After control's own start every node that it
//! served before is expected for so long.

use parking_lot::Mutex;
use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::watch;

/// How long a node that is gone is waited for. It holds those up that are on their way into the mesh or out of it,
/// and one that never comes back must not do so for ever.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// How long what a node has routed by an older world may be under way: a lost SYN costs a second.
const ARRIVES: Duration = Duration::from_secs(1);

/// Streams of one node at once: its ztunnel's, its successor's, and what of theirs has broken and is not noticed yet.
const MAX_STREAMS: usize = 8;

/// Of all streams. Clones share.
#[derive(Clone)]
pub struct Acks(Arc<Inner>);

struct Inner {
    nodes: Mutex<Nodes>,
    lowest: watch::Sender<u64>,
}

#[derive(Default)]
struct Nodes {
    next: u64,
    /// What each open stream has taken; none before it has asked for workloads.
    streams: HashMap<String, BTreeMap<u64, Option<u64>>>,
    /// What a node without a stream took last, and until when it is waited for.
    gone: HashMap<String, (u64, Instant)>,
    /// How many of both have taken which number.
    counts: BTreeMap<u64, usize>,
}

impl Default for Acks {
    fn default() -> Self {
        Self(Arc::new(Inner {
            nodes: Mutex::default(),
            lowest: watch::Sender::new(u64::MAX),
        }))
    }
}

/// One stream's place; it is given up when dropped.
pub struct Entry {
    acks: Acks,
    node: String,
    stream: u64,
}

impl Acks {
    /// A place for a stream of `node`, unless it has too many.
    pub fn enter(&self, node: &str) -> Option<Entry> {
        let mut nodes = self.0.nodes.lock();
        nodes.next += 1;
        let stream = nodes.next;
        let own = nodes.streams.entry(node.to_owned()).or_default();
        if own.len() >= MAX_STREAMS {
            return None;
        }
        own.insert(stream, None);
        Some(Entry {
            acks: self.clone(),
            node: node.to_owned(),
            stream,
        })
    }

    /// Waits for nodes that were served before this process: what they have taken is not known.
    pub fn expect(&self, nodes: impl IntoIterator<Item = String>, now: Instant) {
        self.change(|all| {
            for node in nodes {
                all.leave(node, 0, now + PATIENCE);
            }
        });
    }

    /// Gives up on nodes that are gone for too long, and names them.
    pub fn give_up(&self, now: Instant) -> Vec<String> {
        self.change(|nodes| {
            let late = nodes.gone.iter().filter(|(_, (_, until))| *until <= now);
            let late: Vec<String> = late.map(|(node, _)| node.clone()).collect();
            for node in &late {
                nodes.come_back(node);
            }
            late
        })
    }

    /// Tells when every stream has taken more; the highest number while there is none.
    pub fn lowest(&self) -> watch::Receiver<u64> {
        self.0.lowest.subscribe()
    }

    fn change<T>(&self, change: impl FnOnce(&mut Nodes) -> T) -> T {
        let mut nodes = self.0.nodes.lock();
        let outcome = change(&mut nodes);
        let lowest = nodes.counts.keys().next().copied().unwrap_or(u64::MAX);
        // Under the lock, so that an older value never overtakes a newer one.
        self.0
            .lowest
            .send_if_modified(|now| std::mem::replace(now, lowest) != lowest);
        outcome
    }
}

impl Nodes {
    fn count(&mut self, number: u64) {
        *self.counts.entry(number).or_default() += 1;
    }

    fn discount(&mut self, number: u64) {
        let count = self.counts.entry(number).or_default();
        *count = count.saturating_sub(1);
        if *count == 0 {
            self.counts.remove(&number);
        }
    }

    fn leave(&mut self, node: String, number: u64, until: Instant) {
        self.come_back(&node);
        self.gone.insert(node, (number, until));
        self.count(number);
    }

    fn come_back(&mut self, node: &str) {
        if let Some((number, _)) = self.gone.remove(node) {
            self.discount(number);
        }
    }
}

impl Entry {
    /// The stream has everything up to this world.
    pub fn taken(&self, number: u64) {
        self.acks.change(|nodes| {
            let own = nodes.streams.entry(self.node.clone()).or_default();
            let before = own.insert(self.stream, Some(number)).flatten();
            nodes.count(number);
            if let Some(before) = before {
                nodes.discount(before);
            }
            nodes.come_back(&self.node);
        });
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.acks.change(|nodes| {
            let own = nodes.streams.entry(self.node.clone()).or_default();
            let taken = own.remove(&self.stream).flatten();
            let others = own.values().any(Option::is_some);
            if own.is_empty() {
                nodes.streams.remove(&self.node);
            }
            if let Some(taken) = taken {
                nodes.discount(taken);
                if !others {
                    nodes.leave(self.node.clone(), taken, Instant::now() + PATIENCE);
                }
            }
        });
    }
}

/// What every node has taken for at least `ARRIVES`.
#[derive(Debug, Default)]
pub struct Settled {
    number: u64,
    /// What it is going to be, since when.
    rising: Option<(u64, Instant)>,
}

impl Settled {
    /// Every node has taken `taken` now.
    pub fn advance(&mut self, taken: u64, now: Instant) -> u64 {
        if let Some((number, since)) = self.rising
            && since + ARRIVES <= now
        {
            self.number = number;
            self.rising = None;
        }
        // A node that has come back knows less than all knew before.
        self.number = self.number.min(taken);
        match self.rising {
            Some((number, _)) if number <= taken => {}
            _ => self.rising = (taken > self.number).then_some((taken, now)),
        }
        self.number
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slowest_node_counts_and_one_that_is_gone_counts_for_a_while() {
        let acks = Acks::default();
        let lowest = acks.lowest();
        assert_eq!(*lowest.borrow(), u64::MAX, "nobody is waited for");
        let (fast, slow) = (acks.enter("a").unwrap(), acks.enter("b").unwrap());
        slow.taken(0);
        fast.taken(7);
        assert_eq!(*lowest.borrow(), 0);
        slow.taken(5);
        fast.taken(9);
        assert_eq!(*lowest.borrow(), 5);
        drop(slow);
        assert_eq!(*lowest.borrow(), 5, "it still serves what it took");
        let later = Instant::now() + PATIENCE;
        assert_eq!(acks.give_up(later - PATIENCE), Vec::<String>::new());
        assert_eq!(acks.give_up(later), ["b"]);
        assert_eq!(*lowest.borrow(), 9);
    }

    #[test]
    fn a_node_that_comes_back_is_asked_again_and_one_with_another_stream_is_not_gone() {
        let acks = Acks::default();
        let lowest = acks.lowest();
        let old = acks.enter("a").unwrap();
        old.taken(5);
        let successor = acks.enter("a").unwrap();
        assert_eq!(*lowest.borrow(), 5, "it has asked for nothing yet");
        successor.taken(8);
        drop(old);
        assert_eq!(*lowest.borrow(), 8);
        drop(successor);
        assert_eq!(*lowest.borrow(), 8);
        let again = acks.enter("a").unwrap();
        again.taken(9);
        assert_eq!(*lowest.borrow(), 9);
    }

    #[test]
    fn nodes_that_an_earlier_process_has_served_are_waited_for() {
        let acks = Acks::default();
        let (lowest, now) = (acks.lowest(), Instant::now());
        acks.expect(["a".to_owned(), "b".to_owned()], now);
        let a = acks.enter("a").unwrap();
        a.taken(7);
        assert_eq!(*lowest.borrow(), 0, "b has not come yet");
        assert_eq!(acks.give_up(now + PATIENCE), ["b"]);
        assert_eq!(*lowest.borrow(), 7);
    }

    #[test]
    fn what_is_taken_settles_after_a_while_and_what_is_lost_counts_at_once() {
        let mut settled = Settled::default();
        let start = Instant::now();
        for (millis, taken, want) in [
            (0, 7, 0),
            (900, 8, 0),
            (1000, 9, 7),
            (1900, 9, 7),
            (2000, 9, 9),
            (2100, 20, 9),
            (2200, 3, 3),
            (2300, 20, 3),
            (3200, 20, 3),
            (3300, 20, 20),
        ] {
            let now = start + Duration::from_millis(millis);
            assert_eq!(settled.advance(taken, now), want, "at {millis} ms");
        }
    }

    #[test]
    fn t52_a_node_has_streams_without_number_only_one_after_the_other() {
        let acks = Acks::default();
        let open: Vec<Entry> = (0..MAX_STREAMS).map(|_| acks.enter("a").unwrap()).collect();
        assert!(acks.enter("a").is_none());
        assert!(acks.enter("b").is_some(), "another node has its own");
        drop(open);
        assert!(acks.enter("a").is_some());
    }
}
