//! Room that many share and nobody fills.
//!
//! ```text
//! who comes ──enter──▶ Place (held) | None: its share is taken
//! ```
//! A group may hold as much as is left free: the first half of all there is, the next half of the rest, so
//! that whoever comes new finds something. Nothing is reserved and nobody is counted in advance (dynamic
//! thresholds, as in `culvert_io::budget`).
//!
//! Invariant: a place is given back by being dropped.

use parking_lot::Mutex;
use std::{
    collections::{HashMap, hash_map::Entry},
    hash::Hash,
    sync::Arc,
};

/// Room for things of groups `K`: of pods, or of addresses.
pub struct Room<K> {
    limit: usize,
    held: Mutex<Held<K>>,
}

struct Held<K> {
    all: usize,
    by: HashMap<K, usize>,
}

impl<K: Eq + Hash + Clone> Room<K> {
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self {
            limit,
            held: Mutex::new(Held {
                all: 0,
                by: HashMap::new(),
            }),
        })
    }

    /// A place for one more of `who`, unless it has its share.
    pub fn enter(self: &Arc<Self>, who: &K) -> Option<Place<K>> {
        let mut held = self.held.lock();
        let free = self.limit.saturating_sub(held.all);
        if held.by.get(who).copied().unwrap_or(0) >= free {
            return None;
        }
        held.all += 1;
        *held.by.entry(who.clone()).or_default() += 1;
        Some(Place {
            room: self.clone(),
            who: who.clone(),
        })
    }

    pub fn held(&self) -> usize {
        self.held.lock().all
    }
}

/// A place in a room, until dropped.
pub struct Place<K: Eq + Hash + Clone> {
    room: Arc<Room<K>>,
    who: K,
}

impl<K: Eq + Hash + Clone> Drop for Place<K> {
    fn drop(&mut self) {
        let mut held = self.room.held.lock();
        held.all -= 1;
        if let Entry::Occupied(mut own) = held.by.entry(self.who.clone()) {
            *own.get_mut() -= 1;
            if *own.get() == 0 {
                own.remove();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tr8_f26_nobody_takes_all_and_the_next_finds_a_place() {
        let room = Room::new(100);
        let take = |who| {
            std::iter::from_fn(|| room.enter(&who))
                .take(1_000)
                .collect::<Vec<_>>()
        };
        let greedy = take("greedy");
        assert_eq!(greedy.len(), 50);
        let second = take("second");
        assert_eq!(second.len(), 25);
        let many: Vec<_> = ["c", "d", "e"].map(take).into();
        assert!(many.iter().all(|places| !places.is_empty()));
        assert!(room.held() < 100);
        drop(greedy);
        assert!(
            room.enter(&"second").is_some(),
            "what is given back is free for others"
        );
        drop((second, many));
        assert_eq!(room.held(), 0);
        assert_eq!(room.held.lock().by.len(), 0);
    }

    #[test]
    fn a_room_for_one_lets_one_in() {
        let room = Room::new(1);
        let place = room.enter(&1);
        assert!(place.is_some() && room.enter(&2).is_none());
        drop(place);
        assert!(room.enter(&2).is_some());
        assert!(Room::new(0).enter(&1).is_none());
    }
}
