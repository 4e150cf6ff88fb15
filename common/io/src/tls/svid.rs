//! A workload's own certificate and key.

use super::{
    bundle::TrustBundles,
    leaf::{LeafError, MAX_CHAIN, instant, leaf_identity, parse},
    verify::VerifyError,
};
use culvert_core::ids::SpiffeId;
use rustls::{crypto::aws_lc_rs, sign::CertifiedKey};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use std::{fmt, sync::Arc, time::SystemTime};
use zeroize::{Zeroize, Zeroizing};

/// An X.509-SVID with its key. Clones share both; the key leaves memory with the last one.
#[derive(Clone)]
pub struct Svid {
    id: SpiffeId,
    not_before: SystemTime,
    not_after: SystemTime,
    serial: Arc<str>,
    certified: Arc<CertifiedKey>,
    /// The key again, for a successor (settled D6): the signer above does not give it out.
    key: Arc<Zeroizing<Vec<u8>>>,
}

/// Why a certificate and a key are no SVID.
#[derive(Debug, thiserror::Error)]
pub enum SvidError {
    #[error("the chain holds no certificate, or is not PEM")]
    NoCertificate,
    #[error("the chain holds {0} certificates; at most {MAX_CHAIN} are allowed")]
    LongChain(usize),
    #[error("the key is not PEM, or of a kind that is not supported")]
    Key,
    #[error("the key does not belong to the certificate")]
    OtherKey,
    #[error(transparent)]
    Leaf(#[from] LeafError),
}

impl Svid {
    /// Reads a PEM chain, leaf first, and its PEM key.
    pub fn from_pem(chain: &str, key: &str) -> Result<Self, SvidError> {
        let mut key = PrivateKeyDer::from_pem_slice(key.as_bytes()).map_err(|_| SvidError::Key)?;
        let svid = Self::from_chain(chain, &key);
        key.zeroize();
        svid
    }

    /// Reads a PEM chain, leaf first, for a key.
    pub fn from_chain(chain: &str, key: &PrivateKeyDer<'_>) -> Result<Self, SvidError> {
        let chain = CertificateDer::pem_slice_iter(chain.as_bytes())
            .collect::<Result<Vec<_>, _>>()
            .map_err(|_| SvidError::NoCertificate)?;
        Self::from_der(chain, key)
    }

    /// Takes a chain, leaf first, and its key.
    pub fn from_der(chain: Vec<CertificateDer<'static>>, key: &PrivateKeyDer<'_>) -> Result<Self, SvidError> {
        let leaf = chain.first().ok_or(SvidError::NoCertificate)?;
        if chain.len() > MAX_CHAIN {
            return Err(SvidError::LongChain(chain.len()));
        }
        let id = leaf_identity(leaf)?;
        let parsed = parse(leaf)?;
        let serial = parsed.raw_serial_as_string().into();
        let not_before = instant(parsed.validity().not_before)?;
        let not_after = instant(parsed.validity().not_after)?;
        let signer = aws_lc_rs::sign::any_supported_type(key).map_err(|_| SvidError::Key)?;
        let certified = CertifiedKey::new(chain, signer);
        certified.keys_match().map_err(|_| SvidError::OtherKey)?;
        Ok(Self {
            id,
            not_before,
            not_after,
            serial,
            certified: Arc::new(certified),
            key: Arc::new(Zeroizing::new(key.secret_der().to_vec())),
        })
    }

    pub fn id(&self) -> &SpiffeId {
        &self.id
    }

    pub fn not_before(&self) -> SystemTime {
        self.not_before
    }

    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// The leaf's serial number, in hexadecimal.
    pub fn serial(&self) -> &str {
        &self.serial
    }

    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.certified.cert
    }

    /// Fails unless a peer that trusts `bundles` takes it now.
    pub fn verify(&self, bundles: &TrustBundles) -> Result<(), VerifyError> {
        super::verify::verify(bundles, &self.certified.cert).map(|_| ())
    }

    /// DER of the private key.
    pub(crate) fn key(&self) -> &[u8] {
        &self.key
    }

    pub(super) fn certified(&self) -> Arc<CertifiedKey> {
        self.certified.clone()
    }
}

impl fmt::Debug for Svid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Svid")
            .field("id", &self.id)
            .field("serial", &self.serial)
            .finish_non_exhaustive()
    }
}
