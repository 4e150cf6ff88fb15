//! Plaintext that reaches a pod: admitted where policy allows it, reset where not.
//!
//! ```text
//! client ──TCP──▶ 15006 ──▶ admit (no identity) ──Permit──▶ deliver ──▶ app
//! ```
//! Invariant: the same function judges it that judges tunnels; having no identity is all that differs.

use crate::{
    accept::Accepted,
    access::{Known, Refusing, refused},
    connections::{Facts, NoRoom, Way},
    context::Context,
    inbound::{
        accept::{known_peer, service_of},
        admit::{Arrival, Refusal, Target, admit},
        deliver::{DeliverError, deliver},
    },
    metrics::{Flag, Reporter},
    pods::Pod,
};
use culvert_core::{
    hbone::Traceparent,
    ids::{NetworkAddress, PolicyKey},
};
use culvert_io::copy::{relay_plain, reset};
use std::{sync::Arc, time::Instant};
use tokio::net::TcpStream;

#[derive(Debug, thiserror::Error)]
enum PlaintextError {
    #[error("it was not redirected: someone dialled our port")]
    NotRedirected,
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error(transparent)]
    Deliver(#[from] DeliverError),
    #[error(transparent)]
    NoRoom(#[from] NoRoom),
}

impl Refusing for PlaintextError {
    fn reason(&self) -> &'static str {
        match self {
            Self::NotRedirected => "not_redirected",
            Self::Refused(refusal) => refusal.reason(),
            Self::Deliver(_) => "application",
            Self::NoRoom(_) => "limit",
        }
    }

    fn policy(&self) -> Option<&PolicyKey> {
        match self {
            Self::Refused(refusal) => refusal.policy(),
            _ => None,
        }
    }

    fn flag(&self) -> Flag {
        match self {
            Self::Refused(Refusal::Denied(_) | Refusal::NotFromWaypoint) => Flag::Deny,
            _ => Flag::Connect,
        }
    }
}

/// Carries one plaintext connection to its end.
pub async fn serve(accepted: Accepted, pod: Arc<Pod>, context: Arc<Context>) {
    let _seat = match pod.connections.enter() {
        Ok(seat) => seat,
        Err(limit) => {
            refused(&context.metrics, &unserved(&accepted, &pod, &context), &limit);
            return reset(&accepted.socket);
        }
    };
    let mut known = arrived(&accepted, &pod);
    let mut socket = Some(accepted.socket);
    let Err(error) = carry(&mut socket, &mut known, &pod, &context).await else {
        return;
    };
    // The record first: whoever sees the reset finds it.
    refused(&context.metrics, &known, &error);
    if let Some(socket) = socket {
        reset(&socket);
    }
}

/// What is known of an arriving connection before anything is decided.
fn arrived(accepted: &Accepted, pod: &Pod) -> Known {
    let destination = accepted.original_destination();
    let mut known = Known::new(Reporter::Destination, accepted.peer, destination);
    known.destination_identity = Some(pod.identity().clone());
    known.trace = Some(Traceparent::new(rand::random(), rand::random()));
    known
}

/// What can be said of one that is not served at all.
pub fn unserved(accepted: &Accepted, pod: &Pod, context: &Context) -> Known {
    let mut known = arrived(accepted, pod);
    known.between(&context.discovery.snapshot(), &pod.workload_uid);
    known
}

async fn carry(
    socket: &mut Option<TcpStream>,
    known: &mut Known,
    pod: &Pod,
    context: &Context,
) -> Result<(), PlaintextError> {
    let destination = known.destination_address.ok_or(PlaintextError::NotRedirected)?;
    let peer = known.source_address;
    let (snapshot, own) = known_peer(pod, context, peer.ip())
        .await
        .ok_or(Refusal::UnknownPod)?;
    let source = snapshot.workload_at(&NetworkAddress {
        network: own.network.clone(),
        ip: peer.ip(),
    });
    known.source = source.cloned();
    known.destination = Some(own.clone());
    known.service = service_of(&snapshot, &own, None, destination.port());
    let arrival = Arrival {
        workload: Some(&own),
        accepted_ip: destination.ip(),
        peer_ip: peer.ip(),
        identity: None,
        target: Target::Plaintext(destination.port()),
    };
    let permit = admit(&snapshot, &arrival)?;
    drop(snapshot);
    let metrics = &context.metrics;
    metrics.admitted(
        Reporter::Destination,
        permit.policy.as_ref(),
        permit.would_deny.as_ref(),
    );
    let facts = Facts {
        source: peer,
        destination,
        way: Way::InboundPlaintext,
    };
    let mut open = pod.connections.open(facts, known, metrics);
    let started = Instant::now();
    let _descriptor = context.descriptors.enter(&pod.uid).ok_or(NoRoom)?;
    let application = deliver(pod, &permit, peer.ip()).await?;
    metrics
        .application_seconds
        .observe(started.elapsed().as_secs_f64());
    if let Some(socket) = socket.take() {
        open.opened();
        let outcome = relay_plain(socket, application, &open.connection.flow).await;
        open.ended(outcome);
    }
    Ok(())
}
