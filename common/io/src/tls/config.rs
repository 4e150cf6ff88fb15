//! rustls configurations of the tunnel's two ends.

use super::{bundle::TrustBundles, svid::Svid, verify::Expected, verify::Verifier};
use rustls::{
    ClientConfig, ServerConfig,
    client::Resumption,
    crypto::{CryptoProvider, aws_lc_rs, aws_lc_rs::cipher_suite as suite},
    server::NoServerSessionStorage,
    sign::SingleCertAndKey,
    version::TLS13,
};
use std::sync::{Arc, LazyLock};

/// AES-GCM alone, hybrid key exchange first: ChaCha20 costs four times as much between nodes that have
/// AES, and the provider's group order already begins with X25519MLKEM768.
static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
    let cipher_suites = vec![suite::TLS13_AES_256_GCM_SHA384, suite::TLS13_AES_128_GCM_SHA256];
    Arc::new(CryptoProvider {
        cipher_suites,
        ..aws_lc_rs::default_provider()
    })
});

/// The end that accepts, with the destination pod's SVID. Every client must prove an identity that
/// `bundles` vouch for.
pub fn server_config(svid: &Svid, bundles: &Arc<TrustBundles>) -> Result<Arc<ServerConfig>, rustls::Error> {
    let verifier = Verifier {
        bundles: bundles.clone(),
        expected: Expected::AnyTrusted,
    };
    let mut config = ServerConfig::builder_with_provider(PROVIDER.clone())
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(svid.certified())));
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
    Ok(Arc::new(config))
}

/// The end that dials, with the source pod's SVID. The server must prove one of `expected`.
pub fn client_config(
    svid: &Svid,
    bundles: &Arc<TrustBundles>,
    expected: Expected,
) -> Result<Arc<ClientConfig>, rustls::Error> {
    let verifier = Verifier {
        bundles: bundles.clone(),
        expected,
    };
    let mut config = ClientConfig::builder_with_provider(PROVIDER.clone())
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(svid.certified())));
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_sni = false;
    config.enable_early_data = false;
    Ok(Arc::new(config))
}
