//! Which endpoint of a service a connection goes to.
//!
//! ```text
//! usable ─▶ not tried yet ─▶ not failing lately, if any ─▶ nearest ─▶ the client's own, or the less loaded of two
//! ```
//! Invariant: an endpoint that has just failed this connection is not tried again for it, and locality
//! preferences are kept before load is looked at.

use culvert_core::{
    ids::{PodUid, ServiceKey, WorkloadUid},
    mesh::{LocalityMode, LocalityScope, Service, Workload},
};
use parking_lot::Mutex;
use std::{
    collections::HashMap,
    hash::{DefaultHasher, Hash, Hasher},
    sync::Arc,
    time::{Duration, Instant},
};

/// How long an endpoint that failed is avoided by other connections.
const FAILING: Duration = Duration::from_secs(5);

/// Failures that are remembered; beyond it the oldest are looked through.
const MAX_FAILING: usize = 4096;

/// Endpoints of this node's connections that have failed lately.
#[derive(Default)]
pub struct Failing(Mutex<HashMap<WorkloadUid, Instant>>);

impl Failing {
    pub fn failed(&self, endpoint: &WorkloadUid) {
        let mut failing = self.0.lock();
        if failing.len() >= MAX_FAILING {
            failing.retain(|_, at| at.elapsed() < FAILING);
        }
        if failing.len() < MAX_FAILING {
            failing.insert(endpoint.clone(), Instant::now());
        }
    }

    pub fn works(&self, endpoint: &WorkloadUid) {
        let mut failing = self.0.lock();
        if !failing.is_empty() {
            failing.remove(endpoint);
        }
    }

    pub fn has(&self, endpoint: &WorkloadUid) -> bool {
        let failing = self.0.lock();
        failing.get(endpoint).is_some_and(|at| at.elapsed() < FAILING)
    }
}

/// Which endpoints a pod's services with session affinity have taken it to. The pod is the client.
#[derive(Default)]
pub struct Sessions(Mutex<HashMap<ServiceKey, (WorkloadUid, Instant)>>);

impl Sessions {
    /// The endpoint of the last connection, unless that was longer ago than the service's affinity lasts.
    fn last(&self, service: &Service) -> Option<WorkloadUid> {
        let lasts = Duration::from_secs(service.balancing.client_ip_affinity_seconds?.into());
        let sessions = self.0.lock();
        let (endpoint, at) = sessions.get(&service.key)?;
        (at.elapsed() < lasts).then(|| endpoint.clone())
    }

    /// A connection was carried: its affinity lasts from now.
    pub fn used(&self, service: &Service, endpoint: &WorkloadUid) {
        if service.balancing.client_ip_affinity_seconds.is_some() {
            let session = (endpoint.clone(), Instant::now());
            self.0.lock().insert(service.key.clone(), session);
        }
    }
}

/// What a choice depends on beside the service and its endpoints.
pub struct Choice<'k> {
    pub client: &'k PodUid,
    pub sessions: &'k Sessions,
    /// Tried for this connection already.
    pub avoid: &'k [WorkloadUid],
    pub failing: &'k Failing,
    /// Streams open to an endpoint.
    pub load: &'k dyn Fn(&WorkloadUid) -> usize,
}

/// Chooses an endpoint, or none.
pub fn choose(
    service: &Service,
    source: &Workload,
    usable: &[Arc<Workload>],
    known: &Choice<'_>,
) -> Option<usize> {
    let untried: Vec<usize> = (0..usable.len())
        .filter(|index| !known.avoid.contains(&usable[*index].uid))
        .collect();
    let near = nearest(service, source, usable, untried);
    if service.balancing.client_ip_affinity_seconds.is_some() {
        return of_the_client(service, usable, &near, known);
    }
    let works = |index: &usize| !known.failing.has(&usable[*index].uid);
    let working: Vec<usize> = near.iter().copied().filter(works).collect();
    let near = if working.is_empty() { near } else { working };
    let one = *near.get(rand::random_range(0..near.len().max(1)))?;
    let other = near[rand::random_range(0..near.len())];
    let weight = |index: usize| {
        let endpoint = &usable[index];
        ((known.load)(&endpoint.uid) + 1) as f64 / f64::from(endpoint.capacity.max(1))
    };
    Some(if weight(other) < weight(one) { other } else { one })
}

/// `sessionAffinity: ClientIP`: where the client was last, if that may still be used; otherwise the highest
/// of the endpoints' hashes with the client, so that a ztunnel that starts anew chooses alike.
fn of_the_client(
    service: &Service,
    usable: &[Arc<Workload>],
    near: &[usize],
    known: &Choice<'_>,
) -> Option<usize> {
    let last = known.sessions.last(service);
    let again = last.and_then(|last| near.iter().copied().find(|index| usable[*index].uid == last));
    again.or_else(|| {
        near.iter().copied().max_by_key(|index| {
            let mut hasher = DefaultHasher::new();
            (known.client.as_str(), usable[*index].uid.as_str()).hash(&mut hasher);
            hasher.finish()
        })
    })
}

/// The endpoints that match the preferences best: all of them for `Any`, only full matches for `Strict`,
/// the longest matching prefix for `Failover`.
fn nearest(service: &Service, source: &Workload, usable: &[Arc<Workload>], fresh: Vec<usize>) -> Vec<usize> {
    let preferences = &service.balancing.preferences;
    let matched = |index: &usize| {
        let endpoint = &usable[*index];
        preferences
            .iter()
            .take_while(|scope| same(**scope, source, endpoint))
            .count()
    };
    match service.balancing.mode {
        LocalityMode::Any | LocalityMode::Passthrough => fresh,
        LocalityMode::Strict => fresh
            .into_iter()
            .filter(|index| matched(index) == preferences.len())
            .collect(),
        LocalityMode::Failover => {
            let best = fresh.iter().map(matched).max().unwrap_or_default();
            fresh.into_iter().filter(|index| matched(index) == best).collect()
        }
    }
}

fn same(scope: LocalityScope, source: &Workload, endpoint: &Workload) -> bool {
    match scope {
        LocalityScope::Region => source.locality.region == endpoint.locality.region,
        LocalityScope::Zone => source.locality.zone == endpoint.locality.zone,
        LocalityScope::Subzone => source.locality.subzone == endpoint.locality.subzone,
        LocalityScope::Node => source.node == endpoint.node,
        LocalityScope::Cluster => source.cluster == endpoint.cluster,
        LocalityScope::Network => source.network == endpoint.network,
    }
}

#[cfg(test)]
mod tests;
