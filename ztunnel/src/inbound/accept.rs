//! The tunnel's accepting end in a pod.

use super::{
    admit::{Arrival, Permit, Refusal, Target, admit},
    deliver::{DeliverError, deliver},
    pace::Paced,
};
use crate::{
    accept::Accepted,
    access::{Known, Refusing, Served, given_up, refused},
    connections::{AtLimit, Facts, NoRoom, Open, Seat, Way},
    context::{Context, IDENTITY_PATIENCE},
    metrics::{Flag, Reporter},
    pods::Pod,
    room::Place,
    trust::{Direction, Live},
};
use culvert_core::{
    hbone::{Authority, Connect, ConnectError, Traceparent},
    ids::{NetworkAddress, PodUid, PolicyKey, ServiceKey, SpiffeId},
    mesh::{PortMap, Workload},
    snapshot::Snapshot,
};
use culvert_io::{
    copy::{Fault, Initiator, relay},
    hbone::{self, AcceptError, Incoming, Responder, accept},
    tls::{VerifyError, server_config},
};
use http::StatusCode;
use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Instant,
};
use tokio::net::TcpStream;

/// Why a stream was refused.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error(transparent)]
    Deliver(#[from] DeliverError),
    #[error(transparent)]
    Limit(#[from] AtLimit),
    #[error(transparent)]
    NoRoom(#[from] NoRoom),
    #[error("streams of its tunnel buffer all that they may")]
    Buffers,
    #[error("the peer has given it up")]
    Abandoned,
}

impl StreamError {
    fn status(&self) -> StatusCode {
        match self {
            Self::Connect(error) => error.status(),
            Self::Refused(refusal) => refusal.status(),
            Self::Deliver(_) | Self::Limit(_) | Self::NoRoom(_) | Self::Buffers | Self::Abandoned => {
                StatusCode::SERVICE_UNAVAILABLE
            }
        }
    }
}

impl Refusing for StreamError {
    fn reason(&self) -> &'static str {
        match self {
            Self::Connect(_) => "bad_request",
            Self::Refused(refusal) => refusal.reason(),
            Self::Deliver(_) => "application",
            Self::Limit(_) | Self::NoRoom(_) | Self::Buffers => "limit",
            Self::Abandoned => "abandoned",
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

/// Why a connection to the tunnel's port became no tunnel.
#[derive(Debug, thiserror::Error)]
enum HandshakeError {
    #[error("its source has its share of this workload's tunnels")]
    Tunnels,
    #[error("{0} has its share of handshakes in flight")]
    Handshakes(&'static str),
    #[error("this pod has no valid SVID")]
    Identity,
    #[error("TLS configuration: {0}")]
    Config(#[from] rustls::Error),
    #[error(transparent)]
    Accept(#[from] AcceptError),
}

impl Refusing for HandshakeError {
    fn reason(&self) -> &'static str {
        match self {
            Self::Tunnels | Self::Handshakes(_) => "limit",
            Self::Identity => "identity",
            Self::Config(_) => "config",
            Self::Accept(error) => error.verdict().map_or("handshake", VerifyError::reason),
        }
    }

    fn policy(&self) -> Option<&PolicyKey> {
        None
    }

    fn flag(&self) -> Flag {
        match self {
            Self::Tunnels | Self::Handshakes(_) => Flag::Connect,
            Self::Identity => Flag::IdentityError,
            Self::Accept(AcceptError::Http(_)) => Flag::H2HandshakeFailure,
            Self::Accept(error) if matches!(error.verdict(), Some(VerifyError::Revoked(_))) => {
                Flag::CertRevoked
            }
            Self::Config(_) | Self::Accept(_) => Flag::TlsFailure,
        }
    }
}

/// Takes a tunnel up and serves its streams until it ends.
pub async fn serve(accepted: Accepted, pod: Arc<Pod>, context: Arc<Context>) {
    let Accepted { socket, peer, local } = accepted;
    let started = Instant::now();
    let count = |outcome: &str| {
        let tunnels = &context.metrics.tunnels;
        tunnels.with_label_values(&["inbound", outcome]).inc();
    };
    let refuse = |error: &HandshakeError| {
        count(error.reason());
        refused(&context.metrics, &tunnel_of(peer, local, &pod, &context), error);
    };
    // Before any work is done for it; what comes beyond a share is shed.
    let Some(_tunnel) = pod.accepted.enter(&peer.ip()) else {
        return refuse(&HandshakeError::Tunnels);
    };
    let incoming = match handshake(socket, peer.ip(), &pod, &context).await {
        Ok(incoming) => incoming,
        Err(error) => {
            return refuse(&error);
        }
    };
    count("up");
    context
        .metrics
        .handshake_seconds
        .with_label_values(&["inbound"])
        .observe(started.elapsed().as_secs_f64());
    let open = context.metrics.tunnel(Reporter::Destination);
    streams(incoming, peer, local, pod, context).await;
    drop(open);
}

/// What is known of a connection to the tunnel's port before its peer has proved who it is.
fn tunnel_of(peer: SocketAddr, local: SocketAddr, pod: &Pod, context: &Context) -> Known {
    let mut known = Known::new(Reporter::Destination, peer, Some(local));
    known.destination_identity = Some(pod.identity().clone());
    known.between(&context.discovery.snapshot(), &pod.workload_uid);
    known
}

/// What can be said of a connection that is not served at all.
pub fn unserved(accepted: &Accepted, pod: &Pod, context: &Context) -> Known {
    tunnel_of(accepted.peer, accepted.local, pod, context)
}

async fn handshake(
    socket: TcpStream,
    peer: IpAddr,
    pod: &Pod,
    context: &Context,
) -> Result<Incoming<TcpStream>, HandshakeError> {
    let _node = context
        .handshakes
        .enter(&pod.uid)
        .ok_or(HandshakeError::Handshakes("this workload"))?;
    let _pod = pod
        .handshakes
        .enter(&peer)
        .ok_or(HandshakeError::Handshakes("its source"))?;
    let credential = pod
        .lease
        .wait(IDENTITY_PATIENCE)
        .await
        .ok_or(HandshakeError::Identity)?;
    let config = server_config(&credential.svid, &credential.bundles)?;
    let incoming = Paced::new(accept(socket, config, &pod.budget)).await?;
    let tunnel = Live::new(Direction::Inbound, peer, incoming.watch(), &credential);
    pod.live.add(tunnel);
    Ok(incoming)
}

async fn streams(
    mut incoming: Incoming<TcpStream>,
    peer: SocketAddr,
    local: SocketAddr,
    pod: Arc<Pod>,
    context: Arc<Context>,
) {
    let identity = incoming.peer().clone();
    let mut drained = false;
    loop {
        let next = tokio::select! {
            next = incoming.next() => next,
            () = context.draining(), if !drained => {
                drained = true;
                incoming.drain();
                continue;
            }
            () = pod.left() => return,
        };
        let Some((asked, responder)) = next else {
            if incoming.is_flooded() {
                flooded(&context, &pod, peer, &identity);
            }
            return;
        };
        let stream = Stream {
            peer,
            local,
            identity: identity.clone(),
        };
        tokio::spawn(Box::pin(stream.serve(
            asked,
            responder,
            pod.clone(),
            context.clone(),
        )));
    }
}

/// A peer that sent more frames than work was told to calm down, and its tunnel has ended.
fn flooded(context: &Context, pod: &Pod, peer: SocketAddr, identity: &SpiffeId) {
    context
        .metrics
        .tunnels
        .with_label_values(&["inbound", "flood"])
        .inc();
    tracing::warn!(target: "access", { src.addr = %peer, src.identity = %identity, dst.identity = %pod.identity(),
        direction = "inbound", error = "its frames were more than its work" }, "tunnel ended");
}

/// A connection that is up: both its ends, and its place on the list.
struct Carried<'p> {
    application: TcpStream,
    stream: hbone::Stream,
    open: Open<'p>,
    seat: Seat<'p>,
    /// For the application's socket.
    descriptor: Place<PodUid>,
}

/// Where a stream came from.
struct Stream {
    peer: SocketAddr,
    local: SocketAddr,
    identity: SpiffeId,
}

impl Stream {
    async fn serve(
        self,
        asked: Result<Connect, ConnectError>,
        responder: Responder,
        pod: Arc<Pod>,
        context: Arc<Context>,
    ) {
        // In a box of its own: what bringing it up takes is gone once it is up, however long it then lasts.
        let brought_up = Box::pin(self.bring_up(asked, responder, &pod, &context)).await;
        let Some(Carried {
            application,
            stream,
            open,
            seat: _seat,
            descriptor: _held,
        }) = brought_up
        else {
            return;
        };
        let outcome = relay(application, stream, &open.connection.flow, Initiator::Stream).await;
        open.ended(outcome);
    }

    /// Brings the connection up, or refuses it.
    async fn bring_up<'p>(
        self,
        asked: Result<Connect, ConnectError>,
        responder: Responder,
        pod: &'p Pod,
        context: &Context,
    ) -> Option<Carried<'p>> {
        let mut responder = Some(responder);
        let mut known = Known::new(Reporter::Destination, self.peer, Some(self.local));
        known.source_identity = Some(self.identity.clone());
        known.destination_identity = Some(pod.identity().clone());
        let carried = self.carry(asked, &mut responder, &mut known, pod, context);
        let error = match carried.await {
            Ok(carried) => return carried,
            Err(error) => error,
        };
        if known.destination.is_none() {
            known.between(&context.discovery.snapshot(), &pod.workload_uid);
        }
        // The record first: whoever sees the answer finds it.
        match &error {
            StreamError::Abandoned => given_up(&context.metrics, &known, &error),
            error => refused(&context.metrics, &known, error),
        }
        match (responder, &error) {
            // Another tunnel of the same peer may have room.
            (Some(responder), StreamError::Buffers) => responder.decline(),
            (Some(responder), _) => responder.refuse(error.status()),
            (None, _) => {}
        }
        None
    }

    async fn carry<'p>(
        &self,
        asked: Result<Connect, ConnectError>,
        responder: &mut Option<Responder>,
        known: &mut Known,
        pod: &'p Pod,
        context: &Context,
    ) -> Result<Option<Carried<'p>>, StreamError> {
        let connect = asked?;
        let seat = pod.connections.enter()?;
        if responder.as_ref().is_some_and(|responder| !responder.has_room()) {
            return Err(StreamError::Buffers);
        }
        let client = self.peer.ip();
        known.trace = connect
            .traceparent
            .or_else(|| Some(Traceparent::new(rand::random(), rand::random())));
        let (snapshot, own) = known_peer(pod, context, client)
            .await
            .ok_or(Refusal::UnknownPod)?;
        let source = snapshot.workload_at(&NetworkAddress {
            network: own.network.clone(),
            ip: client,
        });
        known.source = source.cloned();
        known.destination = Some(own.clone());
        known.service = match &connect.authority {
            Authority::Address(address) => {
                known.hbone_address = Some(*address);
                let named = connect.forwarded.host.as_deref();
                service_of(&snapshot, &own, named, address.port())
            }
            Authority::Host { name, port } => service_of(&snapshot, &own, Some(name), *port),
        };
        let arrival = Arrival {
            workload: Some(&own),
            accepted_ip: self.local.ip(),
            peer_ip: client,
            identity: Some(&self.identity),
            target: Target::Authority(&connect.authority),
        };
        let permit: Permit = admit(&snapshot, &arrival)?;
        known.hbone_address = Some(permit.target());
        let metrics = &context.metrics;
        metrics.admitted(
            Reporter::Destination,
            permit.policy.as_ref(),
            permit.would_deny.as_ref(),
        );
        drop(snapshot);
        let facts = Facts {
            source: self.peer,
            destination: permit.target(),
            way: Way::InboundTunnel {
                peer: self.identity.clone(),
                authority: connect.authority,
                accepted_ip: self.local.ip(),
            },
        };
        let mut open = pod.connections.open(facts, known, metrics);
        let started = Instant::now();
        let descriptor = context.descriptors.enter(&pod.uid).ok_or(NoRoom)?;
        let abandoned = async {
            match responder {
                Some(responder) => responder.abandoned().await,
                None => std::future::pending().await,
            }
        };
        // A peer that resets what it has just asked for shall not have applications dialled by the thousand.
        let application = tokio::select! {
            delivered = deliver(pod, &permit, client) => delivered?,
            () = abandoned => return Err(StreamError::Abandoned),
        };
        metrics
            .application_seconds
            .observe(started.elapsed().as_secs_f64());
        let Some(responder) = responder.take() else {
            return Ok(None);
        };
        open.opened();
        match responder.accept() {
            Ok(stream) => Ok(Some(Carried {
                application,
                stream,
                open,
                seat,
                descriptor,
            })),
            Err(error) => {
                open.ended(Err(Fault::Tunnel(error)));
                Ok(None)
            }
        }
    }
}

/// The pod's service that a connection was for, for telemetry alone: the one that the source names, if it is
/// one of the pod's, else the first that has the port behind it.
pub fn service_of(snapshot: &Snapshot, own: &Workload, named: Option<&str>, target: u16) -> Option<Served> {
    let behind = |(key, ports): &&(ServiceKey, Box<[PortMap]>)| {
        let of_service = snapshot.service(key).map(|service| &service.ports);
        ports
            .iter()
            .chain(of_service.into_iter().flatten())
            .any(|map| map.target == Some(target))
    };
    let services = || own.services.iter();
    let (key, _) = services()
        .find(|(key, _)| Some(key.hostname()) == named)
        .or_else(|| services().find(behind))?;
    let whole = snapshot.service(key).cloned().map(Served::Whole);
    Some(whole.unwrap_or_else(|| Served::Named(key.clone())))
}

/// The view to judge on: with this pod in it, and with what control says of the peer's address.
pub async fn known_peer(
    pod: &Pod,
    context: &Context,
    peer: IpAddr,
) -> Option<(Arc<Snapshot>, Arc<culvert_core::mesh::Workload>)> {
    let (_, own) = pod.workload(&context.discovery).await?;
    context
        .discovery
        .resolve(&NetworkAddress {
            network: own.network.clone(),
            ip: peer,
        })
        .await;
    pod.workload(&context.discovery).await
}
