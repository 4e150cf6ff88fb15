//! Readiness of control.

use crate::{index::World, watch::files::Latest};
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use std::{convert::Infallible, sync::Arc, time::Duration};
use tokio::{net::TcpListener, sync::watch};

/// Serves for as long as it is polled. Read-only; shows no configuration.
pub async fn serve(
    listener: TcpListener,
    latest: watch::Receiver<Latest>,
    world: watch::Receiver<Arc<World>>,
) {
    loop {
        let Ok((socket, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        let (latest, world) = (latest.clone(), world.clone());
        tokio::spawn(async move {
            let answer = service_fn(move |request: Request<Incoming>| {
                let answer = respond(&request, &latest.borrow(), &world.borrow());
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

fn respond(request: &Request<Incoming>, latest: &Latest, world: &World) -> Response<Full<Bytes>> {
    let page = |status, text: String| {
        let mut response = Response::new(Full::new(Bytes::from(text)));
        *response.status_mut() = status;
        response
    };
    match (request.method(), request.uri().path()) {
        (&Method::GET, "/healthz/ready") if world.types.is_empty() => page(
            StatusCode::SERVICE_UNAVAILABLE,
            "the configuration has not been read yet\n".to_owned(),
        ),
        (&Method::GET, "/healthz/ready") => page(StatusCode::OK, "ready\n".to_owned()),
        (&Method::GET, "/metrics") => page(
            StatusCode::OK,
            format!(
                "# HELP culvert_config_version Version of the configuration served\n\
                 # TYPE culvert_config_version gauge\nculvert_config_version {}\n\
                 # HELP culvert_config_mistakes Mistakes in the folder now; the last good state is served\n\
                 # TYPE culvert_config_mistakes gauge\nculvert_config_mistakes {}\n",
                world.number,
                latest.mistakes.len()
            ),
        ),
        _ => page(StatusCode::NOT_FOUND, "no such page\n".to_owned()),
    }
}
