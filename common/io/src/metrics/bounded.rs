//! A family whose labels come from outside: bounded, and idle series go.

use super::{Declared, Family};
use parking_lot::Mutex;
use prometheus::{IntCounter, IntCounterVec, Registry};
use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

/// Series that such a family has at most.
const MOST: usize = 1000;

/// What further label values count under.
pub const OVERFLOW: &str = "overflow";

/// A counter family of at most a thousand series; what is beyond counts under `overflow`.
#[derive(Clone)]
pub struct Bounded {
    family: IntCounterVec,
    series: Arc<Mutex<ByLabels>>,
}

type ByLabels = HashMap<Box<[Box<str>]>, Series>;

struct Series {
    counter: IntCounter,
    used: Instant,
}

impl Family for Bounded {
    const KIND: &'static str = "counter";

    fn declare(declared: &Declared, registry: &Registry) -> Result<Self, prometheus::Error> {
        Ok(Self {
            family: IntCounterVec::declare(declared, registry)?,
            series: Arc::default(),
        })
    }
}

impl Bounded {
    /// Counts one.
    pub fn count(&self, labels: &[&str]) {
        let key: Box<[Box<str>]> = labels.iter().map(|label| Box::from(*label)).collect();
        let mut series = self.series.lock();
        if let Some(known) = series.get_mut(&key) {
            known.used = Instant::now();
            known.counter.inc();
            return;
        }
        if series.len() >= MOST {
            let labels = vec![OVERFLOW; labels.len()];
            self.family.with_label_values(&labels).inc();
            return;
        }
        let counter = self.family.with_label_values(labels);
        counter.inc();
        let used = Instant::now();
        series.insert(key, Series { counter, used });
    }

    /// Forgets the series that have not counted since `idle` before `now`.
    pub fn sweep(&self, now: Instant, idle: Duration) {
        self.series.lock().retain(|labels, series| {
            let keep = now.saturating_duration_since(series.used) < idle;
            if !keep {
                let labels: Vec<&str> = labels.iter().map(AsRef::as_ref).collect();
                // It is there, or was never shown.
                let _ = self.family.remove_label_values(&labels);
            }
            keep
        });
    }

    /// Series that it has now.
    pub fn len(&self) -> usize {
        self.series.lock().len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
