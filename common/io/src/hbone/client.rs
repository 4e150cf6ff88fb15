//! The end that dials.

use super::{
    CONNECTION_WINDOW, DATA_FRAME_BUDGET, DIAL_PATIENCE, GROWN_STREAM_WINDOW, MAX_FRAME,
    MAX_REMEMBERED_RESETS, STREAM_WINDOW,
    ahead::ReadAhead,
    keep_alive,
    meter::{Metered, Notice, Side, Verdict},
    stream::{CloseOnDrop, Counted, Peer, Shared, Stream, Watch},
};
use crate::{
    budget::Budget,
    tls::{LeafError, VerifyError},
};
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
    time::{Duration, SystemTime},
};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsConnector;

/// How long a stream waits for room in its tunnel. A peer may take all of it back (T43).
const ROOM_WITHIN: Duration = Duration::from_secs(1);

/// How long a peer may take to answer for a stream: it may have to ask control, and its application has 10 s at
/// each of a few tries.
const ANSWER_WITHIN: Duration = Duration::from_secs(60);

/// Why no tunnel came up.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    #[error("no handshake within {} s", DIAL_PATIENCE.as_secs())]
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

    /// Whether the connection broke on the way, which says nothing of the peer.
    pub fn broke(&self) -> bool {
        match self {
            Self::Tls(error) => is_break(error.kind()),
            Self::Http(error) => broke(error),
            Self::Timeout | Self::Peer(_) | Self::Alpn => false,
        }
    }
}

fn is_break(kind: io::ErrorKind) -> bool {
    use io::ErrorKind as Kind;
    matches!(
        kind,
        Kind::ConnectionReset
            | Kind::ConnectionAborted
            | Kind::BrokenPipe
            | Kind::UnexpectedEof
            | Kind::TimedOut
    )
}

fn broke(error: &h2::Error) -> bool {
    error.get_io().is_some_and(|error| is_break(error.kind())) || (error.is_go_away() && error.is_remote())
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
    /// The peer lets no further stream be opened; nothing was sent.
    #[error("peer has left no room for a stream within {} s", ROOM_WITHIN.as_secs())]
    Full,
    /// The peer has taken the request and says nothing to it.
    #[error("no answer within {} s", ANSWER_WITHIN.as_secs())]
    Silent,
    #[error("the request cannot be written: {0}")]
    Request(#[from] http::Error),
}

impl OpenError {
    /// Whether the tunnel broke on the way, which says nothing of the peer.
    pub fn broke(&self) -> bool {
        match self {
            Self::Closing(error) | Self::Failed(error) => broke(error),
            Self::Full | Self::Silent | Self::Refused(_) | Self::Request(_) => false,
        }
    }
}

/// A tunnel to one peer. Clones share it.
#[derive(Debug, Clone)]
pub struct Tunnel {
    requests: SendRequest<Bytes>,
    watch: Watch,
}

/// Brings a tunnel up over a connected socket. The second value is its driver: the tunnel lives while it
/// is polled, and ends when it returns. What its streams buffer is charged to `budget`.
pub async fn dial<IO>(
    io: IO,
    config: Arc<ClientConfig>,
    budget: &Arc<Budget>,
) -> Result<(Tunnel, impl Future<Output = ()> + Send + 'static), DialError>
where
    IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let handshake = Box::pin(handshake(io, config, budget));
    let (tunnel, connection, notice) = tokio::time::timeout(DIAL_PATIENCE, handshake)
        .await
        .map_err(|_| DialError::Timeout)??;
    let driver = drive(connection, tunnel.watch.shared.clone(), notice);
    Ok((tunnel, driver))
}

type Connection<IO> = h2::client::Connection<Metered<tokio_rustls::client::TlsStream<ReadAhead<IO>>>, Bytes>;

async fn handshake<IO>(
    io: IO,
    config: Arc<ClientConfig>,
    budget: &Arc<Budget>,
) -> Result<(Tunnel, Connection<IO>, Notice), DialError>
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
    let peer = Peer::of(session.peer_certificates())?;
    let (tls, notice) = Metered::new(tls, Side::Server);
    let (requests, connection) = h2::client::Builder::new()
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(MAX_FRAME)
        .max_header_list_size(super::MAX_HEADER_LIST)
        .max_send_buffer_size(GROWN_STREAM_WINDOW as usize)
        .data_frame_budget(DATA_FRAME_BUDGET)
        // An honest application that cancels a lot must not end a tunnel that it shares (h2#856).
        .max_local_error_reset_streams(None)
        .max_concurrent_reset_streams(MAX_REMEMBERED_RESETS)
        .enable_push(false)
        .handshake(tls)
        .await?;
    Ok((
        Tunnel {
            requests,
            watch: Watch {
                shared: Shared::new(budget, Side::Client),
                peer,
            },
        },
        connection,
        notice,
    ))
}

async fn drive<IO>(mut connection: Connection<IO>, shared: Arc<Shared>, notice: Notice)
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
        if shared.cut.load(Ordering::Relaxed) {
            return Poll::Ready(());
        }
        if !grown && shared.may_grow() {
            grown = true;
            let _ = connection.set_initial_window_size(GROWN_STREAM_WINDOW);
        }
        if let Poll::Ready(ended) = Pin::new(&mut connection).poll(cx) {
            if let Err(error) = ended {
                tracing::debug!(%error, "tunnel broke");
            }
            return Poll::Ready(());
        }
        if notice.verdict() == Verdict::End {
            return Poll::Ready(());
        }
        alive.as_mut().poll(cx)
    })
    .await;
    drop(closed);
}

impl Tunnel {
    /// The identity that the peer proved.
    pub fn peer(&self) -> &SpiffeId {
        &self.watch.peer.id
    }

    /// A view of the tunnel that does not keep it open.
    pub fn watch(&self) -> &Watch {
        &self.watch
    }

    /// When the peer's leaf ends; no stream is opened after that (settled D14).
    pub fn peer_not_after(&self) -> SystemTime {
        self.watch.peer.not_after
    }

    pub fn is_closed(&self) -> bool {
        self.watch.is_closed()
    }

    /// Whether it takes no new stream; what is open goes on.
    pub fn is_retired(&self) -> bool {
        self.watch.shared.retired.load(Ordering::Relaxed)
    }

    /// Whether two handles are of one tunnel.
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.watch.shared, &other.watch.shared)
    }

    /// Streams open now.
    pub fn streams(&self) -> usize {
        self.watch.streams()
    }

    /// Opens a stream for one user connection and waits for the peer's answer. Dropped before that, the
    /// stream is cancelled.
    pub async fn open(&self, connect: &Connect) -> Result<Stream, OpenError> {
        let request = connect.encode()?;
        let counted = Counted::new(&self.watch.shared);
        let mut requests = self.requests.clone().ready().await.map_err(OpenError::Closing)?;
        let (response, send) = requests
            .send_request(request, false)
            .map_err(OpenError::Closing)?;
        // The handle is ready again once the stream has been opened; until then nothing of it was sent.
        tokio::time::timeout(ROOM_WITHIN, requests.ready())
            .await
            .map_err(|_| OpenError::Full)?
            .map_err(OpenError::Closing)?;
        let answered = Box::pin(tokio::time::timeout(ANSWER_WITHIN, response)).await;
        let response = answered.map_err(|_| OpenError::Silent)?.map_err(|error| {
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
