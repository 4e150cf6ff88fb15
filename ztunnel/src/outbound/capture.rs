//! A captured connection: from `accept` to the relay.

use super::{
    balance::{Choice, choose},
    route::{Hop, Passthrough, Refusal, Route, route},
    tunnel::TunnelError,
};
use crate::{
    accept::Accepted,
    access::{Known, Refusing, Served, given_up, refused},
    connections::{Facts, NoRoom, Open, Seat, Way},
    context::{CONNECT_DEADLINE, Context},
    metrics::{Flag, Reporter},
    node_protocol::DeclareError,
    pods::Pod,
    room::Place,
};
use culvert_core::{
    hbone::{Authority, Baggage, Connect, Forwarded, Traceparent},
    ids::{NetworkAddress, PodUid, PolicyKey, WorkloadUid},
    mesh::{Protocol, Workload, WorkloadKind},
    snapshot::{Lookup, Snapshot},
};
use culvert_io::{
    copy::{Initiator, relay, relay_plain, reset},
    hbone::{DIAL_PATIENCE, Stream},
};
use std::{
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{io::Interest, net::TcpStream};

/// Tries of one connection before it is refused: at other endpoints first, then where the way had failed.
const ATTEMPTS: usize = 5;

/// No try begins after this.
const TRY_WITHIN: Duration = Duration::from_secs(30);

/// Pause before an endpoint is tried again; doubled each time.
const TRY_AGAIN: Duration = Duration::from_millis(100);

/// How long a silent endpoint is waited for while another may take the connection.
const ELSEWHERE_AFTER: Duration = Duration::from_secs(3);

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
    NoRoom(#[from] NoRoom),
    #[error(transparent)]
    Declare(#[from] DeclareError),
    #[error("the agent gave no socket in time")]
    NoSocket,
    #[error("connecting: {0}")]
    Connect(io::Error),
    #[error("the application has given up")]
    GivenUp,
}

impl Refusing for CaptureError {
    fn reason(&self) -> &'static str {
        match self {
            Self::NotRedirected => "not_redirected",
            Self::UnknownPod => "unknown_pod",
            Self::Refused(refusal) => refusal.reason(),
            Self::Tunnel(error) => error.reason(),
            Self::NoRoom(_) => "limit",
            Self::Declare(_) => "guard",
            Self::NoSocket => "no_socket",
            Self::Connect(_) => "connect",
            Self::GivenUp => "given_up",
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
            Self::Refused(Refusal::Denied(_) | Refusal::EgressDenied | Refusal::Undeclared(_)) => Flag::Deny,
            Self::Tunnel(error) => error.flag(),
            _ => Flag::Connect,
        }
    }
}

/// A connection that is up: both its ends, and its place on the list.
struct Carried<'p> {
    socket: TcpStream,
    to: To,
    open: Open<'p>,
    /// For the other end's socket, where there is one.
    descriptor: Option<Place<PodUid>>,
}

/// Where a connection goes on.
enum To {
    Tunnel(Stream),
    Server(TcpStream),
}

/// Carries one captured connection to its end.
pub async fn serve(accepted: Accepted, pod: Arc<Pod>, context: Arc<Context>) {
    // In a box of its own: what bringing it up takes is gone once it is up, however long it then lasts.
    let brought_up = Box::pin(bring_up(accepted, &pod, &context)).await;
    let Some((carried, _seat)) = brought_up else {
        return;
    };
    let Carried {
        socket,
        to,
        mut open,
        descriptor,
    } = carried;
    open.opened();
    let outcome = match to {
        To::Tunnel(stream) => relay(socket, stream, &open.connection.flow, Initiator::Socket).await,
        To::Server(server) => relay_plain(socket, server, &open.connection.flow).await,
    };
    open.ended(outcome);
    drop(descriptor);
}

/// What is known of a captured connection before anything is decided.
fn captured(accepted: &Accepted, pod: &Pod) -> Known {
    let mut known = Known::new(Reporter::Source, accepted.peer, accepted.original_destination());
    known.source_identity = Some(pod.identity().clone());
    known.trace = Some(Traceparent::new(rand::random(), rand::random()));
    known
}

/// What can be said of one that is not served at all.
pub fn unserved(accepted: &Accepted, pod: &Pod, context: &Context) -> Known {
    let mut known = captured(accepted, pod);
    let snapshot = context.discovery.snapshot();
    known.source = snapshot.workload(&pod.workload_uid).cloned();
    if let (Some(own), Some(destination)) = (known.source.clone(), known.destination_address) {
        // Asking is not for those who are turned away: what is known already is said.
        let undecided = Route::Refuse(Refusal::Unanswered(destination.ip()));
        meet(&mut known, &snapshot, &own, destination, &undecided, None);
    }
    known
}

