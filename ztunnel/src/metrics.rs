//! What ztunnel counts. Names, labels and meanings stand here alone.
//!
//! Labels are closed words or mesh names, never addresses. Invariant: the number of series is bounded;
//! beyond [`MAX_PAIRS`] pairs of workloads, further ones count under `overflow`.

use culvert_core::{ids::SpiffeId, mesh::Workload};
use prometheus::{
    Encoder, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
    TextEncoder,
};
use std::{collections::HashSet, sync::Arc};

/// Pairs of source and destination that have series of their own.
const MAX_PAIRS: usize = 10_000;

/// All metrics of a ztunnel.
pub struct Metrics {
    registry: Registry,
    opened: IntCounterVec,
    closed: IntCounterVec,
    received: IntCounterVec,
    sent: IntCounterVec,
    pairs: parking_lot::Mutex<HashSet<[Arc<str>; 4]>>,
    /// Connections open now.
    pub open: IntGaugeVec,
    /// Connections refused, by direction and reason.
    pub refused: IntCounterVec,
    /// Connections admitted that a dry-run policy would refuse.
    pub would_deny: IntCounterVec,
    /// Tunnels brought up or failed, by direction and outcome.
    pub tunnels: IntCounterVec,
    /// Seconds from the first byte to the end of a handshake.
    pub handshake_seconds: HistogramVec,
    /// Connections cut because they are no longer allowed.
    pub cut: IntCounterVec,
    /// Seconds from a snapshot's publication to the end of its recheck.
    pub recheck_seconds: prometheus::Histogram,
    /// DNS queries, by what became of them.
    pub dns: IntCounterVec,
    /// Pods served now.
    pub pods: IntGauge,
    /// Number of the snapshot in use.
    pub snapshot_generation: IntGauge,
    /// Workloads known now.
    pub workloads: IntGauge,
}

const PAIR: [&str; 9] = [
    "reporter",
    "source_workload",
    "source_workload_namespace",
    "source_principal",
    "destination_workload",
    "destination_workload_namespace",
    "destination_principal",
    "request_protocol",
    "connection_security_policy",
];

impl Metrics {
    pub fn new() -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        let counter = |name: &str, help: &str, labels: &[&str]| {
            let family = IntCounterVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(family.clone()))?;
            Ok::<_, prometheus::Error>(family)
        };
        let gauge = |name: &str, help: &str| {
            let gauge = IntGauge::new(name, help)?;
            registry.register(Box::new(gauge.clone()))?;
            Ok::<_, prometheus::Error>(gauge)
        };
        let open = IntGaugeVec::new(
            Opts::new("culvert_connections_open", "Connections open now"),
            &["direction"],
        )?;
        registry.register(Box::new(open.clone()))?;
        let handshake_seconds = HistogramVec::new(
            HistogramOpts::new(
                "culvert_handshake_duration_seconds",
                "Seconds a tunnel took to come up",
            ),
            &["direction"],
        )?;
        registry.register(Box::new(handshake_seconds.clone()))?;
        let recheck_seconds = prometheus::Histogram::with_opts(HistogramOpts::new(
            "culvert_recheck_duration_seconds",
            "Seconds from a snapshot to the end of its recheck of open connections",
        ))?;
        registry.register(Box::new(recheck_seconds.clone()))?;
        Ok(Self {
            opened: counter("istio_tcp_connections_opened_total", "Connections opened", &PAIR)?,
            closed: counter("istio_tcp_connections_closed_total", "Connections closed", &PAIR)?,
            received: counter(
                "istio_tcp_received_bytes_total",
                "Bytes from the initiator",
                &PAIR,
            )?,
            sent: counter("istio_tcp_sent_bytes_total", "Bytes back to the initiator", &PAIR)?,
            pairs: parking_lot::Mutex::default(),
            open,
            refused: counter(
                "culvert_connections_refused_total",
                "Connections refused",
                &["direction", "reason"],
            )?,
            would_deny: counter(
                "culvert_would_deny_total",
                "Connections admitted that a dry-run policy would refuse",
                &["direction"],
            )?,
            tunnels: counter(
                "culvert_tunnels_total",
                "Tunnels by outcome",
                &["direction", "outcome"],
            )?,
            handshake_seconds,
            dns: counter(
                "culvert_dns_queries_total",
                "DNS queries by outcome",
                &["outcome"],
            )?,
            cut: counter(
                "culvert_connections_cut_total",
                "Connections cut by a change",
                &["direction"],
            )?,
            recheck_seconds,
            pods: gauge("culvert_pods", "Pods served")?,
            snapshot_generation: gauge("culvert_snapshot_generation", "Number of the snapshot in use")?,
            workloads: gauge("culvert_workloads", "Workloads known")?,
            registry,
        })
    }

    /// The counters of one connection, looked up once.
    pub fn ends(&self, reporter: Reporter, source: Party<'_>, destination: Party<'_>) -> Ends {
        let (mut source, mut destination) = (source.labels(), destination.labels());
        let pair =
            [&source[0], &source[1], &destination[0], &destination[1]].map(|text| Arc::from(text.as_str()));
        {
            let mut pairs = self.pairs.lock();
            if !pairs.contains(&pair) {
                if pairs.len() < MAX_PAIRS {
                    pairs.insert(pair);
                } else {
                    source = std::array::from_fn(|_| "overflow".to_owned());
                    destination = source.clone();
                }
            }
        }
        let secure = if source[2] == "unknown" || destination[2] == "unknown" {
            "unknown"
        } else {
            "mutual_tls"
        };
        let labels = [
            reporter.word(),
            &source[0],
            &source[1],
            &source[2],
            &destination[0],
            &destination[1],
            &destination[2],
            "tcp",
            secure,
        ];
        Ends {
            opened: self.opened.with_label_values(&labels),
            closed: self.closed.with_label_values(&labels),
            received: self.received.with_label_values(&labels),
            sent: self.sent.with_label_values(&labels),
        }
    }

    /// The page that Prometheus scrapes.
    pub fn text(&self) -> Vec<u8> {
        let mut page = vec![];
        // Writing to memory does not fail, and our families are consistent.
        let _ = TextEncoder::new().encode(&self.registry.gather(), &mut page);
        page
    }
}

/// Which end reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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
}

/// One end of a connection, as far as it is known.
#[derive(Debug, Clone, Copy, Default)]
pub struct Party<'a> {
    pub workload: Option<&'a Workload>,
    /// Proved by a certificate.
    pub identity: Option<&'a SpiffeId>,
}

impl Party<'_> {
    fn labels(&self) -> [String; 3] {
        let known = |text: Option<&str>| {
            text.filter(|text| !text.is_empty())
                .unwrap_or("unknown")
                .to_owned()
        };
        [
            known(self.workload.map(|workload| &*workload.workload_name)),
            known(self.workload.map(|workload| &*workload.namespace)),
            known(self.identity.map(SpiffeId::as_str)),
        ]
    }
}

/// The counters of one connection.
pub struct Ends {
    pub opened: IntCounter,
    pub closed: IntCounter,
    pub received: IntCounter,
    pub sent: IntCounter,
}
