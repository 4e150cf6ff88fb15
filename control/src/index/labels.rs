//! Who carries which labels, and which selectors may match them.
//!
//! Both sides are found by one label: members by each that they carry, selectors by one that they ask for.
//! Invariant: what is found is a superset of what matches; the caller compares the whole selector.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    hash::Hash,
};

type Labels = BTreeMap<String, String>;

/// A label within a namespace.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Pair {
    namespace: String,
    name: String,
    value: String,
}

impl Pair {
    fn of(namespace: &str, (name, value): (&String, &String)) -> Self {
        Self {
            namespace: namespace.to_owned(),
            name: name.clone(),
            value: value.clone(),
        }
    }
}

/// Whether every label that a selector asks for is there.
pub fn matches(selector: &Labels, labels: &Labels) -> bool {
    selector
        .iter()
        .all(|(name, value)| labels.get(name) == Some(value))
}

/// Things that carry labels.
#[derive(Debug)]
pub struct Members<T> {
    by_pair: HashMap<Pair, BTreeSet<T>>,
    by_namespace: BTreeMap<String, BTreeSet<T>>,
}

impl<T> Default for Members<T> {
    fn default() -> Self {
        Self {
            by_pair: HashMap::new(),
            by_namespace: BTreeMap::new(),
        }
    }
}

impl<T: Ord + Clone> Members<T> {
    pub fn insert(&mut self, namespace: &str, labels: &Labels, member: &T) {
        for label in labels {
            let pair = Pair::of(namespace, label);
            self.by_pair.entry(pair).or_default().insert(member.clone());
        }
        let all = self.by_namespace.entry(namespace.to_owned()).or_default();
        all.insert(member.clone());
    }

    pub fn remove(&mut self, namespace: &str, labels: &Labels, member: &T) {
        for label in labels {
            leave(&mut self.by_pair, &Pair::of(namespace, label), member);
        }
        if let Some(all) = self.by_namespace.get_mut(namespace) {
            all.remove(member);
        }
    }

    /// Everything in a namespace.
    pub fn of(&self, namespace: &str) -> impl Iterator<Item = &T> {
        self.by_namespace.get(namespace).into_iter().flatten()
    }

    /// What may match a selector in a namespace: the fewest that one of its labels leaves.
    pub fn candidates(&self, namespace: &str, selector: &Labels) -> Vec<T> {
        let sets = selector
            .iter()
            .map(|label| self.by_pair.get(&Pair::of(namespace, label)));
        match sets.min_by_key(|set| set.map_or(0, BTreeSet::len)) {
            Some(fewest) => fewest.into_iter().flatten().cloned().collect(),
            None => self.of(namespace).cloned().collect(),
        }
    }

    pub fn namespaces(&self) -> impl Iterator<Item = &str> {
        self.by_namespace.keys().map(String::as_str)
    }
}

/// Selectors, each under one of its labels.
#[derive(Debug)]
pub struct Selectors<T> {
    anchored: HashMap<Pair, BTreeSet<T>>,
    /// Those that select everything in their namespace.
    open: HashMap<String, BTreeSet<T>>,
}

impl<T> Default for Selectors<T> {
    fn default() -> Self {
        Self {
            anchored: HashMap::new(),
            open: HashMap::new(),
        }
    }
}

impl<T: Ord + Clone> Selectors<T> {
    /// `namespace` is the selecting object's.
    pub fn insert(&mut self, namespace: &str, selector: Option<&Labels>, who: &T) {
        match anchor(namespace, selector) {
            Some(pair) => self.anchored.entry(pair).or_default().insert(who.clone()),
            None => self
                .open
                .entry(namespace.to_owned())
                .or_default()
                .insert(who.clone()),
        };
    }

    pub fn remove(&mut self, namespace: &str, selector: Option<&Labels>, who: &T) {
        match anchor(namespace, selector) {
            Some(pair) => leave(&mut self.anchored, &pair, who),
            None => leave(&mut self.open, namespace, who),
        }
    }

    /// What may select `labels` from `namespace`, in order.
    pub fn candidates(&self, namespace: &str, labels: &Labels) -> BTreeSet<&T> {
        let anchored = labels
            .iter()
            .filter_map(|label| self.anchored.get(&Pair::of(namespace, label)))
            .flatten();
        let open = self.open.get(namespace).into_iter().flatten();
        anchored.chain(open).collect()
    }
}

fn anchor(namespace: &str, selector: Option<&Labels>) -> Option<Pair> {
    // The last one: selectors often begin alike, with a part-of or an instance label.
    Some(Pair::of(namespace, selector?.iter().next_back()?))
}

fn leave<K, Q, T: Ord>(index: &mut HashMap<K, BTreeSet<T>>, at: &Q, who: &T)
where
    K: std::borrow::Borrow<Q> + Eq + Hash,
    Q: Eq + Hash + ?Sized,
{
    if let Some(set) = index.get_mut(at) {
        set.remove(who);
        if set.is_empty() {
            index.remove(at);
        }
    }
}
