//! A captured connection: from `accept` to the relay.

use super::{
    balance::choose,
    route::{Hop, Passthrough, Refusal, Route, route},
    tunnel::TunnelError,
};
use crate::{
    accept::Accepted,
    connections::{AtLimit, Facts, Way},
    context::{CONNECT_DEADLINE, Context},
    metrics::{Party, Reporter},
    node_protocol::DeclareError,
    pods::Pod,
};
use culvert_core::{
    hbone::{Authority, Baggage, Connect, Forwarded, Traceparent},
    ids::WorkloadUid,
    mesh::{Workload, WorkloadKind},
};
use culvert_io::copy::{Initiator, relay, relay_plain, reset};
use std::{io, net::SocketAddr, sync::Arc};

/// Endpoints tried for one connection before it is refused.
const ATTEMPTS: usize = 3;

/// Why a captured connection was not carried.
#[derive(Debug, thiserror::Error)]
enum CaptureError {
    #[error("it was not redirected: someone in the pod dialled our port")]
    NotRedirected,
    #[error("discovery does not know this pod")]
    UnknownPod,
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error(transparent)]
    Tunnel(#[from] TunnelError),
    #[error(transparent)]
    Limit(#[from] AtLimit),
    #[error(transparent)]
    Declare(#[from] DeclareError),
    #[error("the agent gave no socket in time")]
    NoSocket,
    #[error("connecting: {0}")]
    Connect(io::Error),
}

impl CaptureError {
    fn reason(&self) -> &'static str {
        match self {
            Self::NotRedirected => "not_redirected",
            Self::UnknownPod => "unknown_pod",
            Self::Refused(refusal) => refusal.reason(),
            Self::Tunnel(error) => error.reason(),
            Self::Limit(_) => "limit",
            Self::Declare(_) => "guard",
            Self::NoSocket => "no_socket",
            Self::Connect(_) => "connect",
        }
    }
}

/// Carries one captured connection to its end.
pub async fn serve(accepted: Accepted, pod: Arc<Pod>, context: Arc<Context>) {
    let (source, destination) = (accepted.peer, accepted.original_destination());
    let mut socket = Some(accepted.socket);
    let Err(error) = carry(&mut socket, source, destination, &pod, &context).await else {
        return;
    };
    if let Some(socket) = socket {
        reset(&socket);
    }
    context
        .metrics
        .refused
        .with_label_values(&["outbound", error.reason()])
        .inc();
    tracing::warn!(target: "access", { src.addr = %source, src.identity = %pod.identity(),
        dst.addr = destination.map(tracing::field::display), direction = "outbound", %error }, "connection failed");
}

async fn carry(
    socket: &mut Option<tokio::net::TcpStream>,
    source: SocketAddr,
    destination: Option<SocketAddr>,
    pod: &Pod,
    context: &Arc<Context>,
) -> Result<(), CaptureError> {
    let destination = destination.ok_or(CaptureError::NotRedirected)?;
    let (_, own) = pod
        .workload(&context.discovery)
        .await
        .ok_or(CaptureError::UnknownPod)?;
    let mut avoid: Vec<WorkloadUid> = vec![];
    let mut failed = None;
    for _ in 0..ATTEMPTS {
        match decide(pod, context, &own, destination, &avoid).await {
            Route::Tunnel(hop) => {
                match Box::pin(through_tunnel(
                    socket,
                    source,
                    destination,
                    pod,
                    context,
                    &own,
                    &hop,
                ))
                .await
                {
                    Err(CaptureError::Tunnel(error)) if error.elsewhere() && hop.service.is_some() => {
                        avoid.push(hop.endpoint.uid.clone());
                        failed = Some(error);
                    }
                    done => return done,
                }
            }
            Route::Direct(direct) => {
                return Box::pin(directly(socket, source, destination, pod, context, &own, &direct)).await;
            }
            // Every endpoint has been tried: what went wrong there says more.
            Route::Refuse(Refusal::NoEndpoint(_)) if failed.is_some() => break,
            Route::Refuse(refusal) => return Err(refusal.into()),
            Route::Ask(address) => return Err(Refusal::Unanswered(address.ip).into()),
        }
    }
    Err(failed.map_or(CaptureError::UnknownPod, CaptureError::Tunnel))
}

/// Routes; when control has not answered for the address yet, asks it once and routes again.
async fn decide(
    pod: &Pod,
    context: &Context,
    own: &Workload,
    destination: SocketAddr,
    avoid: &[WorkloadUid],
) -> Route {
    let once = || {
        let snapshot = context.discovery.snapshot();
        route(&snapshot, own, destination, &mut |service, usable| {
            choose(service, own, usable, avoid, |endpoint| pod.tunnels.load(endpoint))
        })
    };
    match once() {
        Route::Ask(address) => {
            context.discovery.resolve(&address).await;
            once()
        }
        decided => decided,
    }
}

async fn through_tunnel(
    socket: &mut Option<tokio::net::TcpStream>,
    source: SocketAddr,
    destination: SocketAddr,
    pod: &Pod,
    context: &Arc<Context>,
    own: &Workload,
    hop: &Hop,
) -> Result<(), CaptureError> {
    let connect = Connect {
        authority: Authority::Address(hop.target),
        baggage: baggage(own),
        forwarded: Forwarded {
            source: Some(source),
            host: hop.service.as_ref().map(|service| service.hostname().into()),
        },
        traceparent: Some(Traceparent::new(rand::random(), rand::random())),
    };
    let facts = Facts {
        source,
        destination,
        way: Way::OutboundTunnel {
            endpoint: hop.endpoint.uid.clone(),
            peer: hop.endpoint.identity.clone(),
            target: hop.target,
            service: hop.service.as_ref().map(|service| service.key.clone()),
        },
    };
    let ends = context.metrics.ends(
        Reporter::Source,
        Party {
            workload: Some(own),
            identity: Some(pod.identity()),
        },
        Party {
            workload: Some(&hop.endpoint),
            identity: Some(&hop.endpoint.identity),
        },
    );
    let stream = pod.tunnels.open(pod, context, hop, &connect).await?;
    let open = pod
        .connections
        .open(facts, pod.identity(), ends, &context.metrics)?;
    if hop.would_deny.is_some() {
        context.metrics.would_deny.with_label_values(&["outbound"]).inc();
    }
    if let Some(socket) = socket.take() {
        let outcome = relay(socket, stream, &open.connection.flow, Initiator::Socket).await;
        open.ended(outcome);
    }
    Ok(())
}

/// Plaintext, to what is not enrolled: the host guard is told first (settled D8).
async fn directly(
    socket: &mut Option<tokio::net::TcpStream>,
    source: SocketAddr,
    destination: SocketAddr,
    pod: &Pod,
    context: &Arc<Context>,
    own: &Workload,
    direct: &Passthrough,
) -> Result<(), CaptureError> {
    let facts = Facts {
        source,
        destination,
        way: Way::OutboundDirect {
            endpoint: direct.endpoint.as_ref().map(|endpoint| endpoint.uid.clone()),
            target: direct.address,
        },
    };
    let ends = context.metrics.ends(
        Reporter::Source,
        Party {
            workload: Some(own),
            identity: Some(pod.identity()),
        },
        Party {
            workload: direct.endpoint.as_deref(),
            identity: None,
        },
    );
    let open = pod
        .connections
        .open(facts, pod.identity(), ends, &context.metrics)?;
    if direct.would_deny.is_some() {
        context.metrics.would_deny.with_label_values(&["outbound"]).inc();
    }
    context.declarations.declare(&pod.uid, direct.address).await?;
    let server = pod
        .sockets
        .tcp(direct.address.is_ipv6())
        .await
        .ok_or(CaptureError::NoSocket)?;
    let server = tokio::time::timeout(CONNECT_DEADLINE, server.connect(direct.address))
        .await
        .map_err(|_| CaptureError::Connect(io::ErrorKind::TimedOut.into()))?
        .map_err(CaptureError::Connect)?;
    if let Some(socket) = socket.take() {
        let outcome = relay_plain(socket, server, &open.connection.flow).await;
        open.ended(outcome);
    }
    Ok(())
}

/// What we say of ourselves, for the peer's telemetry.
fn baggage(own: &Workload) -> Baggage {
    let some = |text: &Arc<str>| Some(text.clone()).filter(|text| !text.is_empty());
    let kind = match own.kind {
        WorkloadKind::Deployment => "deployment",
        WorkloadKind::CronJob => "cronjob",
        WorkloadKind::Pod => "pod",
        WorkloadKind::Job => "job",
    };
    Baggage {
        cluster: some(&own.cluster),
        namespace: some(&own.namespace),
        workload: some(&own.workload_name).map(|name| (kind, name)),
        service_name: some(&own.canonical_name),
        service_version: some(&own.canonical_revision),
        region: some(&own.locality.region),
        zone: some(&own.locality.zone),
    }
}
