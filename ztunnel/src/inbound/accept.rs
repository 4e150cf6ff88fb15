//! The tunnel's accepting end in a pod.

use super::{
    admit::{Arrival, Permit, Refusal, Target, admit},
    deliver::{DeliverError, deliver},
};
use crate::{
    accept::Accepted,
    connections::{AtLimit, Facts, Way},
    context::{Context, IDENTITY_PATIENCE},
    metrics::{Party, Reporter},
    pods::Pod,
};
use culvert_core::{
    hbone::{Connect, ConnectError},
    ids::{NetworkAddress, SpiffeId},
    snapshot::Snapshot,
};
use culvert_io::{
    copy::{Fault, Initiator, relay},
    hbone::{AcceptError, Incoming, Responder, accept},
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
}

impl StreamError {
    fn status(&self) -> StatusCode {
        match self {
            Self::Connect(error) => error.status(),
            Self::Refused(refusal) => refusal.status(),
            Self::Deliver(_) | Self::Limit(_) => StatusCode::SERVICE_UNAVAILABLE,
        }
    }

    pub fn reason(&self) -> &'static str {
        match self {
            Self::Connect(_) => "bad_request",
            Self::Refused(refusal) => refusal.reason(),
            Self::Deliver(_) => "application",
            Self::Limit(_) => "limit",
        }
    }
}

/// Takes a tunnel up and serves its streams until it ends.
pub async fn serve(accepted: Accepted, pod: Arc<Pod>, context: Arc<Context>) {
    let Accepted { socket, peer, local } = accepted;
    let started = Instant::now();
    let incoming = match handshake(socket, &pod).await {
        Ok(incoming) => incoming,
        Err((reason, error)) => {
            context
                .metrics
                .tunnels
                .with_label_values(&["inbound", reason])
                .inc();
            tracing::warn!(target: "access", { src.addr = %peer, dst.addr = %local, dst.identity = %pod.identity(),
                direction = "inbound", %error }, "tunnel refused");
            return;
        }
    };
    context
        .metrics
        .tunnels
        .with_label_values(&["inbound", "up"])
        .inc();
    context
        .metrics
        .handshake_seconds
        .with_label_values(&["inbound"])
        .observe(started.elapsed().as_secs_f64());
    streams(incoming, peer, local.ip(), pod, context).await;
}

async fn handshake(socket: TcpStream, pod: &Pod) -> Result<Incoming<TcpStream>, (&'static str, String)> {
    // Beyond the bound the newest are shed, before any work is done for them.
    let _pending = pod
        .pending
        .try_acquire()
        .map_err(|_| ("limit", "too many handshakes in flight".to_owned()))?;
    let credential = pod
        .lease
        .wait(IDENTITY_PATIENCE)
        .await
        .ok_or(("identity", "this pod has no valid SVID".to_owned()))?;
    let config =
        server_config(&credential.svid, &credential.bundles).map_err(|e| ("config", e.to_string()))?;
    accept(socket, config).await.map_err(|e: AcceptError| {
        (
            e.verdict().map_or("handshake", VerifyError::reason),
            e.to_string(),
        )
    })
}

async fn streams(
    mut incoming: Incoming<TcpStream>,
    peer: SocketAddr,
    accepted_ip: IpAddr,
    pod: Arc<Pod>,
    context: Arc<Context>,
) {
    let identity = incoming.peer.clone();
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
        let Some((asked, responder)) = next else { return };
        let stream = Stream {
            peer,
            accepted_ip,
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

/// Where a stream came from.
struct Stream {
    peer: SocketAddr,
    accepted_ip: IpAddr,
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
        let mut responder = Some(responder);
        let Err(error) = self.carry(asked, &mut responder, &pod, &context).await else {
            return;
        };
        if let Some(responder) = responder {
            responder.refuse(error.status());
        }
        context
            .metrics
            .refused
            .with_label_values(&["inbound", error.reason()])
            .inc();
        tracing::warn!(target: "access", { src.addr = %self.peer, src.identity = %self.identity,
            dst.addr = %self.accepted_ip, dst.identity = %pod.identity(), direction = "inbound", %error }, "connection failed");
    }

    async fn carry(
        &self,
        asked: Result<Connect, ConnectError>,
        responder: &mut Option<Responder>,
        pod: &Pod,
        context: &Context,
    ) -> Result<(), StreamError> {
        let connect = asked?;
        let client = self.peer.ip();
        let (snapshot, own) = known_peer(pod, context, client)
            .await
            .ok_or(Refusal::UnknownPod)?;
        let arrival = Arrival {
            workload: Some(&own),
            accepted_ip: self.accepted_ip,
            peer_ip: client,
            identity: Some(&self.identity),
            target: Target::Authority(&connect.authority),
        };
        let permit: Permit = admit(&snapshot, &arrival)?;
        if permit.would_deny.is_some() {
            context.metrics.would_deny.with_label_values(&["inbound"]).inc();
        }
        let source = snapshot.workload_at(&NetworkAddress {
            network: own.network.clone(),
            ip: client,
        });
        let ends = context.metrics.ends(
            Reporter::Destination,
            Party {
                workload: source.map(AsRef::as_ref),
                identity: Some(&self.identity),
            },
            Party {
                workload: Some(&own),
                identity: Some(pod.identity()),
            },
        );
        drop(snapshot);
        let facts = Facts {
            source: self.peer,
            destination: permit.target(),
            way: Way::InboundTunnel {
                peer: self.identity.clone(),
                authority: connect.authority,
                accepted_ip: self.accepted_ip,
            },
        };
        let open = pod
            .connections
            .open(facts, pod.identity(), ends, &context.metrics)?;
        let application = deliver(pod, &permit, client).await?;
        let Some(responder) = responder.take() else {
            return Ok(());
        };
        let outcome = match responder.accept() {
            Ok(stream) => relay(application, stream, &open.connection.flow, Initiator::Stream).await,
            Err(error) => Err(Fault::Tunnel(error)),
        };
        open.ended(outcome);
        Ok(())
    }
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
