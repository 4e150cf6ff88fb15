//! The end that accepts.

use super::{
    CONNECTION_WINDOW, DATA_FRAME_BUDGET, GROWN_STREAM_WINDOW, HANDSHAKE_DEADLINE, MAX_FRAME,
    MAX_HEADER_LIST, MAX_LOCAL_RESETS, MAX_REMEMBERED_RESETS, MAX_RESET_UNACCEPTED, MAX_SERVED, MAX_STREAMS,
    STREAM_WINDOW,
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
use culvert_core::{
    hbone::{Connect, ConnectError},
    ids::SpiffeId,
};
use h2::{Reason, RecvStream, server::SendResponse};
use http::{Response, StatusCode};
use rustls::ServerConfig;
use std::{
    io,
    pin::Pin,
    sync::{Arc, atomic::Ordering},
    task::{Context, Poll},
};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

/// Why an arriving connection became no tunnel.
#[derive(Debug, thiserror::Error)]
pub enum AcceptError {
    #[error("handshake not done within {} s", HANDSHAKE_DEADLINE.as_secs())]
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

impl AcceptError {
    /// The verifier's verdict, if it was the peer's certificate.
    pub fn verdict(&self) -> Option<&VerifyError> {
        match self {
            Self::Tls(error) => VerifyError::of(error),
            Self::Timeout | Self::Peer(_) | Self::Alpn | Self::Http(_) => None,
        }
    }
}

/// An accepted tunnel; its streams arrive by [`Incoming::next`], which also drives it.
pub struct Incoming<IO> {
    connection: h2::server::Connection<Metered<TlsStream<ReadAhead<IO>>>, Bytes>,
    notice: Notice,
    /// What has been done on the last notice.
    heeded: Verdict,
    alive: Pin<Box<dyn Future<Output = ()> + Send>>,
    shared: Arc<Shared>,
    grown: bool,
    retired: bool,
    peer: Peer,
    _closed: CloseOnDrop,
}

/// Takes an arriving connection through TLS and the HTTP/2 preface, within the handshake's deadline. What
/// its streams buffer is charged to `budget`.
pub async fn accept<IO>(
    io: IO,
    config: Arc<ServerConfig>,
    budget: &Arc<Budget>,
) -> Result<Incoming<IO>, AcceptError>
where
    IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let handshake = Box::pin(async {
        let tls = TlsAcceptor::from(config)
            .accept(ReadAhead::new(io))
            .await
            .map_err(AcceptError::Tls)?;
        let session = tls.get_ref().1;
        if session.alpn_protocol() != Some(b"h2") {
            return Err(AcceptError::Alpn);
        }
        let peer = Peer::of(session.peer_certificates())?;
        let (tls, notice) = Metered::new(tls, Side::Client);
        let mut connection = h2::server::Builder::new()
            .initial_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_frame_size(MAX_FRAME)
            .max_header_list_size(MAX_HEADER_LIST)
            .max_concurrent_streams(MAX_STREAMS)
            // Floods are the meter's to end.
            .max_pending_accept_reset_streams(MAX_RESET_UNACCEPTED)
            .max_concurrent_reset_streams(MAX_REMEMBERED_RESETS)
            // What is cancelled and opened again in one breath is over our limit for a moment, and refused:
            // a thousand such in a tunnel's life are no attack.
            .max_local_error_reset_streams(Some(MAX_LOCAL_RESETS))
            .max_send_buffer_size(GROWN_STREAM_WINDOW as usize)
            .data_frame_budget(DATA_FRAME_BUDGET)
            .handshake(tls)
            .await?;
        let alive: Pin<Box<dyn Future<Output = ()> + Send>> = match connection.ping_pong() {
            Some(pings) => Box::pin(keep_alive(pings)),
            None => Box::pin(std::future::pending()),
        };
        let shared = Shared::new(budget, Side::Server);
        Ok(Incoming {
            connection,
            alive,
            notice,
            heeded: Verdict::Calm,
            _closed: CloseOnDrop(shared.clone()),
            shared,
            grown: false,
            retired: false,
            peer,
        })
    });
    tokio::time::timeout(HANDSHAKE_DEADLINE, handshake)
        .await
        .map_err(|_| AcceptError::Timeout)?
}

impl<IO> Incoming<IO>
where
    IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    /// The next request, or none once the tunnel has ended. Cancel safe; nothing moves in any stream of
    /// the tunnel while this is not polled.
    pub async fn next(&mut self) -> Option<(Result<Connect, ConnectError>, Responder)> {
        std::future::poll_fn(|cx| self.poll_next(cx)).await
    }

    fn poll_next(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<(Result<Connect, ConnectError>, Responder)>> {
        self.shared.driver.register(cx.waker());
        if !self.grown && self.shared.may_grow() {
            self.grown = true;
            let _ = self.connection.set_initial_window_size(GROWN_STREAM_WINDOW);
        }
        if self.shared.cut.load(Ordering::Relaxed) || self.alive.as_mut().poll(cx).is_ready() {
            return Poll::Ready(None);
        }
        if !self.retired && self.shared.retired.load(Ordering::Relaxed) {
            self.drain();
        }
        loop {
            match self.connection.poll_accept(cx) {
                Poll::Pending if self.heed() => {}
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Some(Ok((_, mut respond))))
                    if self.shared.streams.load(Ordering::Relaxed) >= MAX_SERVED =>
                {
                    respond.send_reset(Reason::REFUSED_STREAM);
                }
                Poll::Ready(Some(Ok((request, respond)))) => {
                    let (head, recv) = request.into_parts();
                    let counted = Counted::new(&self.shared);
                    let responder = Responder {
                        respond,
                        recv,
                        counted,
                    };
                    return Poll::Ready(Some((Connect::decode(&head), responder)));
                }
                Poll::Ready(Some(Err(error))) => {
                    tracing::debug!(peer = %self.peer.id, %error, "tunnel broke");
                    return Poll::Ready(None);
                }
                Poll::Ready(None) => return Poll::Ready(None),
            }
        }
    }

    /// Does what the peer's frames have earned it, once; whether that is something new.
    fn heed(&mut self) -> bool {
        let verdict = self.notice.verdict();
        if verdict == self.heeded {
            return false;
        }
        self.heeded = verdict;
        tracing::debug!(peer = %self.peer.id, ?verdict, "the peer's frames were more than its work");
        match verdict {
            Verdict::Calm => {}
            Verdict::Drain => self.connection.graceful_shutdown(),
            Verdict::End => self.connection.abrupt_shutdown(Reason::ENHANCE_YOUR_CALM),
        }
        true
    }

    /// Whether the peer was told to calm down.
    pub fn is_flooded(&self) -> bool {
        self.heeded == Verdict::End
    }

    /// Tells the peer to open no more streams here; the open ones go on.
    pub fn drain(&mut self) {
        self.retired = true;
        self.connection.graceful_shutdown();
    }

    /// The identity that the peer proved.
    pub fn peer(&self) -> &SpiffeId {
        &self.peer.id
    }

    /// A view of the tunnel that does not keep it open.
    pub fn watch(&self) -> Watch {
        Watch {
            shared: self.shared.clone(),
            peer: self.peer.clone(),
        }
    }
}

/// The right to answer one request, once.
pub struct Responder {
    respond: SendResponse<Bytes>,
    recv: RecvStream,
    counted: Counted,
}

impl Responder {
    /// Answers 200: the application has accepted.
    pub fn accept(mut self) -> Result<Stream, h2::Error> {
        let send = self.respond.send_response(Response::new(()), false)?;
        Ok(Stream::new(send, self.recv, self.counted))
    }

    /// Returns once the peer has given its request up.
    pub async fn abandoned(&mut self) {
        let _ = std::future::poll_fn(|cx| self.respond.poll_reset(cx)).await;
    }

    /// Whether the tunnel's streams buffer so little that one more may begin.
    pub fn has_room(&self) -> bool {
        self.counted.may_begin()
    }

    /// Lets the peer try on another tunnel: nothing has been done for it here (RFC 9113 §8.7).
    pub fn decline(mut self) {
        self.respond.send_reset(Reason::REFUSED_STREAM);
    }

    /// Answers with an error and nothing else: no body, no reason.
    pub fn refuse(mut self, status: StatusCode) {
        let mut response = Response::new(());
        *response.status_mut() = status;
        // It fails only when the peer has gone, who needs no answer.
        let _ = self.respond.send_response(response, true);
    }
}