/// Brings the connection up, or refuses it.
async fn bring_up<'p>(
    accepted: Accepted,
    pod: &'p Arc<Pod>,
    context: &Arc<Context>,
) -> Option<(Carried<'p>, Seat<'p>)> {
    let seat = match pod.connections.enter() {
        Ok(seat) => seat,
        Err(limit) => {
            refused(&context.metrics, &unserved(&accepted, pod, context), &limit);
            reset(&accepted.socket);
            return None;
        }
    };
    let mut known = captured(&accepted, pod);
    let mut socket = Some(accepted.socket);
    let error = match carry(&mut socket, &mut known, pod, context).await {
        Ok(carried) => return carried.map(|carried| (carried, seat)),
        Err(error) => error,
    };
    // The record first: whoever sees the reset finds it.
    match &error {
        CaptureError::GivenUp => given_up(&context.metrics, &known, &error),
        error => refused(&context.metrics, &known, error),
    }
    if let Some(socket) = socket {
        reset(&socket);
    }
    None
}

async fn carry<'p>(
    socket: &mut Option<TcpStream>,
    known: &mut Known,
    pod: &'p Arc<Pod>,
    context: &Arc<Context>,
) -> Result<Option<Carried<'p>>, CaptureError> {
    let destination = known.destination_address.ok_or(CaptureError::NotRedirected)?;
    let (_, own) = pod
        .workload(&context.discovery)
        .await
        .ok_or(CaptureError::UnknownPod)?;
    known.source = Some(own.clone());
    let began = Instant::now();
    let mut avoid: Vec<WorkloadUid> = vec![];
    let mut failed: Option<TunnelError> = None;
    for attempt in 0..ATTEMPTS {
        let Decided { route, others } = decide(pod, context, &own, destination, &avoid, known).await;
        match route {
            Route::Tunnel(hop) => {
                let patience = if others { ELSEWHERE_AFTER } else { DIAL_PATIENCE };
                let tunnelled =
                    through_tunnel(socket, destination, known, pod, context, &own, &hop, patience);
                match Box::pin(tunnelled).await {
                    Err(CaptureError::Tunnel(error)) if error.elsewhere() && hop.service.is_some() => {
                        context.failing.failed(&hop.endpoint.uid);
                        avoid.push(hop.endpoint.uid.clone());
                        failed = Some(error);
                    }
                    Err(CaptureError::Tunnel(error)) if error.passes() => {
                        failed = Some(error);
                        wait_for_another_try(socket.as_ref(), attempt).await?;
                    }
                    done => return done,
                }
            }
            Route::Direct(direct) => {
                return Box::pin(directly(socket, destination, known, pod, context, &direct)).await;
            }
            // Every endpoint has been tried: what went wrong there says more.
            Route::Refuse(Refusal::NoEndpoint(service)) => match failed.take() {
                Some(error) if error.passes() => {
                    failed = Some(error);
                    avoid.clear();
                    wait_for_another_try(socket.as_ref(), attempt).await?;
                }
                Some(error) => return Err(error.into()),
                None => return Err(Refusal::NoEndpoint(service).into()),
            },
            Route::Refuse(refusal) => return Err(refusal.into()),
            Route::Ask(address) => return Err(Refusal::Unanswered(address.ip).into()),
        }
        if began.elapsed() > TRY_WITHIN {
            break;
        }
    }
    Err(failed.map_or(CaptureError::UnknownPod, CaptureError::Tunnel))
}

async fn wait_for_another_try(socket: Option<&TcpStream>, attempt: usize) -> Result<(), CaptureError> {
    tokio::select! {
        () = tokio::time::sleep(TRY_AGAIN * (1 << attempt)) => Ok(()),
        () = has_given_up(socket) => Err(CaptureError::GivenUp),
    }
}

/// Returns once the application has reset its connection. One that has only sent its end still waits.
async fn has_given_up(socket: Option<&TcpStream>) {
    let Some(socket) = socket else {
        return std::future::pending().await;
    };
    // It fails only while the runtime ends.
    let _ = socket.ready(Interest::ERROR).await;
}

/// A route, and whether another endpoint could have been chosen.
struct Decided {
    route: Route,
    others: bool,
}

/// Routes; when control has not answered for the address yet, asks it once and routes again.
async fn decide(
    pod: &Pod,
    context: &Context,
    own: &Workload,
    destination: SocketAddr,
    avoid: &[WorkloadUid],
    known: &mut Known,
) -> Decided {
    let mut once = || {
        let snapshot = context.discovery.snapshot();
        let (mut chosen, mut others) = (None, false);
        let route = route(&snapshot, own, destination, &mut |service, usable| {
            let untried = usable.iter().filter(|endpoint| !avoid.contains(&endpoint.uid));
            others = untried.count() > 1;
            let by = Choice {
                client: &pod.uid,
                sessions: &pod.sessions,
                avoid,
                failing: &context.failing,
                load: &|endpoint| pod.tunnels.load(endpoint),
            };
            let index = choose(service, own, usable, &by)?;
            chosen = usable.get(index).cloned();
            Some(index)
        });
        meet(known, &snapshot, own, destination, &route, chosen);
        Decided { route, others }
    };
    let decided = once();
    if let Route::Ask(address) = &decided.route {
        context.discovery.resolve(address).await;
        return once();
    }
    decided
}

