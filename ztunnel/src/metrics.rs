//! What ztunnel counts. Names, labels and meanings stand here and in `metrics/read.rs` alone.
//!
//! ```text
//! connection ──Known──▶ pairs (labels looked up once) ─┐
//! tunnels, policies, DNS ──▶ families ─────────────────┼▶ page
//! SVIDs, quotas, the agent, the process ──▶ read ──────┘
//! ```
//! Labels are closed words or mesh names, never addresses. Invariant: the number of series is bounded, and
//! series that nothing counts in go after a while.

mod pairs;
mod read;

pub use pairs::{Ends, Flag, Party};

use culvert_core::{ids::PolicyKey, policy::Denial};
use culvert_io::metrics::{Bounded, Page};
use pairs::Pairs;
use prometheus::{Histogram, HistogramVec, IntCounterVec, IntGauge, IntGaugeVec, Registry};
use std::{
    ops::Deref,
    time::{Duration, Instant},
};

culvert_io::metrics! {
    /// Families that count as things happen.
    pub struct Families {
        /// Sockets of pods' connections open now: one for a tunnelled connection, two for plaintext.
        sockets_open: IntGaugeVec = "istio_tcp_sockets_open" ["reporter"],
        /// Queries of pods.
        dns_requests: IntCounterVec = "istio_dns_requests_total" ["request_query_type", "request_protocol", "source_canonical_service", "source_canonical_revision"],
        /// Queries forwarded to the resolver that was asked.
        dns_upstream_requests: IntCounterVec = "istio_dns_upstream_requests_total" ["request_query_type", "request_protocol", "source_canonical_service", "source_canonical_revision"],
        /// Forwarded queries without an answer.
        dns_upstream_failures: IntCounterVec = "istio_dns_upstream_failures_total" ["request_query_type", "request_protocol", "source_canonical_service", "source_canonical_revision"],
        /// How long the resolver took to answer.
        dns_upstream_seconds: HistogramVec = "istio_dns_upstream_request_duration_seconds" ["request_query_type", "request_protocol", "source_canonical_service", "source_canonical_revision"],
        /// Connections open now.
        open: IntGaugeVec = "culvert_connections_open" ["direction"],
        /// Connections refused, by the log's word for the reason.
        refused: IntCounterVec = "culvert_connections_refused_total" ["direction", "reason"],
        /// Open connections cut because they are no longer allowed.
        cut: IntCounterVec = "culvert_connections_cut_total" ["direction"],
        /// Verdicts on new connections: `allow`, `deny`, and `would_deny` where a dry-run policy would refuse. `-` stands for no policy in force.
        decisions: Bounded = "culvert_policy_decisions_total" ["direction", "verdict", "policy"],
        /// Tunnels open now.
        tunnels_open: IntGaugeVec = "culvert_tunnels_open" ["direction"],
        /// Handshakes by how they ended: `up`, or the reason of the failure.
        tunnels: IntCounterVec = "culvert_tunnels_total" ["direction", "outcome"],
        /// Streams asked of a pod's pool: `reused` a tunnel, or `dialled` one.
        checkouts: IntCounterVec = "culvert_pool_checkouts_total" ["outcome"],
        /// How long a tunnel took to come up; outbound from the dial, inbound from the accepted connection.
        handshake_seconds: HistogramVec = "culvert_handshake_duration_seconds" ["direction"],
        /// How long the application took to accept a connection.
        application_seconds: Histogram = "culvert_application_connect_duration_seconds" [],
        /// From a snapshot to the last cut that it asked for.
        recheck_seconds: Histogram = "culvert_recheck_duration_seconds" [],
        /// From control's publication of a change to the end of its recheck here; the clocks of both machines count.
        effect_seconds: Histogram = "culvert_time_to_effect_seconds" [],
        /// Queries by what became of them.
        dns: IntCounterVec = "culvert_dns_queries_total" ["outcome"],
        /// Pods served now.
        pods: IntGauge = "culvert_pods" [],
        /// Number of the snapshot in use.
        snapshot_generation: IntGauge = "culvert_snapshot_generation" [],
        /// Workloads known now.
        workloads: IntGauge = "culvert_workloads" [],
        /// 1 while the file of revocation lists cannot be used; the last good ones stay in force.
        lists_failing: IntGauge = "culvert_revocation_lists_failing" [],
        /// Tunnels ended while they were up, by why.
        tunnels_cut: IntCounterVec = "culvert_tunnels_cut_total" ["direction", "reason"],
        /// Calls of the admin page that change something.
        admin_calls: IntCounterVec = "culvert_admin_calls_total" ["call"],
    }
}

