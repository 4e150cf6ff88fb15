//! The port's TLS: 1.3 alone; what has not proved to be a node's is bounded in time and number (T52).
//!
//! ```text
//! accept ──room for this address?──▶ handshake ──▶ calls; without a node's token in time: closed
//! ```
//! Invariant: strangers hold at most [`STRANGERS`] connections of one address, each for seconds, so that they
//! leave room for nodes.

use crate::authority::Authority;
use arc_swap::ArcSwap;
use futures::Stream;
use parking_lot::Mutex;
use rustls::{
    ServerConfig,
    crypto::aws_lc_rs,
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
    version::TLS13,
};
use std::{
    collections::HashMap,
    io,
    net::{IpAddr, SocketAddr},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    time::Sleep,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;

const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(5);
/// How long a connection may be open before its first call with a node's token.
const PROOF_DEADLINE: Duration = Duration::from_secs(10);
/// Connections of one address that have not proved to be a node's. A node has three: its agent's, and its
/// ztunnel's for discovery and certificates.
const STRANGERS: usize = 16;
/// Connections of all addresses that have not proved to be a node's.
const ALL_STRANGERS: usize = 1024;

/// This server's certificate, which can be replaced while it serves.
#[derive(Debug)]
pub struct Certificate(ArcSwap<CertifiedKey>);

impl Certificate {
    pub fn new(authority: &Authority, name: &str, addresses: &[IpAddr]) -> anyhow::Result<Self> {
        let certified = certified(authority, name, addresses)?;
        Ok(Self(ArcSwap::from_pointee(certified)))
    }

    /// Takes a new one of this authority's.
    pub fn replace(&self, authority: &Authority, name: &str, addresses: &[IpAddr]) -> anyhow::Result<()> {
        self.0.store(Arc::new(certified(authority, name, addresses)?));
        Ok(())
    }
}

fn certified(authority: &Authority, name: &str, addresses: &[IpAddr]) -> anyhow::Result<CertifiedKey> {
    let (chain, key) = authority.server_certificate(name, addresses)?;
    Ok(CertifiedKey::from_der(
        chain,
        key,
        &aws_lc_rs::default_provider(),
    )?)
}

impl ResolvesServerCert for Certificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.load_full())
    }
}

/// This server's configuration.
pub fn server_config(certificate: Arc<Certificate>) -> anyhow::Result<Arc<ServerConfig>> {
    let mut config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_protocol_versions(&[&TLS13])?
        .with_no_client_auth()
        .with_cert_resolver(certificate);
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    Ok(Arc::new(config))
}

/// Connections that have not proved to be a node's, by address.
#[derive(Default)]
struct Strangers(Mutex<HashMap<IpAddr, usize>>);

impl Strangers {
    fn enter(self: &Arc<Self>, from: SocketAddr) -> Option<Stranger> {
        let mut all = self.0.lock();
        let total: usize = all.len();
        let own = all.entry(from.ip()).or_default();
        if *own >= STRANGERS || total > ALL_STRANGERS {
            return None;
        }
        *own += 1;
        Some(Stranger {
            all: self.clone(),
            ip: from.ip(),
        })
    }
}

/// One such connection's place.
struct Stranger {
    all: Arc<Strangers>,
    ip: IpAddr,
}

impl Drop for Stranger {
    fn drop(&mut self) {
        let mut all = self.all.0.lock();
        if let Some(own) = all.get_mut(&self.ip) {
            *own -= 1;
            if *own == 0 {
                all.remove(&self.ip);
            }
        }
    }
}

/// Connections whose handshake is done.
pub fn incoming(listener: TcpListener, config: Arc<ServerConfig>) -> impl Stream<Item = io::Result<Secured>> {
    let (done, out) = mpsc::channel(16);
    tokio::spawn(async move {
        let strangers = Arc::<Strangers>::default();
        let acceptor = TlsAcceptor::from(config);
        loop {
            let (socket, from) = match listener.accept().await {
                Ok(accepted) => accepted,
                Err(_) => {
                    // EMFILE passes; leaving the loop would leave every node alone.
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            };
            let Some(stranger) = strangers.enter(from) else {
                tracing::debug!(%from, "connection refused: too many of this address are not a node's");
                continue;
            };
            let (acceptor, done) = (acceptor.clone(), done.clone());
            tokio::spawn(async move {
                let _ = socket.set_nodelay(true);
                let shaken = tokio::time::timeout(HANDSHAKE_DEADLINE, acceptor.accept(socket)).await;
                if let Ok(Ok(tls)) = shaken {
                    let secured = Secured {
                        tls,
                        peer: Peer {
                            address: from,
                            proved: Arc::default(),
                        },
                        stranger: Some((stranger, Box::pin(tokio::time::sleep(PROOF_DEADLINE)))),
                    };
                    let _ = done.send(Ok(secured)).await;
                }
            });
        }
    });
    ReceiverStream::new(out)
}

/// Who is at the other end of a call's connection.
#[derive(Debug, Clone)]
pub struct Peer {
    pub address: SocketAddr,
    proved: Arc<AtomicBool>,
}

impl Peer {
    /// A call with a node's token has come.
    pub fn prove(&self) {
        self.proved.store(true, Ordering::Relaxed);
    }
}

/// A connection whose handshake is done, as the gRPC server takes it.
pub struct Secured {
    tls: TlsStream<TcpStream>,
    peer: Peer,
    /// Until it has proved to be a node's: its place, and when it has to.
    stranger: Option<(Stranger, Pin<Box<Sleep>>)>,
}

impl Connected for Secured {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for Secured {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if let Some((_, deadline)) = &mut self.stranger {
            if deadline.as_mut().poll(cx).is_ready() && !self.peer.proved.load(Ordering::Relaxed) {
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
            if self.peer.proved.load(Ordering::Relaxed) {
                self.stranger = None;
            }
        }
        Pin::new(&mut self.tls).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Secured {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tls).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tls).poll_write_vectored(cx, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.tls.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tls).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tls).poll_shutdown(cx)
    }
}
