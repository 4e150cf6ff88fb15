//! Plaintext that reaches a pod: admitted where policy allows it, reset where not.
//!
//! ```text
//! client ──TCP──▶ 15006 ──▶ admit (no identity) ──Permit──▶ deliver ──▶ app
//! ```
//! Invariant: the same function judges it that judges tunnels; having no identity is all that differs.

use crate::{
    accept::Accepted,
    connections::{AtLimit, Facts, Way},
    context::Context,
    inbound::{
        accept::known_peer,
        admit::{Arrival, Refusal, Target, admit},
        deliver::{DeliverError, deliver},
    },
    metrics::{Party, Reporter},
    pods::Pod,
};
use culvert_core::ids::NetworkAddress;
use culvert_io::copy::{relay_plain, reset};
use std::{net::SocketAddr, sync::Arc};
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
    Limit(#[from] AtLimit),
}

impl PlaintextError {
    fn reason(&self) -> &'static str {
        match self {
            Self::NotRedirected => "not_redirected",
            Self::Refused(refusal) => refusal.reason(),
            Self::Deliver(_) => "application",
            Self::Limit(_) => "limit",
        }
    }
}

/// Carries one plaintext connection to its end.
pub async fn serve(accepted: Accepted, pod: Arc<Pod>, context: Arc<Context>) {
    let (peer, destination) = (accepted.peer, accepted.original_destination());
    let mut socket = Some(accepted.socket);
    let Err(error) = carry(&mut socket, peer, destination, &pod, &context).await else {
        return;
    };
    if let Some(socket) = socket {
        reset(&socket);
    }
    context
        .metrics
        .refused
        .with_label_values(&["inbound", error.reason()])
        .inc();
    tracing::warn!(target: "access", { src.addr = %peer, dst.addr = destination.map(tracing::field::display),
        dst.identity = %pod.identity(), direction = "inbound", %error }, "connection failed");
}

async fn carry(
    socket: &mut Option<TcpStream>,
    peer: SocketAddr,
    destination: Option<SocketAddr>,
    pod: &Pod,
    context: &Context,
) -> Result<(), PlaintextError> {
    let destination = destination.ok_or(PlaintextError::NotRedirected)?;
    let (snapshot, own) = known_peer(pod, context, peer.ip())
        .await
        .ok_or(Refusal::UnknownPod)?;
    let arrival = Arrival {
        workload: Some(&own),
        accepted_ip: destination.ip(),
        peer_ip: peer.ip(),
        identity: None,
        target: Target::Plaintext(destination.port()),
    };
    let permit = admit(&snapshot, &arrival)?;
    if permit.would_deny.is_some() {
        context.metrics.would_deny.with_label_values(&["inbound"]).inc();
    }
    let source = snapshot.workload_at(&NetworkAddress {
        network: own.network.clone(),
        ip: peer.ip(),
    });
    let ends = context.metrics.ends(
        Reporter::Destination,
        Party {
            workload: source.map(AsRef::as_ref),
            identity: None,
        },
        Party {
            workload: Some(&own),
            identity: None,
        },
    );
    let facts = Facts {
        source: peer,
        destination,
        way: Way::InboundPlaintext,
    };
    let open = pod
        .connections
        .open(facts, pod.identity(), ends, &context.metrics)?;
    let application = deliver(pod, &permit, peer.ip()).await?;
    if let Some(socket) = socket.take() {
        let outcome = relay_plain(socket, application, &open.connection.flow).await;
        open.ended(outcome);
    }
    Ok(())
}
