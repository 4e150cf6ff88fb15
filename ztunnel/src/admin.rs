//! The pages of ztunnel: readiness, metrics, and what is open, each on its own port.
//!
//! Invariant: pages are read-only. Configuration and connections are shown on loopback alone (settled
//! D22); an unknown path is 404.

use crate::{connections::Way, context::Context};
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::{Value, json};
use std::{convert::Infallible, io, net::SocketAddr, sync::Arc, sync::atomic::Ordering, time::Duration};
use tokio::{net::TcpListener, sync::Semaphore};

/// Requests served at once on one port.
const AT_ONCE: usize = 32;
/// How long a request's head may take.
const HEAD_DEADLINE: Duration = Duration::from_secs(5);
/// How long one connection may last.
const CONNECTION_DEADLINE: Duration = Duration::from_secs(30);

/// Which pages a port has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pages {
    Admin,
    Metrics,
    Readiness,
}

/// Listens now, so that a taken port ends the start; the second step serves.
pub async fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    match TcpListener::bind(address).await {
        // A node without IPv6 serves on IPv4.
        Err(_) if address.is_ipv6() && address.ip().is_unspecified() => {
            TcpListener::bind(("0.0.0.0", address.port())).await
        }
        bound => bound,
    }
}

/// Serves for as long as it is polled.
pub async fn serve(listener: TcpListener, pages: Pages, context: Arc<Context>) {
    let at_once = Arc::new(Semaphore::new(AT_ONCE));
    loop {
        let Ok(permit) = at_once.clone().acquire_owned().await else {
            return;
        };
        let socket = match listener.accept().await {
            Ok((socket, _)) => socket,
            Err(_) => {
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let context = context.clone();
        tokio::spawn(async move {
            let answer = service_fn(move |request: Request<Incoming>| {
                let answer = respond(&request, pages, &context);
                async move { Ok::<_, Infallible>(answer) }
            });
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD_DEADLINE)
                .max_buf_size(16 * 1024)
                .keep_alive(false)
                .serve_connection(TokioIo::new(socket), answer);
            // A client that misbehaves is its own trouble.
            let _ = tokio::time::timeout(CONNECTION_DEADLINE, connection).await;
            drop(permit);
        });
    }
}

fn respond(request: &Request<Incoming>, pages: Pages, context: &Context) -> Response<Full<Bytes>> {
    if request.method() != Method::GET {
        return page(StatusCode::METHOD_NOT_ALLOWED, "text/plain", "only GET\n");
    }
    match (pages, request.uri().path()) {
        (Pages::Readiness, "/healthz/ready") => {
            if *context.drain.borrow() {
                page(StatusCode::SERVICE_UNAVAILABLE, "text/plain", "draining\n")
            } else if context.discovery.is_ready() {
                page(StatusCode::OK, "text/plain", "ready\n")
            } else {
                page(
                    StatusCode::SERVICE_UNAVAILABLE,
                    "text/plain",
                    "waiting for control's first answer\n",
                )
            }
        }
        (Pages::Metrics, "/metrics" | "/stats/prometheus") => page(
            StatusCode::OK,
            "text/plain; version=0.0.4",
            context.metrics.text(),
        ),
        (Pages::Admin, "/config_dump") => json_page(&config_dump(context)),
        (Pages::Admin, "/debug/connections") => json_page(&connections(context)),
        (Pages::Admin, "/") => page(StatusCode::OK, "text/plain", "/config_dump\n/debug/connections\n"),
        _ => page(StatusCode::NOT_FOUND, "text/plain", "no such page\n"),
    }
}

fn page(status: StatusCode, kind: &'static str, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(http::header::CONTENT_TYPE, http::HeaderValue::from_static(kind));
    response
}

fn json_page(value: &Value) -> Response<Full<Bytes>> {
    page(StatusCode::OK, "application/json", format!("{value:#}\n"))
}

/// Everything that decisions depend on, keys excepted.
fn config_dump(context: &Context) -> Value {
    let snapshot = context.discovery.snapshot();
    let workloads: Vec<_> = snapshot
        .workloads()
        .map(|workload| {
            json!({
                "uid": workload.uid.as_str(),
                "name": &*workload.name,
                "namespace": &*workload.namespace,
                "serviceAccount": &*workload.service_account,
                "identity": workload.identity.as_str(),
                "workloadIps": workload.addresses,
                "protocol": format!("{:?}", workload.protocol),
                "node": &*workload.node,
                "status": format!("{:?}", workload.health),
                "authorizationPolicies": workload.policies.iter().map(|key| key.as_str()).collect::<Vec<_>>(),
            })
        })
        .collect();
    let services: Vec<_> = snapshot
        .services()
        .map(|service| {
            json!({
                "name": &*service.name,
                "namespace": service.namespace(),
                "hostname": service.hostname(),
                "vips": service.vips.iter().map(|vip| vip.resource_name()).collect::<Vec<_>>(),
                "endpoints": snapshot.endpoints(&service.key).iter().map(|w| w.uid.as_str()).collect::<Vec<_>>(),
            })
        })
        .collect();
    let policies = |set: &culvert_core::snapshot::PolicySet| {
        set.iter()
            .map(|policy| {
                json!({
                    "name": policy.key.name(),
                    "namespace": policy.key.namespace(),
                    "scope": format!("{:?}", policy.scope),
                    "action": format!("{:?}", policy.action),
                    "dryRun": policy.dry_run,
                    "defect": policy.defect,
                    "rules": format!("{:?}", policy.rules),
                })
            })
            .collect::<Vec<_>>()
    };
    let certificates: Vec<_> = context
        .identities
        .all()
        .into_iter()
        .map(|(id, held)| {
            json!({
                "identity": id.as_str(),
                "state": if held.is_some() { "available" } else { "unavailable" },
                "serialNumber": held.as_ref().map(|held| held.svid.serial().to_owned()),
                "expirationTime": held.as_ref().and_then(|held| {
                    held.svid.not_after().duration_since(std::time::UNIX_EPOCH).ok().map(|time| time.as_secs())
                }),
            })
        })
        .collect();
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "generation": snapshot.generation,
        "workloads": workloads,
        "services": services,
        "policies": policies(&snapshot.inbound),
        "outboundPolicies": policies(&snapshot.outbound),
        "certificates": certificates,
    })
}

fn connections(context: &Context) -> Value {
    let pods: Vec<_> = context
        .pods
        .all()
        .iter()
        .map(|pod| {
            let open: Vec<_> = pod
                .connections
                .all()
                .iter()
                .map(|connection| {
                    json!({
                        "direction": connection.facts.way.direction(),
                        "src": connection.facts.source.to_string(),
                        "dst": connection.facts.destination.to_string(),
                        "peer": connection.facts.way.peer().map(|peer| peer.as_str()),
                        "protocol": match connection.facts.way {
                            Way::OutboundTunnel { .. } | Way::InboundTunnel { .. } => "HBONE",
                            Way::OutboundDirect { .. } | Way::InboundPlaintext => "TCP",
                        },
                        "bytesReceived": connection.flow.received.load(Ordering::Relaxed),
                        "bytesSent": connection.flow.sent.load(Ordering::Relaxed),
                        "ageSeconds": connection.opened.elapsed().as_secs(),
                    })
                })
                .collect();
            json!({
                "uid": pod.uid.as_str(),
                "name": pod.name,
                "namespace": pod.namespace,
                "addresses": pod.addresses,
                "tunnels": pod.tunnels.count(),
                "connections": open,
            })
        })
        .collect();
    json!({ "pods": pods })
}
