//! The end that dials.

use super::{
    CONNECTION_WINDOW, DATA_FRAME_BUDGET, GROWN_STREAM_WINDOW, HANDSHAKE_DEADLINE, MAX_FRAME, STREAM_WINDOW,
    ahead::ReadAhead,
    keep_alive,
    stream::{Counted, Shared, Stream},
};
use crate::tls::{LeafError, VerifyError, leaf_expiry, leaf_identity};
use bytes::Bytes;
use culvert_core::{hbone::Connect, ids::SpiffeId};
use h2::client::SendRequest;
use http::StatusCode;
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use std::{
    io,
    net::{IpAddr, Ipv4Addr},
    pin::{Pin, pin},
    sync::{Arc, atomic::Ordering},
    task::Poll,
    time::SystemTime,
};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsConnector;

/// Why no tunnel came up.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    #[error("no answer within {} s", HANDSHAKE_DEADLINE.as_secs())]
    Timeout,
    #[error("TLS handshake: {0}")]
    Tls(#[source] io::Error),
    #[error("peer's certificate: {0}")]
    Peer(#[from] LeafError),
    #[error("peer does not speak HTTP/2")]
    Alpn,
    #[error("HTTP/2: {0}")]
    Http(#[from] h2::Error),
}

impl DialError {
    /// The verifier's verdict, if it was the peer's certificate.
    pub fn verdict(&self) -> Option<&VerifyError> {
        match self {
            Self::Tls(error) => VerifyError::of(error),
            Self::Timeout | Self::Peer(_) | Self::Alpn | Self::Http(_) => None,
        }
    }
}

/// Why a stream was not opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The peer refused this connection; another endpoint may take it.
    #[error("peer answered {0}")]
    Refused(StatusCode),
    /// The tunnel takes no more streams; nothing was sent.
    #[error("tunnel is closing: {0}")]
    Closing(h2::Error),
    #[error("tunnel failed: {0}")]
    Failed(h2::Error),
    #[error("the request cannot be written: {0}")]
    Request(#[from] http::Error),
}

/// A tunnel to one peer. Clones share it.
#[derive(Debug, Clone)]
pub struct Tunnel {
    requests: SendRequest<Bytes>,
    shared: Arc<Shared>,
    peer: SpiffeId,
    peer_not_after: SystemTime,
}

/// Brings a tunnel up over a connected socket. The second value is its driver: the tunnel lives while it
/// is polled, and ends when it returns.
pub async fn dial<IO>(
    io: IO,
    config: Arc<ClientConfig>,
) -> Result<(Tunnel, impl Future<Output = ()> + Send + 'static), DialError>
where
    IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (tunnel, connection) = tokio::time::timeout(HANDSHAKE_DEADLINE, Box::pin(handshake(io, config)))
        .await
        .map_err(|_| DialError::Timeout)??;
    let driver = drive(connection, tunnel.shared.clone());
    Ok((tunnel, driver))
}

type Connection<IO> = h2::client::Connection<tokio_rustls::client::TlsStream<ReadAhead<IO>>, Bytes>;

async fn handshake<IO>(io: IO, config: Arc<ClientConfig>) -> Result<(Tunnel, Connection<IO>), DialError>
where
    IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    // The name is neither sent nor compared: the verifier looks at the SPIFFE ID alone.
    let unnamed = ServerName::IpAddress(IpAddr::V4(Ipv4Addr::UNSPECIFIED).into());
    let tls = TlsConnector::from(config)
        .connect(unnamed, ReadAhead::new(io))
        .await
        .map_err(DialError::Tls)?;
    let session = tls.get_ref().1;
    if session.alpn_protocol() != Some(b"h2") {
        return Err(DialError::Alpn);
    }
    let leaf = session
        .peer_certificates()
        .and_then(|chain| chain.first())
        .ok_or(LeafError::NoName)?;
    let (peer, peer_not_after) = (leaf_identity(leaf)?, leaf_expiry(leaf)?);
    let (requests, connection) = h2::client::Builder::new()
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(MAX_FRAME)
        .max_header_list_size(super::MAX_HEADER_LIST)
        .max_send_buffer_size(GROWN_STREAM_WINDOW as usize)
        .data_frame_budget(DATA_FRAME_BUDGET)
        // An honest application that cancels a lot must not end a tunnel that it shares (h2#856).
        .max_local_error_reset_streams(None)
        .enable_push(false)
        .handshake(tls)
        .await?;
    Ok((
        Tunnel {
            requests,
            shared: Arc::default(),
            peer,
            peer_not_after,
        },
        connection,
    ))
}

async fn drive<IO>(mut connection: Connection<IO>, shared: Arc<Shared>)
where
    IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let closed = CloseOnDrop(shared.clone());
    let pings = connection.ping_pong();
    let mut alive = pin!(async {
        match pings {
            Some(pings) => keep_alive(pings).await,
            None => std::future::pending().await,
        }
    });
    let mut grown = false;
    std::future::poll_fn(|cx| {
        shared.driver.register(cx.waker());
        if !grown && shared.grow.load(Ordering::Relaxed) {
            grown = true;
            let _ = connection.set_initial_window_size(GROWN_STREAM_WINDOW);
        }
        if Pin::new(&mut connection).poll(cx).is_ready() {
            return Poll::Ready(());
        }
        alive.as_mut().poll(cx)
    })
    .await;
    drop(closed);
}

struct CloseOnDrop(Arc<Shared>);

impl Drop for CloseOnDrop {
    fn drop(&mut self) {
        self.0.closed.store(true, Ordering::Relaxed);
    }
}

impl Tunnel {
    /// The identity that the peer proved.
    pub fn peer(&self) -> &SpiffeId {
        &self.peer
    }

    /// When the peer's leaf ends; no stream is opened after that (settled D14).
    pub fn peer_not_after(&self) -> SystemTime {
        self.peer_not_after
    }

    pub fn is_closed(&self) -> bool {
        self.shared.closed.load(Ordering::Relaxed)
    }

    /// Whether two handles are of one tunnel.
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.shared, &other.shared)
    }

    /// Streams open now.
    pub fn streams(&self) -> usize {
        self.shared.streams.load(Ordering::Relaxed)
    }

    /// Opens a stream for one user connection and waits for the peer's answer. Dropped before that, the
    /// stream is cancelled.
    pub async fn open(&self, connect: &Connect) -> Result<Stream, OpenError> {
        let request = connect.encode()?;
        let counted = Counted::new(&self.shared);
        let mut requests = self.requests.clone().ready().await.map_err(OpenError::Closing)?;
        let (response, send) = requests
            .send_request(request, false)
            .map_err(OpenError::Closing)?;
        let response = response.await.map_err(|error| {
            // The peer did not process it: another tunnel may take it (RFC 9113 §8.7).
            let untouched = error.reason() == Some(h2::Reason::REFUSED_STREAM)
                || (error.is_go_away() && error.is_remote());
            if untouched {
                OpenError::Closing(error)
            } else {
                OpenError::Failed(error)
            }
        })?;
        match response.status() {
            StatusCode::OK => Ok(Stream::new(send, response.into_body(), counted)),
            status => Err(OpenError::Refused(status)),
        }
    }
}
