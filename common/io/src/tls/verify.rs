//! The verifier of both ends: the leaf's form, then its chain, then its name.

use super::{
    bundle::TrustBundles,
    leaf::{LeafError, MAX_CHAIN, check_intermediate, leaf_expiry, leaf_identity},
};
use culvert_core::ids::SpiffeId;
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, OtherError, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{WebPkiSupportedAlgorithms, aws_lc_rs, verify_tls13_signature},
    server::danger::{ClientCertVerified, ClientCertVerifier},
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use webpki::{
    EndEntityCert, ExpirationPolicy, KeyUsage, RevocationCheckDepth, RevocationOptionsBuilder,
    UnknownStatusPolicy,
};

/// Which identities a peer may have.
#[derive(Debug, Clone)]
pub enum Expected {
    /// Any that a bundle's roots vouch for: policy decides afterwards.
    AnyTrusted,
    /// One of these, exactly. An empty set never matches.
    OneOf(Box<[SpiffeId]>),
}

/// Why a peer's certificate is refused. It is always the peer's fault.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VerifyError {
    #[error(transparent)]
    Leaf(#[from] LeafError),
    #[error("the chain has {0} certificates; at most {MAX_CHAIN} are allowed")]
    LongChain(usize),
    #[error("trust domain of {0} is not trusted")]
    UnknownTrustDomain(SpiffeId),
    #[error("chain of {id}: {reason}")]
    Chain { id: SpiffeId, reason: webpki::Error },
    #[error("certificate of {0} is revoked, or its revocation status is unknown")]
    Revoked(SpiffeId),
    #[error("peer is {0}, which is not expected there")]
    Unexpected(SpiffeId),
}

impl VerifyError {
    /// The metrics' word for it.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Leaf(_) => "not_an_svid",
            Self::LongChain(_) => "long_chain",
            Self::UnknownTrustDomain(_) => "unknown_trust_domain",
            Self::Chain { .. } => "chain",
            Self::Revoked(_) => "revoked",
            Self::Unexpected(_) => "unexpected_identity",
        }
    }

    /// The cause inside an error that a handshake ended with, if it is one of ours.
    pub fn of<'e>(error: &'e (dyn std::error::Error + 'static)) -> Option<&'e Self> {
        let mut error = Some(error);
        while let Some(one) = error {
            if let Some(ours) = one.downcast_ref::<Self>() {
                return Some(ours);
            }
            if let Some(rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(cause)))) =
                one.downcast_ref::<rustls::Error>()
            {
                return cause.downcast_ref::<Self>();
            }
            // An `io::Error` shows its inner error's source, not the error itself.
            if let Some(inner) = one.downcast_ref::<std::io::Error>().and_then(|io| io.get_ref()) {
                return Self::of(inner);
            }
            error = one.source();
        }
        None
    }
}

impl From<VerifyError> for rustls::Error {
    fn from(error: VerifyError) -> Self {
        CertificateError::Other(OtherError(Arc::new(error))).into()
    }
}

/// What revocation lists are for, where there are any.
#[derive(Debug, Clone, Copy)]
enum Lists {
    /// Each certificate of a chain must be known not to be revoked: a list of its issuer is there, and is not
    /// out of date (T37).
    Demanded,
    /// What they name is revoked; of what they do not speak of they say nothing.
    Heeded,
}

impl Lists {
    fn unknown(self) -> UnknownStatusPolicy {
        match self {
            Self::Demanded => UnknownStatusPolicy::Deny,
            Self::Heeded => UnknownStatusPolicy::Allow,
        }
    }

    fn expired(self) -> ExpirationPolicy {
        match self {
            Self::Demanded => ExpirationPolicy::Enforce,
            Self::Heeded => ExpirationPolicy::Ignore,
        }
    }
}

/// Verifies the peer of a tunnel.
#[derive(Debug)]
pub(super) struct Verifier {
    pub bundles: Arc<TrustBundles>,
    pub expected: Expected,
}