/// Keeps who is at the other end: of what is refused, who it would have been.
fn meet(
    known: &mut Known,
    snapshot: &Snapshot,
    own: &Workload,
    destination: SocketAddr,
    routed: &Route,
    chosen: Option<Arc<Workload>>,
) {
    let address = NetworkAddress {
        network: own.network.clone(),
        ip: destination.ip(),
    };
    let (endpoint, service) = match routed {
        Route::Tunnel(hop) => (Some(hop.endpoint.clone()), hop.service.clone()),
        Route::Direct(direct) => (direct.endpoint.clone(), direct.service.clone()),
        Route::Refuse(Refusal::NoEndpoint(_)) if known.destination.is_some() => return,
        Route::Refuse(_) | Route::Ask(_) => match snapshot.lookup(&address, &own.namespace) {
            Lookup::Workload(endpoint) => (Some(endpoint.clone()), None),
            Lookup::Service(service) => (chosen, Some(service.clone())),
            Lookup::Unknown | Lookup::Unanswered => (None, None),
        },
    };
    let enrolled = endpoint
        .as_ref()
        .filter(|workload| workload.protocol == Protocol::Hbone);
    known.destination_identity = enrolled.map(|workload| workload.identity.clone());
    known.destination = endpoint;
    known.service = service.map(Served::Whole);
}

#[expect(
    clippy::too_many_arguments,
    reason = "each is of another kind, and they meet here alone"
)]
async fn through_tunnel<'p>(
    socket: &mut Option<TcpStream>,
    destination: SocketAddr,
    known: &mut Known,
    pod: &'p Arc<Pod>,
    context: &Arc<Context>,
    own: &Workload,
    hop: &Hop,
    patience: Duration,
) -> Result<Option<Carried<'p>>, CaptureError> {
    let connect = Connect {
        authority: Authority::Address(hop.target),
        baggage: baggage(own),
        forwarded: Forwarded {
            source: Some(known.source_address),
            host: hop.service.as_ref().map(|service| service.hostname().into()),
        },
        traceparent: known.trace,
    };
    known.destination_address = Some(hop.peer);
    known.hbone_address = Some(hop.target);
    let facts = Facts {
        source: known.source_address,
        destination,
        way: Way::OutboundTunnel {
            endpoint: hop.endpoint.uid.clone(),
            peer: hop.endpoint.identity.clone(),
            target: hop.target,
            service: hop.service.as_ref().map(|service| service.key.clone()),
        },
    };
    let stream = tokio::select! {
        stream = pod.tunnels.open(pod, context, hop, &connect, patience) => stream?,
        () = has_given_up(socket.as_ref()) => return Err(CaptureError::GivenUp),
    };
    context.failing.works(&hop.endpoint.uid);
    if let Some(service) = &hop.service {
        pod.sessions.used(service, &hop.endpoint.uid);
    }
    let open = pod.connections.open(facts, known, &context.metrics);
    context
        .metrics
        .admitted(Reporter::Source, hop.policy.as_ref(), hop.would_deny.as_ref());
    let to = To::Tunnel(stream);
    Ok(socket.take().map(|socket| Carried {
        socket,
        to,
        open,
        descriptor: None,
    }))
}

/// Plaintext, to what is not enrolled: the host guard is told first (settled D8).
async fn directly<'p>(
    socket: &mut Option<TcpStream>,
    destination: SocketAddr,
    known: &mut Known,
    pod: &'p Pod,
    context: &Arc<Context>,
    direct: &Passthrough,
) -> Result<Option<Carried<'p>>, CaptureError> {
    known.destination_address = Some(direct.address);
    let facts = Facts {
        source: known.source_address,
        destination,
        way: Way::OutboundDirect {
            endpoint: direct.endpoint.as_ref().map(|endpoint| endpoint.uid.clone()),
            target: direct.address,
        },
    };
    let open = pod.connections.open(facts, known, &context.metrics);
    context.metrics.admitted(
        Reporter::Source,
        direct.policy.as_ref(),
        direct.would_deny.as_ref(),
    );
    let descriptor = context.descriptors.enter(&pod.uid).ok_or(NoRoom)?;
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
    let to = To::Server(server);
    Ok(socket.take().map(|socket| Carried {
        socket,
        to,
        open,
        descriptor: Some(descriptor),
    }))
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
