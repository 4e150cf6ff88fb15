//! DNS: what a pod asks of a cluster resolver.
//!
//! ```text
//! app ──port 53──▶ 15053… ──▶ question ──▶ answer (pure) ─┬─ Records ─────────▶ app
//!       one listener per resolver   ▲ Snapshot            ├─ Ask ──▶ control, once
//!                                                         └─ Forward ──▶ the resolver that was asked ──▶ app
//! ```
//! Invariant: only names of the mesh are answered here; everything else goes, byte for byte, to the server
//! that the pod addressed, and its answer comes back as it is. No cache, no name is made up.

mod answer;
mod forward;
mod question;

use crate::{accept::Accepted, context::Context, pods::Pod};
use answer::{Answer, answer};
use culvert_core::mesh::Workload;
use question::Question;
use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UdpSocket},
    sync::Semaphore,
};

/// Queries of one pod in flight; further ones wait in the socket's buffer, where the kernel drops them.
pub const MAX_QUERIES: usize = 256;

/// Longest query that is read; queries are one name long.
const MAX_UDP_QUERY: usize = 4096;

/// A TCP client that is silent for so long has its connection closed (RFC 7766 §6.2.3).
const IDLE: Duration = Duration::from_secs(10);

/// Why a query has no answer.
#[derive(Debug, thiserror::Error)]
enum DnsError {
    #[error("not a query: {0}")]
    Malformed(#[from] hickory_proto::serialize::binary::DecodeError),
    #[error("the agent gave no socket in time")]
    NoSocket,
    #[error("the resolver did not answer in time")]
    Timeout,
    #[error("asking the resolver: {0}")]
    Upstream(#[from] io::Error),
}

/// Whom to ask, and what is known.
#[derive(Clone)]
struct Server {
    pod: Arc<Pod>,
    context: Arc<Context>,
    resolver: SocketAddr,
    /// Queries in flight.
    room: Arc<Semaphore>,
}

/// How a query came, which is how it is forwarded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Transport {
    Udp,
    Tcp,
}

/// Answers the datagrams that come to `listener` until the pod leaves or draining begins.
pub async fn serve_udp(listener: UdpSocket, resolver: IpAddr, pod: Arc<Pod>, context: Arc<Context>) {
    let listener = Arc::new(listener);
    let server = Server::new(resolver, pod, context);
    let mut buffer = vec![0; MAX_UDP_QUERY];
    loop {
        let received = tokio::select! {
            biased;
            () = server.pod.left() => return,
            () = server.context.draining() => return,
            received = listener.recv_from(&mut buffer) => received,
        };
        let Ok((length, client)) = received else {
            // An ICMP error about an earlier answer; a socket that stays broken must not spin.
            tokio::time::sleep(Duration::from_millis(1)).await;
            continue;
        };
        let Ok(room) = server.room.clone().acquire_owned().await else {
            return;
        };
        let (query, server, listener) = (buffer[..length].to_vec(), server.clone(), listener.clone());
        tokio::spawn(async move {
            if let Some(reply) = server.reply(&query, Transport::Udp).await {
                // The client may have closed its socket.
                let _ = listener.send_to(&reply, client).await;
            }
            drop(room);
        });
    }
}

/// Answers the queries of one TCP connection, in order.
pub async fn serve_tcp(accepted: Accepted, resolver: IpAddr, pod: Arc<Pod>, context: Arc<Context>) {
    let server = Server::new(resolver, pod.clone(), context);
    let mut client = accepted.socket;
    let served = async {
        while let Ok(Ok(query)) = tokio::time::timeout(IDLE, read_framed(&mut client)).await {
            let Some(reply) = server.reply(&query, Transport::Tcp).await else {
                return;
            };
            if write_framed(&mut client, &reply).await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        () = pod.left() => {}
        () = served => {}
    }
}

impl Server {
    fn new(resolver: IpAddr, pod: Arc<Pod>, context: Arc<Context>) -> Self {
        Self {
            pod,
            context,
            resolver: SocketAddr::new(resolver, 53),
            room: Arc::new(Semaphore::new(MAX_QUERIES)),
        }
    }

    /// The reply to a query; none where silence is the answer.
    async fn reply(&self, query: &[u8], transport: Transport) -> Option<Vec<u8>> {
        let count = |outcome: &str| self.context.metrics.dns.with_label_values(&[outcome]).inc();
        let question = match Question::decode(query) {
            Ok(question) => question,
            Err(error) => {
                count("malformed");
                tracing::debug!(target: "dns", pod = %self.pod.name, %error, "query dropped");
                return None;
            }
        };
        let own = {
            let snapshot = self.context.discovery.snapshot();
            snapshot.workload(&self.pod.workload_uid).cloned()
        };
        let labels = Labels {
            kind: question.kind(),
            transport,
            own,
        };
        labels.of(&self.context.metrics.dns_requests).inc();
        let decided = match self.own_answer(&question).await {
            Some(answer) => {
                count(answer.outcome());
                Ok(question.reply(&answer, transport))
            }
            None => {
                let forwarded = self.forward_counted(query, &question, &labels).await;
                count(if forwarded.is_ok() { "forwarded" } else { "failed" });
                forwarded
            }
        };
        tracing::debug!(target: "dns", pod = %self.pod.name, name = question.printable(), error = decided.as_ref().err().map(tracing::field::display), "query");
        Some(decided.unwrap_or_else(|_| question.failure()))
    }

    /// What the mesh itself says, if it is for the mesh to say.
    async fn own_answer(&self, question: &Question) -> Option<Answer> {
        let asked = question.asked()?;
        let once = || {
            let snapshot = self.context.discovery.snapshot();
            let own = snapshot.workload(&self.pod.workload_uid)?;
            Some(answer(&snapshot, own, &asked))
        };
        match once()? {
            Answer::Ask(service) => {
                self.context.discovery.resolve_service(&service).await;
                once()
            }
            decided => Some(decided),
        }
        .filter(|decided| !matches!(decided, Answer::Forward | Answer::Ask(_)))
    }

    async fn forward_counted(
        &self,
        query: &[u8],
        question: &Question,
        labels: &Labels,
    ) -> Result<Vec<u8>, DnsError> {
        let metrics = &self.context.metrics;
        labels.of(&metrics.dns_upstream_requests).inc();
        let started = Instant::now();
        let forwarded = self.forward(query, question, labels.transport).await;
        labels
            .of(&metrics.dns_upstream_seconds)
            .observe(started.elapsed().as_secs_f64());
        if forwarded.is_err() {
            labels.of(&metrics.dns_upstream_failures).inc();
        }
        forwarded
    }

    async fn forward(
        &self,
        query: &[u8],
        question: &Question,
        transport: Transport,
    ) -> Result<Vec<u8>, DnsError> {
        let v6 = self.resolver.is_ipv6();
        match transport {
            Transport::Udp => {
                let socket = self.pod.sockets.udp(v6).await.ok_or(DnsError::NoSocket)?;
                forward::by_udp(socket, self.resolver, query, question).await
            }
            Transport::Tcp => {
                let socket = self.pod.sockets.tcp(v6).await.ok_or(DnsError::NoSocket)?;
                forward::by_tcp(socket, self.resolver, query, question).await
            }
        }
    }
}

/// What a query counts under.
struct Labels {
    kind: &'static str,
    transport: Transport,
    own: Option<Arc<Workload>>,
}

impl Labels {
    fn of<T: prometheus::core::MetricVecBuilder>(&self, family: &prometheus::core::MetricVec<T>) -> T::M {
        let protocol = match self.transport {
            Transport::Udp => "udp",
            Transport::Tcp => "tcp",
        };
        let named = |text: fn(&Workload) -> &str| {
            let text = self.own.as_deref().map(text).unwrap_or_default();
            if text.is_empty() { "unknown" } else { text }
        };
        family.with_label_values(&[
            self.kind,
            protocol,
            named(|own| &own.canonical_name),
            named(|own| &own.canonical_revision),
        ])
    }
}

async fn read_framed(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let length = stream.read_u16().await?;
    let mut message = vec![0; length.into()];
    stream.read_exact(&mut message).await?;
    Ok(message)
}

/// In one write: some clients take the length alone for the whole message.
async fn write_framed(stream: &mut TcpStream, message: &[u8]) -> io::Result<()> {
    let length = u16::try_from(message.len()).map_err(|_| io::ErrorKind::InvalidData)?;
    let framed = [&length.to_be_bytes()[..], message].concat();
    stream.write_all(&framed).await
}
