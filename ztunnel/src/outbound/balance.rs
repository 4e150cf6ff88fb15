//! Which endpoint of a service a connection goes to.
//!
//! Invariant: an endpoint that has just failed this connection is not tried again for it, and locality
//! preferences are kept before load is looked at.

use culvert_core::{
    ids::WorkloadUid,
    mesh::{LocalityMode, LocalityScope, Service, Workload},
};
use std::sync::Arc;

/// Chooses by the power of two choices: of two random endpoints the one with less load for its capacity.
pub fn choose(
    service: &Service,
    source: &Workload,
    usable: &[Arc<Workload>],
    avoid: &[WorkloadUid],
    load: impl Fn(&WorkloadUid) -> usize,
) -> Option<usize> {
    let fresh: Vec<usize> = (0..usable.len())
        .filter(|index| !avoid.contains(&usable[*index].uid))
        .collect();
    let near = nearest(service, source, usable, fresh);
    let one = *near.get(rand::random_range(0..near.len().max(1)))?;
    let other = near[rand::random_range(0..near.len())];
    let weight = |index: usize| {
        let endpoint = &usable[index];
        (load(&endpoint.uid) + 1) as f64 / f64::from(endpoint.capacity.max(1))
    };
    Some(if weight(other) < weight(one) { other } else { one })
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
