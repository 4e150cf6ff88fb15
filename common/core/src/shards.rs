//! A map whose clones share structure.
//!
//! Entries are spread over a fixed number of shards, each behind an `Arc`. A clone copies the references;
//! a change copies only the shard it touches, and only if a clone still holds it. So a snapshot of a
//! hundred thousand workloads costs what changed since the last one. Invariant: a clone never changes.

use std::{
    borrow::Borrow,
    collections::{HashMap, hash_map::RandomState},
    hash::{BuildHasher, Hash},
    sync::Arc,
};

const SHARDS: usize = 256;

/// One piece; absent until something is in it.
type Shard<K, V> = Option<Arc<HashMap<K, V>>>;

/// A hash map in 256 shared pieces.
#[derive(Debug, Clone)]
pub struct Shards<K, V> {
    shards: Box<[Shard<K, V>]>,
    hasher: RandomState,
    len: usize,
}

impl<K, V> Default for Shards<K, V> {
    fn default() -> Self {
        Self {
            shards: (0..SHARDS).map(|_| None).collect(),
            hasher: RandomState::new(),
            len: 0,
        }
    }
}

impl<K: Hash + Eq + Clone, V: Clone> Shards<K, V> {
    fn index<Q: Hash + ?Sized>(&self, key: &Q) -> usize {
        // The upper bits: the shard's own map uses the lower ones.
        (self.hasher.hash_one(key) >> 56) as usize % SHARDS
    }

    pub fn get<Q>(&self, key: &Q) -> Option<&V>
    where
        K: Borrow<Q>,
        Q: Hash + Eq + ?Sized,
    {
        self.shards[self.index(key)].as_ref()?.get(key)
    }

    pub fn insert(&mut self, key: K, value: V) -> Option<V> {
        let index = self.index(&key);
        let shard = self.shards[index].get_or_insert_default();
        let old = Arc::make_mut(shard).insert(key, value);
        self.len += usize::from(old.is_none());
        old
    }

    pub fn remove<Q>(&mut self, key: &Q) -> Option<V>
    where
        K: Borrow<Q>,
        Q: Hash + Eq + ?Sized,
    {
        let index = self.index(key);
        let shard = self.shards[index]
            .as_mut()
            .filter(|shard| shard.contains_key(key))?;
        let old = Arc::make_mut(shard).remove(key);
        self.len -= usize::from(old.is_some());
        old
    }

    /// The value of `key`, made by `default` if absent, for changing in place.
    pub fn entry(&mut self, key: K, default: impl FnOnce() -> V) -> &mut V {
        let index = self.index(&key);
        let shard = Arc::make_mut(self.shards[index].get_or_insert_default());
        if !shard.contains_key(&key) {
            self.len += 1;
        }
        shard.entry(key).or_insert_with(default)
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub fn iter(&self) -> impl Iterator<Item = (&K, &V)> {
        self.shards.iter().flatten().flat_map(|shard| shard.iter())
    }

    pub fn values(&self) -> impl Iterator<Item = &V> {
        self.iter().map(|(_, value)| value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn it_behaves_as_a_map_and_clones_do_not_change(
            steps in proptest::collection::vec((any::<bool>(), 0u8..50, any::<u32>()), 0..200),
        ) {
            let (mut shards, mut model) = (Shards::default(), HashMap::new());
            let mut clones = vec![];
            for (insert, key, value) in steps {
                clones.push((shards.clone(), model.clone()));
                if insert {
                    prop_assert_eq!(shards.insert(key, value), model.insert(key, value));
                } else {
                    prop_assert_eq!(shards.remove(&key), model.remove(&key));
                }
                prop_assert_eq!(shards.len(), model.len());
            }
            clones.push((shards, model));
            for (shards, model) in clones {
                let all: HashMap<u8, u32> = shards.iter().map(|(k, v)| (*k, *v)).collect();
                prop_assert_eq!(all, model);
            }
        }
    }
}
