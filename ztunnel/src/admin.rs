//! The pages of ztunnel: readiness, metrics, and what is open, each on its own port.
//!
//! Invariant: configuration and connections are shown on loopback alone (settled D22), and so is the one
//! thing that can be changed, the log's filter; every change leaves a record of target `audit`. An unknown
//! path is 404.

mod dump;

use crate::context::Context;
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::Value;
use std::{convert::Infallible, io, net::SocketAddr, sync::Arc, time::Duration};
use tokio::{net::TcpListener, sync::Semaphore};

/// Requests served at once on one port, each holding its page.
const AT_ONCE: usize = 8;
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
    let path = request.uri().path();
    match (pages, request.method(), path) {
        (Pages::Admin, &Method::POST, "/logging") => set_log(request.uri().query(), context),
        (_, &Method::GET, _) => shown(pages, path, context),
        _ => text(StatusCode::METHOD_NOT_ALLOWED, "only GET\n"),
    }
}

fn shown(pages: Pages, path: &str, context: &Context) -> Response<Full<Bytes>> {
    match (pages, path) {
        (Pages::Readiness, "/healthz/ready") => {
            if *context.drain.borrow() {
                text(StatusCode::SERVICE_UNAVAILABLE, "draining\n")
            } else if context.is_ready() {
                text(StatusCode::OK, "ready\n")
            } else {
                text(
                    StatusCode::SERVICE_UNAVAILABLE,
                    "waiting for control's first answer, or for the revocation lists\n",
                )
            }
        }
        (Pages::Metrics, "/metrics" | "/stats/prometheus") => {
            let page_of_metrics = crate::metrics::page(context);
            page(StatusCode::OK, "text/plain; version=0.0.4", page_of_metrics)
        }
        (Pages::Admin, "/config_dump") => json_page(&dump::config(context)),
        (Pages::Admin, "/debug/connections") => json_page(&dump::connections(context)),
        (Pages::Admin, "/logging") => text(StatusCode::OK, format!("{}\n", context.log.filter())),
        (Pages::Admin, "/") => page(StatusCode::OK, "text/html; charset=utf-8", INDEX),
        _ => text(StatusCode::NOT_FOUND, "no such page\n"),
    }
}

const INDEX: &str = "<!DOCTYPE html>
<title>ztunnel</title>
<h1>ztunnel</h1>
<ul>
<li><a href=\"/config_dump\">/config_dump</a>: what decisions depend on, keys excepted
<li><a href=\"/debug/connections\">/debug/connections</a>: pods and their open connections
<li><a href=\"/logging\">/logging</a>: the log filter; POST with ?level=FILTER sets it, with ?reset puts the first back
</ul>
";

/// Changes the log filter, and leaves a record of it.
fn set_log(query: Option<&str>, context: &Context) -> Response<Full<Bytes>> {
    let before = context.log.filter();
    let asked = query.unwrap_or_default();
    let done = match asked.split_once('=') {
        Some(("level", filter)) => context.log.set(&unescape(filter)),
        _ if asked == "reset" || asked == "reset=" => context.log.reset(),
        _ => {
            return text(
                StatusCode::BAD_REQUEST,
                "POST /logging?level=FILTER or /logging?reset\n",
            );
        }
    };
    context.metrics.admin_calls.with_label_values(&["logging"]).inc();
    let now = context.log.filter();
    let error = done.as_ref().err().map(tracing::field::display);
    // At a level that only `off` silences: whoever quietens the log is in it.
    tracing::error!(target: "audit", call = "/logging", from = "loopback", before, now, error, "admin call");
    match done {
        Ok(()) => text(StatusCode::OK, format!("{now}\n")),
        Err(error) => text(StatusCode::BAD_REQUEST, format!("{error}\n")),
    }
}

/// Undoes percent escapes; what is no escape stays as it is.
fn unescape(escaped: &str) -> String {
    let mut bytes = vec![];
    let mut rest = escaped.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let escape = after
            .get(..2)
            .filter(|hex| *first == b'%' && hex.iter().all(u8::is_ascii_hexdigit))
            .and_then(|hex| std::str::from_utf8(hex).ok())
            .and_then(|hex| u8::from_str_radix(hex, 16).ok());
        bytes.push(escape.unwrap_or(*first));
        rest = if escape.is_some() { &after[2..] } else { after };
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn text(status: StatusCode, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    page(status, "text/plain; charset=utf-8", body)
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

#[cfg(test)]
mod tests {
    use super::unescape;

    #[test]
    fn percent_escapes_are_undone_and_nothing_else_is() {
        for (escaped, want) in [
            ("info", "info"),
            ("info%2Caccess%3Ddebug", "info,access=debug"),
            ("a%", "a%"),
            ("a%2", "a%2"),
            ("a%zz", "a%zz"),
            ("%+1", "%+1"),
            ("", ""),
        ] {
            assert_eq!(unescape(escaped), want, "{escaped}");
        }
    }
}
