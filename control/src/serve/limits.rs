//! How much of the control plane one node may use (T52).
//!
//! Invariant: what is counted is the node's, whichever connection it comes by, so that a node cannot starve
//! the others by asking more.

use parking_lot::Mutex;
use std::{collections::HashMap, time::Instant};
use tonic::Status;

/// What is rationed: tokens a second, and how many may be saved up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Budget {
    /// Certificates: a full node of 250 pods at once, and renewals at the shortest life.
    Certificates,
    /// New streams, of discovery and of orders.
    Streams,
    /// Names subscribed to or left.
    Names,
}

impl Budget {
    fn rate(self) -> f64 {
        match self {
            Self::Certificates => 100.0,
            Self::Streams => 2.0,
            Self::Names => 5_000.0,
        }
    }

    fn most(self) -> f64 {
        match self {
            Self::Certificates => 1_000.0,
            Self::Streams => 50.0,
            // All that a node may subscribe to, twice: it says them all again after a reconnect.
            Self::Names => 400_000.0,
        }
    }
}

struct Bucket {
    tokens: f64,
    at: Instant,
}

/// Every node's buckets; nodes are as many as there are join tokens.
#[derive(Default)]
pub struct Limits(Mutex<HashMap<(String, Budget), Bucket>>);

impl Limits {
    /// Takes `cost` from a node's budget, or refuses.
    pub fn spend(&self, node: &str, budget: Budget, cost: u32) -> Result<(), Status> {
        if self.try_spend(node, budget, cost, Instant::now()) {
            return Ok(());
        }
        tracing::warn!(target: "audit", node, ?budget, "refused: the node asks too much");
        Err(Status::resource_exhausted(
            "too many requests from this node; try again later",
        ))
    }

    fn try_spend(&self, node: &str, budget: Budget, cost: u32, now: Instant) -> bool {
        let mut buckets = self.0.lock();
        let bucket = buckets
            .entry((node.to_owned(), budget))
            .or_insert_with(|| Bucket {
                tokens: budget.most(),
                at: now,
            });
        let gained = now.saturating_duration_since(bucket.at).as_secs_f64() * budget.rate();
        bucket.tokens = (bucket.tokens + gained).min(budget.most());
        bucket.at = now;
        let enough = bucket.tokens >= f64::from(cost);
        if enough {
            bucket.tokens -= f64::from(cost);
        }
        enough
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn t52_a_node_that_asks_without_end_is_refused_and_others_are_not() {
        let (limits, start) = (Limits::default(), Instant::now());
        let granted = |node: &str, at: Instant| {
            (0..5_000)
                .filter(|_| limits.try_spend(node, Budget::Certificates, 1, at))
                .count()
        };
        assert_eq!(granted("greedy", start), 1_000);
        assert_eq!(granted("modest", start), 1_000, "another node has its own");
        assert_eq!(granted("greedy", start + Duration::from_secs(2)), 200);
        assert!(
            !limits.try_spend("n", Budget::Names, 400_001, start),
            "more than there ever is"
        );
    }
}
