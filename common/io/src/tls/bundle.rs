//! Trust bundles: the roots of each trust domain, and what has been revoked.

use culvert_core::ids::TrustDomain;
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer, TrustAnchor, pem::PemObject};
use std::{
    collections::HashMap,
    hash::{DefaultHasher, Hash, Hasher},
    sync::Arc,
};
use webpki::{CertRevocationList, OwnedCertRevocationList, anchor_from_trusted_cert};

/// Roots by trust domain, and revocation lists. Immutable; a change is a new value with a new generation.
#[derive(Debug, Clone, Default)]
pub struct TrustBundles {
    roots: HashMap<Box<str>, Arc<[TrustAnchor<'static>]>>,
    crls: Arc<[CertRevocationList<'static>]>,
    /// A digest of roots and lists: equal bundles have equal generations. Part of a pool's key.
    pub generation: u64,
}

/// Why roots or lists are not taken.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    #[error("the bundle of {0} holds no certificate, or is not PEM")]
    NoRoot(TrustDomain),
    #[error("a root of {trust_domain} is no trust anchor: {reason}")]
    Root {
        trust_domain: TrustDomain,
        reason: String,
    },
    #[error("a revocation list cannot be read: {0}")]
    Crl(String),
}

impl TrustBundles {
    /// Sets the roots of a trust domain from PEM; several overlap while they rotate.
    pub fn with_roots(mut self, trust_domain: &TrustDomain, pem: &str) -> Result<Self, BundleError> {
        let anchors = CertificateDer::pem_slice_iter(pem.as_bytes())
            .map(|der| {
                let der = der.map_err(|_| BundleError::NoRoot(trust_domain.clone()))?;
                let anchor = anchor_from_trusted_cert(&der).map_err(|error| BundleError::Root {
                    trust_domain: trust_domain.clone(),
                    reason: error.to_string(),
                })?;
                Ok(anchor.to_owned())
            })
            .collect::<Result<Arc<[_]>, BundleError>>()?;
        if anchors.is_empty() {
            return Err(BundleError::NoRoot(trust_domain.clone()));
        }
        self.roots.insert(trust_domain.as_str().into(), anchors);
        self.generation ^= digest(trust_domain.as_str(), pem);
        Ok(self)
    }

    /// Sets the revocation lists.
    pub fn with_lists(mut self, lists: &RevocationLists) -> Self {
        self.crls = lists.crls.clone();
        self.generation ^= lists.digest;
        self
    }

    pub(super) fn roots(&self, trust_domain: &str) -> Option<&[TrustAnchor<'static>]> {
        self.roots.get(trust_domain).map(AsRef::as_ref)
    }

    pub(super) fn crls(&self) -> &[CertRevocationList<'static>] {
        &self.crls
    }
}

/// Revocation lists as one file holds them.
#[derive(Debug, Clone)]
pub struct RevocationLists {
    crls: Arc<[CertRevocationList<'static>]>,
    digest: u64,
}

impl RevocationLists {
    /// Reads lists from PEM, all or none.
    pub fn from_pem(pem: &str) -> Result<Self, BundleError> {
        let crls = CertificateRevocationListDer::pem_slice_iter(pem.as_bytes())
            .map(|der| {
                let der = der.map_err(|error| BundleError::Crl(error.to_string()))?;
                let crl = OwnedCertRevocationList::from_der(&der)
                    .map_err(|error| BundleError::Crl(error.to_string()))?;
                Ok(CertRevocationList::from(crl))
            })
            .collect::<Result<Arc<[_]>, BundleError>>()?;
        if crls.is_empty() {
            return Err(BundleError::Crl("it holds no list, or is not PEM".to_owned()));
        }
        Ok(Self {
            crls,
            digest: digest("", pem),
        })
    }
}

fn digest(of: &str, pem: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    (of, pem).hash(&mut hasher);
    hasher.finish()
}
