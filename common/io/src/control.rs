//! The channel to `control`: gRPC over TLS 1.3, with the node's token on every call.
//!
//! Invariant: nothing is sent to a server whose certificate does not chain to the bundle file and name
//! control. Both files are read anew for each connection, so that they may rotate.

use hyper_util::rt::TokioIo;
use rustls::{ClientConfig, RootCertStore, crypto::aws_lc_rs, version::TLS13};
use rustls_pki_types::{CertificateDer, ServerName, pem::PemObject};
use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::{
    Request, Status,
    metadata::{Ascii, MetadataValue},
    service::Interceptor,
    transport::{Channel, Endpoint, Uri},
};

/// Where control is and how to know it.
#[derive(Debug, Clone)]
pub struct Control {
    /// `https://host:port`.
    pub address: String,
    pub bundle: PathBuf,
    /// The DNS name in control's certificate.
    pub name: String,
    pub token: PathBuf,
}

/// Why control cannot be addressed.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    #[error("control's address {address:?}: {reason}; write https://host:15012")]
    Address { address: String, reason: String },
    #[error("control's name {0:?} is no DNS name")]
    Name(String),
}

impl Control {
    /// A channel that connects when it is first used, and again after every loss.
    pub fn channel(&self) -> Result<Channel, ControlError> {
        let refuse = |reason: String| ControlError::Address {
            address: self.address.clone(),
            reason,
        };
        let uri: Uri = self.address.parse().map_err(|e| refuse(format!("{e}")))?;
        let (Some("https"), Some(host)) = (uri.scheme_str(), uri.host()) else {
            return Err(refuse("not an https address".to_owned()));
        };
        let target = (
            host.trim_matches(['[', ']']).to_owned(),
            uri.port_u16().unwrap_or(15012),
        );
        let name =
            ServerName::try_from(self.name.clone()).map_err(|_| ControlError::Name(self.name.clone()))?;
        // tonic wraps no TLS of its own around our connector, so the scheme it sees is the plain one.
        let endpoint = Endpoint::from_shared(format!("http://{}", self.name))
            .map_err(|e| refuse(e.to_string()))?
            .connect_timeout(Duration::from_secs(5))
            .http2_keep_alive_interval(Duration::from_secs(10))
            .keep_alive_timeout(Duration::from_secs(10))
            .keep_alive_while_idle(true)
            .initial_stream_window_size(4 * 1024 * 1024)
            .initial_connection_window_size(16 * 1024 * 1024);
        let bundle = self.bundle.clone();
        Ok(
            endpoint.connect_with_connector_lazy(tower::service_fn(move |_: Uri| {
                let (bundle, target, name) = (bundle.clone(), target.clone(), name.clone());
                async move {
                    let config = tls(&bundle).await?;
                    let socket = TcpStream::connect((target.0.as_str(), target.1)).await?;
                    socket.set_nodelay(true)?;
                    let tls = TlsConnector::from(config).connect(name, socket).await?;
                    Ok::<_, io::Error>(TokioIo::new(tls))
                }
            })),
        )
    }

    /// What puts the token on a call.
    pub fn credentials(&self) -> Credentials {
        Credentials(self.token.clone())
    }
}

async fn tls(bundle: &Path) -> io::Result<Arc<ClientConfig>> {
    let invalid = |reason: String| io::Error::new(io::ErrorKind::InvalidData, reason);
    let unreadable =
        |e: io::Error| io::Error::new(e.kind(), format!("trust bundle {}: {e}", bundle.display()));
    let pem = tokio::fs::read(bundle).await.map_err(unreadable)?;
    let mut roots = RootCertStore::empty();
    for der in CertificateDer::pem_slice_iter(&pem) {
        let der = der.map_err(|e| invalid(format!("{}: {e}", bundle.display())))?;
        roots
            .add(der)
            .map_err(|e| invalid(format!("{}: {e}", bundle.display())))?;
    }
    let mut config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_protocol_versions(&[&TLS13])
        .map_err(|e| invalid(e.to_string()))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.resumption = rustls::client::Resumption::disabled();
    Ok(Arc::new(config))
}

/// Puts `authorization: Bearer TOKEN` on every call.
#[derive(Debug, Clone)]
pub struct Credentials(PathBuf);

impl Interceptor for Credentials {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        let unreadable = |reason: String| {
            Status::unauthenticated(format!("the node's token {}: {reason}", self.0.display()))
        };
        let token = std::fs::read_to_string(&self.0).map_err(|e| unreadable(e.to_string()))?;
        let mut value: MetadataValue<Ascii> = format!("Bearer {}", token.trim())
            .parse()
            .map_err(|_| unreadable("not a token".to_owned()))?;
        value.set_sensitive(true);
        request.metadata_mut().insert("authorization", value);
        Ok(request)
    }
}

/// How long to wait before the next try: 10 ms doubling to 15 s, spread by ±20 %.
#[derive(Debug, Default)]
pub struct Backoff(u32);

impl Backoff {
    pub fn pause(&mut self) -> Duration {
        let base = Duration::from_millis(10)
            .saturating_mul(1 << self.0.min(11))
            .min(Duration::from_secs(15));
        self.0 = self.0.saturating_add(1);
        base.mul_f64(rand::random_range(0.8..1.2))
    }

    pub fn reset(&mut self) {
        self.0 = 0;
    }
}
