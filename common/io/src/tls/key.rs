//! A workload's private key, on its way from the random source into an SVID.
//!
//! Invariant: every copy of it outside the crypto library is in a buffer that is zeroed when it is let go, and
//! the library zeroes what it frees. It is never text.

use aws_lc_rs::{
    pkcs8::Document,
    rand::SystemRandom,
    signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair as _},
};
use rcgen::{PKCS_ECDSA_P256_SHA256, PublicKeyData, SignatureAlgorithm, SigningKey};
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};

/// A key on P-256, just made. It signs its own request.
pub struct NewKey {
    pair: EcdsaKeyPair,
    /// Zeroes itself.
    pkcs8: Document,
}

impl NewKey {
    pub fn generate() -> Result<Self, rcgen::Error> {
        let failed = |_| rcgen::Error::RingUnspecified;
        let pair = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_ASN1_SIGNING).map_err(failed)?;
        let pkcs8 = pair.to_pkcs8v1().map_err(failed)?;
        Ok(Self { pair, pkcs8 })
    }

    /// The key itself, borrowed.
    pub fn der(&self) -> PrivateKeyDer<'_> {
        PrivatePkcs8KeyDer::from(self.pkcs8.as_ref()).into()
    }
}

impl PublicKeyData for NewKey {
    fn der_bytes(&self) -> &[u8] {
        self.pair.public_key().as_ref()
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        &PKCS_ECDSA_P256_SHA256
    }
}

impl SigningKey for NewKey {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        let signature = self.pair.sign(&SystemRandom::new(), message);
        let signature = signature.map_err(|_| rcgen::Error::RingUnspecified)?;
        Ok(signature.as_ref().to_owned())
    }
}
