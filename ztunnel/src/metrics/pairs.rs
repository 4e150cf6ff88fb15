//! `istio_tcp_*`: connections and bytes by who talks to whom.
//!
//! ```text
//! Party ──by reference──▶ known before? ──▶ Pair (its labels written once, its counters)
//!                         else by its labels' text, at most MAX_PAIRS of them
//! ```
//! Invariant: a connection of a known pair costs one look-up by pointers and formats nothing.

use super::Reporter;
use crate::access::Served;
use culvert_core::{
    ids::{ServiceKey, SpiffeId},
    mesh::Workload,
};
use culvert_io::metrics::{Page, push_label};
use parking_lot::Mutex;
use std::{
    collections::HashMap,
    hash::{Hash, Hasher},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// Pairs that have series of their own; with all their counters a page of a few megabytes.
pub(super) const MAX_PAIRS: usize = 4000;

culvert_io::read_metrics! { pub(super) DECLARED = {
    /// Connections opened.
    OPENED: "counter" = "istio_tcp_connections_opened_total" ["reporter", "source_*", "destination_*", "request_protocol", "connection_security_policy", "response_flags"],
    /// Connections closed, however they ended.
    CLOSED: "counter" = "istio_tcp_connections_closed_total" ["reporter", "source_*", "destination_*", "request_protocol", "connection_security_policy", "response_flags"],
    /// Connections that were refused or did not come up, by `response_flags`.
    FAILED: "counter" = "istio_tcp_connections_failed_total" ["reporter", "source_*", "destination_*", "request_protocol", "connection_security_policy", "response_flags"],
    /// Bytes from the connection's initiator, counted while it lasts.
    RECEIVED: "counter" = "istio_tcp_received_bytes_total" ["reporter", "source_*", "destination_*", "request_protocol", "connection_security_policy", "response_flags"],
    /// Bytes back to the connection's initiator, counted while it lasts.
    SENT: "counter" = "istio_tcp_sent_bytes_total" ["reporter", "source_*", "destination_*", "request_protocol", "connection_security_policy", "response_flags"],
} }

/// How a connection failed or ended, in the field's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flag {
    None,
    Deny,
    Connect,
    TlsFailure,
    H2HandshakeFailure,
    NetworkPolicy,
    IdentityError,
    CertRevoked,
}

impl Flag {
    const ALL: [Self; 8] = [
        Self::None,
        Self::Deny,
        Self::Connect,
        Self::TlsFailure,
        Self::H2HandshakeFailure,
        Self::NetworkPolicy,
        Self::IdentityError,
        Self::CertRevoked,
    ];

    /// As the label's end: `response_flags` comes last.
    fn label(self) -> &'static str {
        match self {
            Self::None => ",response_flags=\"-\"",
            Self::Deny => ",response_flags=\"DENY\"",
            Self::Connect => ",response_flags=\"CONNECT\"",
            Self::TlsFailure => ",response_flags=\"TLS_FAILURE\"",
            Self::H2HandshakeFailure => ",response_flags=\"H2_HANDSHAKE_FAILURE\"",
            Self::NetworkPolicy => ",response_flags=\"NETWORK_POLICY\"",
            Self::IdentityError => ",response_flags=\"IDENTITY_ERROR\"",
            Self::CertRevoked => ",response_flags=\"CERT_REVOKED\"",
        }
    }
}

/// Both ends of a connection, as far as they are known.
#[derive(Clone, Copy, Default)]
pub struct Party<'a> {
    pub source: Option<&'a Arc<Workload>>,
    /// Proved by a certificate.
    pub source_identity: Option<&'a SpiffeId>,
    pub destination: Option<&'a Arc<Workload>>,
    pub destination_identity: Option<&'a SpiffeId>,
    pub service: Option<&'a Served>,
}

/// The series of one pair.
struct Pair {
    labels: Box<str>,
    opened: AtomicU64,
    received: AtomicU64,
    sent: AtomicU64,
    closed: [AtomicU64; 8],
    failed: [AtomicU64; 8],
    /// Milliseconds after [`Pairs::epoch`].
    used: AtomicU64,
}

/// The counters of one connection.
#[derive(Clone)]
pub struct Ends(Arc<Pair>);

impl Ends {
    pub fn opened(&self) {
        self.0.opened.fetch_add(1, Ordering::Relaxed);
    }

    pub fn closed(&self, flag: Flag) {
        self.0.closed[flag as usize].fetch_add(1, Ordering::Relaxed);
    }

