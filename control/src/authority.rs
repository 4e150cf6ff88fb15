//! The certificate authority: which identities a node may have, and the certificates for them.
//!
//! ```text
//! node (from its token) + asked ID ──▶ is a pod with that ID on that node? ──▶ leaf, chain, roots
//! ```
//! Invariant: of a request only the public key is used. The name comes from pods that run on the caller's
//! node, compared and never parsed; usage, life and issuer are ours (T38, TR-1).

use anyhow::{Context, bail};
use culvert_core::ids::{SpiffeId, TrustDomain};
use culvert_io::tls::{NewKey, Svid, TrustBundles};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, CertifiedIssuer, DistinguishedName,
    DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256,
    PKCS_ECDSA_P384_SHA384, PublicKeyData, SanType, SerialNumber,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use std::{
    fs,
    net::IpAddr,
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::Path,
    time::{Duration, SystemTime},
};
use zeroize::Zeroizing;

/// Certificates begin this much in the past, so that clocks may differ, or be set back by ten minutes.
const BACKDATE: Duration = Duration::from_secs(11 * 60);

/// A generated root lives this long; it is for laboratories.
const ROOT_LIFE: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// Life of this server's own certificate; it is made anew at each start.
const SERVER_LIFE: Duration = Duration::from_secs(30 * 24 * 3600);

/// Bytes of an uncompressed point of each curve (SEC 1 §2.3.3).
const P256_POINT: usize = 65;
const P384_POINT: usize = 97;

/// Signs leaves for identities.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    /// PEM of the issuer and what is above it, without the root; empty when the root issues.
    intermediates: Vec<String>,
    roots: String,
    max_life: Duration,
}

/// Why a request is not signed. The caller is told nothing of it; the log is.
#[derive(Debug, thiserror::Error)]
pub enum SignError {
    #[error("the request is no PKCS#10, or its proof of possession fails: {0}")]
    Request(String),
    #[error("the key is not ECDSA P-256 or P-384")]
    Key,
    #[error("signing: {0}")]
    Sign(#[from] rcgen::Error),
}

impl Authority {
    /// Takes a root from the state folder, or generates one there.
    pub fn generated(state: &Path, max_life: Duration) -> anyhow::Result<Self> {
        let (key_file, cert_file) = (state.join("ca-key.pem"), state.join("root.pem"));
        if key_file.exists() {
            let key = fs::read_to_string(&key_file).map(Zeroizing::new);
            let key = key.with_context(|| key_file.display().to_string())?;
            let roots = fs::read_to_string(&cert_file).with_context(|| cert_file.display().to_string())?;
            return Self::from_pem(&roots, &key, &roots, max_life);
        }
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, "culvert root");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        validity(&mut params, ROOT_LIFE);
        let pem = Zeroizing::new(key.serialize_pem());
        let root = CertifiedIssuer::self_signed(params, key)?;
        write_private(&key_file, &pem)?;
        write_public(&cert_file, &root.pem())?;
        Self::from_pem(&root.pem(), &pem, &root.pem(), max_life)
    }

    /// Takes a chain, issuer first, its key, and the roots above it.
    pub fn from_pem(chain_pem: &str, key: &str, roots: &str, max_life: Duration) -> anyhow::Result<Self> {
        let key = KeyPair::from_pem(key).context("the CA's key")?;
        let chain: Vec<CertificateDer<'_>> = CertificateDer::pem_slice_iter(chain_pem.as_bytes())
            .collect::<Result<_, _>>()
            .context("the CA's chain")?;
        let Some(first) = chain.first() else {
            bail!("the CA's chain holds no certificate")
        };
        let root_ders: Vec<CertificateDer<'_>> = CertificateDer::pem_slice_iter(roots.as_bytes())
            .collect::<Result<_, _>>()
            .context("the roots")?;
        if root_ders.is_empty() {
            bail!("the roots hold no certificate");
        }
        let issuer = Issuer::from_ca_cert_der(first, key).context("the CA's certificate")?;
        let intermediates = certificates(chain_pem)
            .filter(|(der, _)| !root_ders.contains(der))
            .map(|(_, pem)| pem)
            .collect();
        Ok(Self {
            issuer,
            intermediates,
            roots: roots.to_owned(),
            max_life,
        })
    }