/// Judges the peer of an open tunnel again, by bundles that are newer than its handshake: whether its chain
/// still leads to a root and nothing in it is revoked. Time is not judged: what ends with a leaf's validity
/// is for the tunnel's owner to say, and a list that is out of date or missing refuses new tunnels alone.
pub fn still_trusted(bundles: &Arc<TrustBundles>, chain: &[CertificateDer<'_>]) -> Result<(), VerifyError> {
    let (leaf, intermediates) = chain.split_first().ok_or(LeafError::Malformed)?;
    let verifier = Verifier {
        bundles: bundles.clone(),
        expected: Expected::AnyTrusted,
    };
    // A moment within its validity.
    let ends = leaf_expiry(leaf)?;
    let within = ends.min(SystemTime::now()) - Duration::from_secs(1);
    let at = UnixTime::since_unix_epoch(within.duration_since(UNIX_EPOCH).unwrap_or_default());
    let usage = KeyUsage::client_auth();
    verifier
        .verify(leaf, intermediates, at, usage, Lists::Heeded)
        .map(|_| ())
}

impl Verifier {
    /// Chain first, name second: a name says nothing until its chain holds.
    fn verify(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
        usage: KeyUsage,
        lists: Lists,
    ) -> Result<SpiffeId, VerifyError> {
        if intermediates.len() >= MAX_CHAIN {
            return Err(VerifyError::LongChain(intermediates.len() + 1));
        }
        let id = leaf_identity(leaf)?;
        let anchors = self
            .bundles
            .roots(id.trust_domain())
            .ok_or_else(|| VerifyError::UnknownTrustDomain(id.clone()))?;
        let refuse = |reason: webpki::Error| match reason {
            webpki::Error::CertRevoked
            | webpki::Error::UnknownRevocationStatus
            | webpki::Error::CrlExpired { .. } => VerifyError::Revoked(id.clone()),
            reason => VerifyError::Chain {
                id: id.clone(),
                reason,
            },
        };
        for intermediate in intermediates {
            check_intermediate(intermediate)?;
        }
        let certificate = EndEntityCert::try_from(leaf).map_err(refuse)?;
        let crls: Vec<_> = self.bundles.crls().iter().collect();
        let revocation = RevocationOptionsBuilder::new(&crls).ok().map(|options| {
            options
                .with_depth(RevocationCheckDepth::Chain)
                .with_status_policy(lists.unknown())
                .with_expiration_policy(lists.expired())
                .build()
        });
        certificate
            .verify_for_usage(
                algorithms().all,
                anchors,
                intermediates,
                now,
                usage,
                revocation,
                None,
            )
            .map_err(refuse)?;
        match &self.expected {
            Expected::OneOf(expected) if !expected.contains(&id) => Err(VerifyError::Unexpected(id)),
            Expected::OneOf(_) | Expected::AnyTrusted => Ok(id),
        }
    }
}

/// Fails unless a peer that trusts `bundles` takes this chain now, as a client's and as a server's.
pub(super) fn verify(bundles: &TrustBundles, chain: &[CertificateDer<'_>]) -> Result<(), VerifyError> {
    let verifier = Verifier {
        bundles: Arc::new(bundles.clone()),
        expected: Expected::AnyTrusted,
    };
    let (leaf, intermediates) = chain.split_first().ok_or(LeafError::Malformed)?;
    for usage in [KeyUsage::client_auth(), KeyUsage::server_auth()] {
        verifier.verify(leaf, intermediates, UnixTime::now(), usage, Lists::Demanded)?;
    }
    Ok(())
}

fn algorithms() -> WebPkiSupportedAlgorithms {
    aws_lc_rs::default_provider().signature_verification_algorithms
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.verify(leaf, intermediates, now, KeyUsage::server_auth(), Lists::Demanded)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _leaf: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::PeerIncompatible::Tls12NotOffered.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, leaf, signature, &algorithms())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        algorithms().supported_schemes()
    }
}

impl ClientCertVerifier for Verifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.verify(leaf, intermediates, now, KeyUsage::client_auth(), Lists::Demanded)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        ServerCertVerifier::verify_tls12_signature(self, message, leaf, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        ServerCertVerifier::verify_tls13_signature(self, message, leaf, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        algorithms().supported_schemes()
    }
}