    pub fn failed(&self, flag: Flag) {
        self.0.failed[flag as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// Adds bytes from the connection's initiator, and back to it.
    pub fn moved(&self, received: u64, sent: u64) {
        self.0.received.fetch_add(received, Ordering::Relaxed);
        self.0.sent.fetch_add(sent, Ordering::Relaxed);
    }
}

/// The same value, known by its place in memory, which is kept from being used again.
struct Same<T>(Arc<T>);

impl<T> Clone for Same<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T> PartialEq for Same<T> {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl<T> Eq for Same<T> {}

impl<T> Hash for Same<T> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        Arc::as_ptr(&self.0).hash(state);
    }
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct Key {
    reporter: Reporter,
    source: Option<Same<Workload>>,
    source_identity: Option<SpiffeId>,
    destination: Option<Same<Workload>>,
    destination_identity: Option<SpiffeId>,
    service: Option<ServiceKey>,
}

/// All pairs.
pub(super) struct Pairs {
    epoch: Instant,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// What has been looked up before. A workload that changes is another value with, mostly, the same labels.
    known: HashMap<Key, Arc<Pair>>,
    by_labels: HashMap<Box<str>, Arc<Pair>>,
    overflow: [Option<Arc<Pair>>; 2],
}

impl Pairs {
    pub fn new() -> Self {
        Self {
            epoch: Instant::now(),
            state: Mutex::default(),
        }
    }

    pub fn of(&self, reporter: Reporter, party: &Party<'_>) -> Ends {
        let key = Key {
            reporter,
            source: party.source.cloned().map(Same),
            source_identity: party.source_identity.cloned(),
            destination: party.destination.cloned().map(Same),
            destination_identity: party.destination_identity.cloned(),
            service: party.service.map(|service| service.key().clone()),
        };
        let now = u64::try_from(self.epoch.elapsed().as_millis()).unwrap_or(u64::MAX);
        let mut state = self.state.lock();
        if let Some(pair) = state.known.get(&key) {
            pair.used.store(now, Ordering::Relaxed);
            return Ends(pair.clone());
        }
        let labels = labels(reporter, party);
        let pair = match state.by_labels.get(labels.as_str()) {
            Some(pair) => pair.clone(),
            None if state.by_labels.len() >= MAX_PAIRS => return Ends(state.overflow(reporter)),
            None => {
                let pair = Arc::new(Pair::new(labels.clone()));
                state.by_labels.insert(labels.into(), pair.clone());
                pair
            }
        };
        pair.used.store(now, Ordering::Relaxed);
        if state.known.len() >= 2 * MAX_PAIRS {
            state.known.clear();
        }
        state.known.insert(key, pair.clone());
        Ends(pair)
    }

    /// Forgets the pairs without a connection that have not been used since `idle` before `now`.
    pub fn sweep(&self, now: Instant, idle: Duration) {
        let since = now.saturating_duration_since(self.epoch).saturating_sub(idle);
        let since = u64::try_from(since.as_millis()).unwrap_or(u64::MAX);
        let mut state = self.state.lock();
        let old = |pair: &Pair| pair.used.load(Ordering::Relaxed) < since;
        state.known.retain(|_, pair| !old(pair));
        // One reference is the map's own: whoever holds another has a connection.
        state
            .by_labels
            .retain(|_, pair| !old(pair) || Arc::strong_count(pair) > 1);
        state.known.shrink_to_fit();
        state.by_labels.shrink_to_fit();
    }

    pub fn show(&self, page: &mut Page) {
        let pairs: Vec<Arc<Pair>> = {
            let state = self.state.lock();
            let overflow = state.overflow.iter().flatten();
            state.by_labels.values().chain(overflow).cloned().collect()
        };
        type Value = fn(&Pair) -> &AtomicU64;
        let plain: [(_, Value); 3] = [
            (&OPENED, |pair| &pair.opened),
            (&RECEIVED, |pair| &pair.received),
            (&SENT, |pair| &pair.sent),
        ];
        for (declared, value) in plain {
            let mut family = page.family(declared);
            for pair in &pairs {
                family.written(
                    &pair.labels,
                    Flag::None.label(),
                    value(pair).load(Ordering::Relaxed),
                );
            }
        }
        type Values = fn(&Pair) -> &[AtomicU64; 8];
        let flagged: [(_, Values); 2] = [(&CLOSED, |pair| &pair.closed), (&FAILED, |pair| &pair.failed)];
        for (declared, values) in flagged {
            let mut family = page.family(declared);
            for pair in &pairs {
                for (flag, value) in Flag::ALL.into_iter().zip(values(pair)) {
                    match value.load(Ordering::Relaxed) {
                        0 => {}
                        count => family.written(&pair.labels, flag.label(), count),
                    }
                }
            }
        }
    }

    #[cfg(test)]
    pub fn sizes(&self) -> (usize, usize) {
        let state = self.state.lock();
        (state.known.len(), state.by_labels.len())
    }
}

impl State {
    fn overflow(&mut self, reporter: Reporter) -> Arc<Pair> {
        let slot = &mut self.overflow[usize::from(reporter == Reporter::Destination)];
        slot.get_or_insert_with(|| Arc::new(Pair::new(all_labels(reporter, |_| OVERFLOW, OVERFLOW))))
            .clone()
    }
}

const OVERFLOW: &str = culvert_io::metrics::OVERFLOW;

impl Pair {
    fn new(labels: String) -> Self {
        Self {
            labels: labels.into(),
            opened: AtomicU64::default(),
            received: AtomicU64::default(),
            sent: AtomicU64::default(),
            closed: Default::default(),
            failed: Default::default(),
            used: AtomicU64::default(),
        }
    }
}

/// What a label of an end is about.
#[derive(Clone, Copy)]
enum Of {
    Source(What),
    Destination(What),
    ServiceHost,
    ServiceNamespace,
    ServiceName,
}

#[derive(Clone, Copy)]
enum What {
    Workload,
    CanonicalService,
    CanonicalRevision,
    Namespace,
    Principal,
    Cluster,
    Region,
    Zone,
}

/// The labels of the field, in its order.
const LABELS: [(&str, Of); 23] = {
    use What::{CanonicalRevision, CanonicalService, Cluster, Namespace, Principal, Region, Workload, Zone};
    [
        ("source_workload", Of::Source(Workload)),
        ("source_canonical_service", Of::Source(CanonicalService)),
        ("source_canonical_revision", Of::Source(CanonicalRevision)),
        ("source_workload_namespace", Of::Source(Namespace)),
        ("source_principal", Of::Source(Principal)),
        ("source_app", Of::Source(CanonicalService)),
        ("source_version", Of::Source(CanonicalRevision)),
        ("source_cluster", Of::Source(Cluster)),
        ("source_region", Of::Source(Region)),
        ("source_zone", Of::Source(Zone)),
        ("destination_service", Of::ServiceHost),
        ("destination_service_namespace", Of::ServiceNamespace),
        ("destination_service_name", Of::ServiceName),
        ("destination_workload", Of::Destination(Workload)),
        ("destination_canonical_service", Of::Destination(CanonicalService)),
        (
            "destination_canonical_revision",
            Of::Destination(CanonicalRevision),
        ),
        ("destination_workload_namespace", Of::Destination(Namespace)),
        ("destination_principal", Of::Destination(Principal)),
        ("destination_app", Of::Destination(CanonicalService)),
        ("destination_version", Of::Destination(CanonicalRevision)),
        ("destination_cluster", Of::Destination(Cluster)),
        ("destination_region", Of::Destination(Region)),
        ("destination_zone", Of::Destination(Zone)),
    ]
};

fn labels(reporter: Reporter, party: &Party<'_>) -> String {
    let security = match (party.source_identity, party.destination_identity) {
        (Some(_), Some(_)) => "mutual_tls",
        _ => "unknown",
    };
    let value = |of: Of| match of {
        Of::Source(What::Principal) => party.source_identity.map(SpiffeId::as_str),
        Of::Destination(What::Principal) => party.destination_identity.map(SpiffeId::as_str),
        Of::Source(what) => party.source.map(|workload| of_workload(workload, what)),
        Of::Destination(what) => party.destination.map(|workload| of_workload(workload, what)),
        Of::ServiceHost => party.service.map(|service| service.key().hostname()),
        Of::ServiceNamespace => party.service.map(|service| service.key().namespace()),
        Of::ServiceName => party.service.map(Served::name),
    };
    all_labels(
        reporter,
        |of| value(of).filter(|text| !text.is_empty()).unwrap_or("unknown"),
        security,
    )
}

fn all_labels<'v>(reporter: Reporter, value: impl Fn(Of) -> &'v str, security: &str) -> String {
    let mut text = String::with_capacity(1024);
    push_label(&mut text, "reporter", reporter.word());
    for (label, of) in LABELS {
        text.push(',');
        push_label(&mut text, label, value(of));
    }
    text.push_str(",request_protocol=\"tcp\",");
    push_label(&mut text, "connection_security_policy", security);
    text
}

fn of_workload(workload: &Workload, what: What) -> &str {
    match what {
        What::Workload => &workload.workload_name,
        What::CanonicalService => &workload.canonical_name,
        What::CanonicalRevision => &workload.canonical_revision,
        What::Namespace => &workload.namespace,
        What::Principal => workload.identity.as_str(),
        What::Cluster => &workload.cluster,
        What::Region => &workload.locality.region,
        What::Zone => &workload.locality.zone,
    }
}
