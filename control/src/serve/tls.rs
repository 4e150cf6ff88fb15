//! The port's TLS: 1.3 alone, handshakes bounded in time and number.

use crate::authority::Authority;
use futures::Stream;
use rustls::{ServerConfig, crypto::aws_lc_rs, version::TLS13};
use std::{
    io,
    net::IpAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{Semaphore, mpsc},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::{Connected, TcpConnectInfo};

const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(5);
/// Handshakes in flight; beyond it callers wait in the backlog (T52).
const HANDSHAKES: usize = 64;

/// This server's configuration, with a certificate of the mesh's own CA.
pub fn server_config(
    authority: &Authority,
    name: &str,
    addresses: &[IpAddr],
) -> anyhow::Result<Arc<ServerConfig>> {
    let (chain, key) = authority.server_certificate(name, addresses)?;
    let mut config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_protocol_versions(&[&TLS13])?
        .with_no_client_auth()
        .with_single_cert(chain, key)?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    Ok(Arc::new(config))
}

/// Connections whose handshake is done.
pub fn incoming(listener: TcpListener, config: Arc<ServerConfig>) -> impl Stream<Item = io::Result<Secured>> {
    let (done, out) = mpsc::channel(16);
    tokio::spawn(async move {
        let in_flight = Arc::new(Semaphore::new(HANDSHAKES));
        let acceptor = TlsAcceptor::from(config);
        loop {
            let Ok(permit) = in_flight.clone().acquire_owned().await else {
                return;
            };
            let socket = match listener.accept().await {
                Ok((socket, _)) => socket,
                Err(_) => {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            };
            let (acceptor, done) = (acceptor.clone(), done.clone());
            tokio::spawn(async move {
                let _ = socket.set_nodelay(true);
                let shaken = tokio::time::timeout(HANDSHAKE_DEADLINE, acceptor.accept(socket)).await;
                drop(permit);
                if let Ok(Ok(tls)) = shaken {
                    let _ = done.send(Ok(Secured(tls))).await;
                }
            });
        }
    });
    ReceiverStream::new(out)
}

/// A connection whose handshake is done, as the gRPC server takes it.
pub struct Secured(TlsStream<TcpStream>);

impl Connected for Secured {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        let socket: &TcpStream = self.0.get_ref().0;
        TcpConnectInfo {
            local_addr: socket.local_addr().ok(),
            remote_addr: socket.peer_addr().ok(),
        }
    }
}

impl AsyncRead for Secured {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Secured {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write_vectored(cx, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.0.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}
