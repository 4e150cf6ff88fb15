//! An SVID, got as a ztunnel gets one: with a node's token, from control's CA.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use culvert_io::control::Control;
use culvert_proto::ca::IstioCertificateRequest;
use culvert_proto::ca::istio_certificate_service_client::IstioCertificateServiceClient;
use rcgen::{CertificateParams, DistinguishedName, KeyPair, SanType};
use rustls::client::WantsClientCert;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::{ClientConfig, ConfigBuilder, DigitallySignedStruct, ServerConfig, SignatureScheme};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};

use crate::lab::{Pod, poll_until};
use crate::mesh::{Mesh, MeshNode, TRUST_DOMAIN};

/// A certificate chain with its key, and the roots that came with it.
#[derive(Debug, Clone)]
pub struct Svid {
    pub chain: Vec<CertificateDer<'static>>,
    pub chain_pem: String,
    pub key_pem: String,
    pub roots_pem: String,
}

impl Svid {
    /// Asks control for `id` with the token of `node`; repeats until control knows the pod.
    pub fn issue(mesh: &Mesh, node: &MeshNode, id: &str) -> Result<Self> {
        poll_until("the CA grants it", Duration::from_secs(20), || {
            Self::ask(mesh, node, id).map(Some)
        })
    }

    /// The SVID of a pod, by the token of its node.
    pub fn of(mesh: &Mesh, node: &MeshNode, pod: &Pod) -> Result<Self> {
        Self::issue(mesh, node, &identity(pod))
    }

    /// Asks once.
    pub fn ask(mesh: &Mesh, node: &MeshNode, id: &str) -> Result<Self> {
        let control = Control {
            address: mesh.control_url(),
            bundle: mesh.root(),
            name: crate::mesh::CONTROL_NAME.to_owned(),
            token: node.path("token"),
        };
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(id.try_into()?)];
        let asked = prost_types::value::Kind::StringValue(id.to_owned());
        let fields = [(
            "ImpersonatedIdentity".to_owned(),
            prost_types::Value { kind: Some(asked) },
        )];
        let request = IstioCertificateRequest {
            csr: params.serialize_request(&key)?.pem()?,
            validity_duration: 3600,
            metadata: Some(prost_types::Struct {
                fields: fields.into(),
            }),
        };
        let answer = node.ztunnel_pod().inside(|| -> Result<_> {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?;
            runtime.block_on(async {
                let mut service = IstioCertificateServiceClient::with_interceptor(
                    control.channel()?,
                    control.credentials(),
                );
                let answer =
                    tokio::time::timeout(Duration::from_secs(5), service.create_certificate(request));
                Ok(answer.await??.into_inner())
            })
        })??;
        let (roots, chain) = answer.cert_chain.split_last().context("an empty answer")?;
        ensure!(!chain.is_empty(), "no chain in the answer");
        let chain_pem = chain.concat();
        Ok(Self {
            chain: CertificateDer::pem_slice_iter(chain_pem.as_bytes()).collect::<Result<_, _>>()?,
            chain_pem,
            key_pem: key.serialize_pem(),
            roots_pem: roots.clone(),
        })
    }

    /// A client's TLS with this SVID: it takes any server for what it says it is.
    pub fn client(&self) -> Result<ClientConfig> {
        let key = PrivateKeyDer::from_pem_slice(self.key_pem.as_bytes())?;
        let config = trusting()?.with_client_auth_cert(self.chain.clone(), key)?;
        Ok(speaking_h2(config))
    }

    /// A server's TLS with this SVID: it takes any client, and asks for no certificate.
    pub fn server(&self) -> Result<ServerConfig> {
        let key = PrivateKeyDer::from_pem_slice(self.key_pem.as_bytes())?;
        let provider = Arc::new(aws_lc_rs::default_provider());
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(self.chain.clone(), key)?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        // What it says is there before the client has said anything.
        config.send_half_rtt_data = true;
        Ok(config)
    }

    /// A client's TLS without a certificate.
    pub fn anonymous() -> Result<ClientConfig> {
        Ok(speaking_h2(trusting()?.with_no_client_auth()))
    }
}

fn trusting() -> Result<ConfigBuilder<ClientConfig, WantsClientCert>> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    Ok(ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anyone(provider))))
}

fn speaking_h2(mut config: ClientConfig) -> ClientConfig {
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.enable_sni = false;
    config
}

/// The SPIFFE ID of a pod.
fn identity(pod: &Pod) -> String {
    let spec = pod.spec();
    format!(
        "spiffe://{TRUST_DOMAIN}/ns/{}/sa/{}",
        spec.namespace, spec.service_account
    )
}

/// Verifies nothing.
#[derive(Debug)]
struct Anyone(Arc<CryptoProvider>);

impl ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _leaf: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _leaf: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _message: &[u8],
        _leaf: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
