//! Open connections are judged again after every update.
//!
//! Invariant: the functions that admit are the functions that re-judge, on one snapshot; what they no
//! longer allow is reset.

use crate::{
    access::Cut,
    connections::{Connection, Way},
    context::Context,
    inbound::admit::{Arrival, Refusal, Target, admit},
    outbound::route::{judge_outbound, port_is_bound},
};
use culvert_core::{mesh::Workload, policy::Judgement, policy::Verdict, snapshot::Snapshot};
use std::{sync::Arc, time::Instant};

/// Judges again after each published snapshot, for as long as it is polled.
pub async fn run(context: Arc<Context>) {
    let mut generations = context.discovery.generations();
    while generations.changed().await.is_ok() {
        let started = Instant::now();
        let snapshot = context.discovery.snapshot();
        context
            .metrics
            .snapshot_generation
            .set(snapshot.generation.cast_signed());
        let workloads = i64::try_from(snapshot.workload_count()).unwrap_or(i64::MAX);
        context.metrics.workloads.set(workloads);
        for pod in context.pods.all() {
            let Some(own) = snapshot.workload(&pod.workload_uid) else {
                continue;
            };
            for connection in pod.connections.all() {
                if connection.flow.is_cut() {
                    continue;
                }
                if let Err(why) = still_allowed(&snapshot, own, &connection) {
                    connection.cut(why);
                    let direction = connection.facts.way.direction();
                    context.metrics.cut.with_label_values(&[direction]).inc();
                }
            }
            pod.tunnels.sweep(&snapshot);
            tokio::task::yield_now().await;
        }
        context
            .metrics
            .recheck_seconds
            .observe(started.elapsed().as_secs_f64());
        if let Some(published) = context.discovery.stats().take_published()
            && let Ok(took) = published.elapsed()
        {
            context.metrics.effect_seconds.observe(took.as_secs_f64());
        }
    }
}

fn still_allowed(snapshot: &Snapshot, own: &Workload, connection: &Connection) -> Result<(), Cut> {
    let facts = &connection.facts;
    match &facts.way {
        Way::InboundTunnel {
            peer,
            authority,
            accepted_ip,
        } => {
            let arrival = Arrival {
                workload: Some(own),
                accepted_ip: *accepted_ip,
                peer_ip: facts.source.ip(),
                identity: Some(peer),
                target: Target::Authority(authority),
            };
            admit(snapshot, &arrival)
                .map(drop)
                .map_err(|refusal| cut(&refusal))
        }
        Way::InboundPlaintext => {
            let arrival = Arrival {
                workload: Some(own),
                accepted_ip: facts.destination.ip(),
                peer_ip: facts.source.ip(),
                identity: None,
                target: Target::Plaintext(facts.destination.port()),
            };
            admit(snapshot, &arrival)
                .map(drop)
                .map_err(|refusal| cut(&refusal))
        }
        Way::OutboundTunnel {
            endpoint,
            peer,
            target,
            service,
        } => {
            // A workload that has left takes its connections with it; they need no verdict.
            let Some(endpoint) = snapshot.workload(endpoint) else {
                return Ok(());
            };
            let bound = endpoint.waypoint.is_some()
                || port_is_bound(snapshot, endpoint, target.port())
                || service
                    .as_ref()
                    .and_then(|key| snapshot.service(key))
                    .is_some_and(|service| service.waypoint.is_some());
            let same_peer = endpoint.identity == *peer
                || service
                    .as_ref()
                    .and_then(|key| snapshot.service(key))
                    .is_some_and(|service| service.subject_alt_names.contains(peer));
            if !same_peer {
                return Err(Cut::because("unexpected_identity"));
            }
            if bound {
                return Err(Cut::because("no_waypoint"));
            }
            allowed(judge_outbound(snapshot, own, Some(endpoint), *target))
        }
        Way::OutboundDirect { endpoint, target } => {
            let endpoint = endpoint
                .as_ref()
                .and_then(|uid| snapshot.workload(uid))
                .map(AsRef::as_ref);
            allowed(judge_outbound(snapshot, own, endpoint, *target))
        }
    }
}

fn cut(refusal: &Refusal) -> Cut {
    Cut {
        reason: refusal.reason(),
        policy: refusal.policy().cloned(),
    }
}

fn allowed(judged: Judgement) -> Result<(), Cut> {
    match judged.verdict {
        Verdict::Allow(_) => Ok(()),
        Verdict::Deny(denial) => Err(Cut {
            reason: "denied",
            policy: Some(denial.policy().clone()),
        }),
    }
}
