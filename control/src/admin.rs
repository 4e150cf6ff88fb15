//! Readiness and metrics of control; each call leaves an audit line.

use crate::{serve::Shared, watch::files::Health};
use bytes::Bytes;
use culvert_io::log::Log;
use http::{Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use std::{convert::Infallible, net::SocketAddr, sync::Arc, time::Duration};
use tokio::{net::TcpListener, sync::watch};

const READY: &str = "/healthz/ready";

/// Longest path that is logged.
const MAX_PATH: usize = 200;

/// What the pages are made from.
#[derive(Clone)]
pub struct Pages {
    pub health: watch::Receiver<Health>,
    pub shared: Arc<Shared>,
    pub log: Log,
}

/// Serves for as long as it is polled. Read-only; shows no configuration.
pub async fn serve(listener: TcpListener, pages: Pages) {
    loop {
        let Ok((socket, peer)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        let pages = pages.clone();
        tokio::spawn(async move {
            let answer = service_fn(move |request: Request<Incoming>| {
                let answer = respond(&request, &pages);
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

fn respond(request: &Request<Incoming>, pages: &Pages) -> Response<Full<Bytes>> {
    let world = pages.shared.world.borrow().clone();
    let page = |status, text: Vec<u8>| {
        let mut response = Response::new(Full::new(Bytes::from(text)));
        *response.status_mut() = status;
        response
    };
    match (request.method(), request.uri().path()) {
        (&Method::GET, READY) if !world.is_begun() => page(
            StatusCode::SERVICE_UNAVAILABLE,
            b"the configuration has not been read yet\n".to_vec(),
        ),
        (&Method::GET, READY) => page(StatusCode::OK, b"ready\n".to_vec()),
        (&Method::GET, "/metrics") => page(
            StatusCode::OK,
            pages
                .shared
                .metrics
                .page(&world, &pages.health.borrow(), &pages.log),
        ),
        _ => page(StatusCode::NOT_FOUND, b"no such page\n".to_vec()),
    }
}
