//! Readiness and metrics of control; each call leaves an audit line.

use crate::{index::World, watch::files::Health};
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use std::{convert::Infallible, net::SocketAddr, sync::Arc, time::Duration};
use tokio::{net::TcpListener, sync::watch};

const READY: &str = "/healthz/ready";

/// Longest path that is logged.
const MAX_PATH: usize = 200;

/// Serves for as long as it is polled. Read-only; shows no configuration.
pub async fn serve(
    listener: TcpListener,
    health: watch::Receiver<Health>,
    world: watch::Receiver<Arc<World>>,
) {
    loop {
        let Ok((socket, peer)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        let (health, world) = (health.clone(), world.clone());
        tokio::spawn(async move {
            let answer = service_fn(move |request: Request<Incoming>| {
                let answer = respond(&request, &health.borrow(), &world.borrow());
                audit(peer, &request, answer.status());
                async move { Ok::<_, Infallible>(answer) }
            });
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(Duration::from_secs(5))
                .keep_alive(false)
                .serve_connection(TokioIo::new(socket), answer);
            let _ = tokio::time::timeout(Duration::from_secs(30), connection).await;
        });
    }
}

/// Every call but the probes that come every second.
fn audit(peer: SocketAddr, request: &Request<Incoming>, status: StatusCode) {
    if request.uri().path() == READY {
        return;
    }
    let path: String = request.uri().path().chars().take(MAX_PATH).collect();
    tracing::info!(target: "audit", %peer, method = %request.method(), path, status = status.as_u16(), "admin call");
}

fn respond(request: &Request<Incoming>, health: &Health, world: &World) -> Response<Full<Bytes>> {
    let page = |status, text: String| {
        let mut response = Response::new(Full::new(Bytes::from(text)));
        *response.status_mut() = status;
        response
    };
    match (request.method(), request.uri().path()) {
        (&Method::GET, READY) if !world.is_begun() => page(
            StatusCode::SERVICE_UNAVAILABLE,
            "the configuration has not been read yet\n".to_owned(),
        ),
        (&Method::GET, READY) => page(StatusCode::OK, "ready\n".to_owned()),
        (&Method::GET, "/metrics") => page(
            StatusCode::OK,
            format!(
                "# HELP culvert_config_version Version of the configuration served\n\
                 # TYPE culvert_config_version gauge\nculvert_config_version {}\n\
                 # HELP culvert_config_mistakes Mistakes in the folder now; the last good state is served\n\
                 # TYPE culvert_config_mistakes gauge\nculvert_config_mistakes {}\n",
                world.number,
                health.mistakes.len()
            ),
        ),
        _ => page(StatusCode::NOT_FOUND, "no such page\n".to_owned()),
    }
}