    /// Fails unless what it signs is what the mesh takes: the key is the certificate's, and the chain leads to
    /// one of the roots.
    pub fn check(&self, trust_domain: &TrustDomain) -> anyhow::Result<()> {
        let id = SpiffeId::from_template(trust_domain, "culvert-system", "control")?;
        let key = NewKey::generate()?;
        let csr = CertificateParams::default().serialize_request(&key)?.pem()?;
        let (elements, _) = self.sign(&id, &csr, Duration::from_secs(60))?;
        let (roots, chain) = elements.split_last().context("no certificate")?;
        let svid = Svid::from_chain(&chain.concat(), &key.der()).context("the CA's chain")?;
        let bundles = TrustBundles::default()
            .with_roots(trust_domain, roots)
            .context("the roots")?;
        svid.verify(&bundles)
            .context("the CA's key, chain and roots do not belong together")
    }

    /// The trust bundle, PEM.
    pub fn roots(&self) -> &str {
        &self.roots
    }

    /// Signs a leaf for `id` with the key of a request. Of the answer's elements the first is the leaf and
    /// the last the roots.
    pub fn sign(&self, id: &SpiffeId, csr: &str, life: Duration) -> Result<(Vec<String>, String), SignError> {
        let request = CertificateSigningRequestParams::from_pem(csr)
            .map_err(|error| SignError::Request(error.to_string()))?;
        let key = (
            request.public_key.algorithm(),
            request.public_key.der_bytes().len(),
        );
        // The algorithm is that of the signature: a key of another curve than it names has another length.
        if ![
            (&PKCS_ECDSA_P256_SHA256, P256_POINT),
            (&PKCS_ECDSA_P384_SHA384, P384_POINT),
        ]
        .contains(&key)
        {
            return Err(SignError::Key);
        }
        let mut params = leaf();
        params.subject_alt_names = vec![SanType::URI(id.as_str().try_into()?)];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        validity(&mut params, life.min(self.max_life).max(Duration::from_secs(1)));
        let (serial, text) = serial();
        params.serial_number = Some(serial);
        let signed = params.signed_by(&request.public_key, &self.issuer)?;
        let mut elements = vec![signed.pem()];
        elements.extend(self.intermediates.iter().cloned());
        elements.push(self.roots.clone());
        Ok((elements, text))
    }

    /// This server's own certificate and key.
    pub fn server_certificate(
        &self,
        name: &str,
        addresses: &[IpAddr],
    ) -> anyhow::Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut params = leaf();
        params.subject_alt_names = vec![SanType::DnsName(name.try_into()?)];
        let specific = addresses.iter().filter(|ip| !ip.is_unspecified());
        params
            .subject_alt_names
            .extend(specific.map(|ip| SanType::IpAddress(*ip)));
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        validity(&mut params, SERVER_LIFE);
        let mut chain = vec![params.signed_by(&key, &self.issuer)?.der().clone()];
        for one in &self.intermediates {
            chain.push(CertificateDer::from_pem_slice(one.as_bytes())?);
        }
        let key = PrivateKeyDer::try_from(key.serialize_der()).map_err(anyhow::Error::msg)?;
        Ok((chain, key))
    }
}

fn leaf() -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params
}

/// A random serial of 20 octets whose first bit is clear (RFC 5280 §4.1.2.2).
fn serial() -> (SerialNumber, String) {
    let mut bytes = [0u8; 16];
    // The system's random source does not fail once it is up.
    let _ = rustls::crypto::aws_lc_rs::default_provider()
        .secure_random
        .fill(&mut bytes);
    bytes[0] = bytes[0] & 0x7f | 0x40;
    let text = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    (SerialNumber::from_slice(&bytes), text)
}

fn validity(params: &mut CertificateParams, life: Duration) {
    let now = SystemTime::now();
    params.not_before = (now - BACKDATE).into();
    params.not_after = (now + life).into();
}

/// The certificates of a PEM text, each with its own part of the text.
fn certificates(text: &str) -> impl Iterator<Item = (CertificateDer<'static>, String)> {
    const END: &str = "-----END CERTIFICATE-----";
    text.split_inclusive(END).filter_map(|part| {
        let der = CertificateDer::from_pem_slice(part.as_bytes()).ok()?;
        Some((der, format!("{}\n", part.trim_start())))
    })
}

fn write_private(path: &Path, text: &str) -> anyhow::Result<()> {
    use std::io::Write;
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    Ok(file.write_all(text.as_bytes())?)
}

/// Writes a file that others may read, in one step.
pub fn write_public(path: &Path, text: &str) -> anyhow::Result<()> {
    let part = path.with_extension("part");
    fs::write(&part, text)?;
    fs::set_permissions(&part, fs::Permissions::from_mode(0o644))?;
    Ok(fs::rename(&part, path)?)
}

#[cfg(test)]
mod tests;
