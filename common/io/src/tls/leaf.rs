//! The rules that a leaf certificate must keep before its name means anything (X509-SVID §2–5).

use culvert_core::ids::{IdError, SpiffeId};
use rustls_pki_types::CertificateDer;
use std::time::{Duration, SystemTime};
use x509_parser::{
    extensions::GeneralName,
    prelude::{FromDer, X509Certificate},
    time::ASN1Time,
};

/// Most certificates in a chain, the leaf included.
pub const MAX_CHAIN: usize = 5;

/// Why a certificate is no X.509-SVID.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LeafError {
    #[error("not a certificate")]
    Malformed,
    #[error("it is valid for an impossible time")]
    Time,
    #[error("no subject alternative name")]
    NoName,
    #[error("{0} URI names, where exactly one is allowed")]
    Uris(usize),
    #[error("a subject alternative name of a kind that an SVID must not have")]
    OtherName,
    #[error(transparent)]
    Id(#[from] IdError),
    #[error("basic constraints are absent, or say that it is a CA")]
    IsCa,
    #[error("key usage must have digitalSignature and neither keyCertSign nor cRLSign")]
    KeyUsage,
    #[error("an intermediate is not allowed to sign certificates")]
    IntermediateUsage,
}

/// The one SPIFFE ID that a leaf names.
pub fn leaf_identity(leaf: &CertificateDer<'_>) -> Result<SpiffeId, LeafError> {
    let certificate = parse(leaf)?;
    let names = certificate
        .subject_alternative_name()
        .map_err(|_| LeafError::Malformed)?
        .ok_or(LeafError::NoName)?;
    let mut uris = vec![];
    for name in &names.value.general_names {
        match name {
            GeneralName::URI(uri) => uris.push(*uri),
            // DNS names are allowed beside the URI and never read (X509-SVID §2).
            GeneralName::DNSName(_) => {}
            _ => return Err(LeafError::OtherName),
        }
    }
    let [uri] = uris.as_slice() else {
        return Err(LeafError::Uris(uris.len()));
    };
    let constraints = certificate
        .basic_constraints()
        .map_err(|_| LeafError::Malformed)?;
    if constraints.is_none_or(|constraints| constraints.value.ca) {
        return Err(LeafError::IsCa);
    }
    let usage = certificate
        .key_usage()
        .map_err(|_| LeafError::Malformed)?
        .ok_or(LeafError::KeyUsage)?
        .value;
    if !usage.digital_signature() || usage.key_cert_sign() || usage.crl_sign() {
        return Err(LeafError::KeyUsage);
    }
    Ok(uri.parse()?)
}

/// When a leaf's validity ends.
pub fn leaf_expiry(leaf: &CertificateDer<'_>) -> Result<SystemTime, LeafError> {
    instant(parse(leaf)?.validity().not_after)
}

pub(super) fn instant(time: ASN1Time) -> Result<SystemTime, LeafError> {
    u64::try_from(time.timestamp())
        .ok()
        .and_then(|seconds| SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds)))
        .ok_or(LeafError::Time)
}

/// Whether an intermediate may sign certificates: the chain builder checks `cA`, not the key usage.
pub(super) fn check_intermediate(certificate: &CertificateDer<'_>) -> Result<(), LeafError> {
    let certificate = parse(certificate)?;
    let usage = certificate.key_usage().map_err(|_| LeafError::Malformed)?;
    match usage {
        Some(usage) if usage.value.key_cert_sign() => Ok(()),
        _ => Err(LeafError::IntermediateUsage),
    }
}

pub(super) fn parse<'a>(der: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, LeafError> {
    match X509Certificate::from_der(der) {
        Ok(([], certificate)) => Ok(certificate),
        _ => Err(LeafError::Malformed),
    }
}