/// All metrics of a ztunnel; its families are reached as its own fields.
pub struct Metrics {
    registry: Registry,
    families: Families,
    pairs: Pairs,
    outbound: Directed,
    inbound: Directed,
}

/// What is looked up for every connection, looked up once.
struct Directed {
    open: IntGauge,
    sockets: IntGauge,
}

impl Deref for Metrics {
    type Target = Families;

    fn deref(&self) -> &Families {
        &self.families
    }
}

/// Series that have not counted for so long go.
const IDLE: Duration = Duration::from_secs(15 * 60);

impl Metrics {
    pub fn new() -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        let families = Families::declare(&registry)?;
        let directed = |reporter: Reporter| Directed {
            open: families.open.with_label_values(&[reporter.direction()]),
            sockets: families.sockets_open.with_label_values(&[reporter.word()]),
        };
        Ok(Self {
            outbound: directed(Reporter::Source),
            inbound: directed(Reporter::Destination),
            pairs: Pairs::new(),
            registry,
            families,
        })
    }

    /// The counters of one connection, looked up once.
    pub fn ends(&self, reporter: Reporter, party: &Party<'_>) -> Ends {
        self.pairs.of(reporter, party)
    }

    /// Counts a connection, of so many sockets, as open until the value is dropped.
    pub fn open(&self, reporter: Reporter, sockets: i64) -> OpenSockets {
        let directed = match reporter {
            Reporter::Source => &self.outbound,
            Reporter::Destination => &self.inbound,
        };
        directed.open.inc();
        directed.sockets.add(sockets);
        OpenSockets {
            open: directed.open.clone(),
            of: directed.sockets.clone(),
            sockets,
        }
    }

    /// Counts a tunnel as open until the value is dropped.
    pub fn tunnel(&self, reporter: Reporter) -> OpenTunnel {
        let gauge = self.tunnels_open.with_label_values(&[reporter.direction()]);
        gauge.inc();
        OpenTunnel(gauge)
    }

    /// Counts what policy said of a connection that was admitted.
    pub fn admitted(&self, reporter: Reporter, policy: Option<&PolicyKey>, would_deny: Option<&Denial>) {
        let direction = reporter.direction();
        let policy = policy.map_or("-", PolicyKey::as_str);
        self.decisions.count(&[direction, "allow", policy]);
        if let Some(denial) = would_deny {
            self.decisions
                .count(&[direction, "would_deny", denial.policy().as_str()]);
        }
    }

    /// Forgets series that have been idle.
    pub fn sweep(&self, now: Instant) {
        self.pairs.sweep(now, IDLE);
        self.decisions.sweep(now, IDLE);
    }

    /// Shows what has been counted.
    fn show(&self, page: &mut Page) {
        page.registry(&self.registry);
        self.pairs.show(page);
    }
}

/// An open connection and its sockets, counted for as long as this lives.
pub struct OpenSockets {
    open: IntGauge,
    of: IntGauge,
    sockets: i64,
}

impl Drop for OpenSockets {
    fn drop(&mut self) {
        self.open.dec();
        self.of.sub(self.sockets);
    }
}

/// An open tunnel, counted for as long as this lives.
pub struct OpenTunnel(IntGauge);

impl Drop for OpenTunnel {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// Which end reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reporter {
    Source,
    Destination,
}

impl Reporter {
    fn word(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
        }
    }

    /// The same, seen from the pod.
    pub fn direction(self) -> &'static str {
        match self {
            Self::Source => "outbound",
            Self::Destination => "inbound",
        }
    }
}

pub use read::page;

#[cfg(test)]
mod tests;
