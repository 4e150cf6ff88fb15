//! Fuzz targets for what reaches control from others: signing requests, and objects.

use crate::{
    authority::{Authority, SignError},
    index::{
        self, Index,
        tests::{ALL, settings},
        world::TYPES,
    },
    watch::files,
};
use culvert_core::ids::SpiffeId;
use culvert_fuzz::{fuzz, kind, seed};
use culvert_io::{tls::leaf_identity, xds::decode::decode};
use rcgen::{
    CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384, PKCS_ED25519, SanType,
};
use rustls_pki_types::{CertificateDer, pem::PemObject};
use std::{sync::Arc, time::Duration};

/// DER as PEM has it; what is text already stays as it is.
fn pem(input: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    if input.starts_with(b"-----") {
        return String::from_utf8_lossy(input).into_owned();
    }
    let mut text = String::from("-----BEGIN CERTIFICATE REQUEST-----\n");
    for chunk in input.chunks(3) {
        let word =
            chunk.iter().fold(0u32, |word, byte| word << 8 | u32::from(*byte)) << (8 * (3 - chunk.len()));
        for at in 0..4 {
            let six = (word >> (18 - 6 * at) & 63) as usize;
            text.push(if at <= chunk.len() {
                ALPHABET[six].into()
            } else {
                '='
            });
        }
    }
    text + "\n-----END CERTIFICATE REQUEST-----\n"
}

#[test]
fn fuzz_csr() {
    for (name, algorithm) in [
        ("p256", &PKCS_ECDSA_P256_SHA256),
        ("p384", &PKCS_ECDSA_P384_SHA384),
        ("ed25519", &PKCS_ED25519),
    ] {
        let key = KeyPair::generate_for(algorithm).unwrap();
        let mut params = CertificateParams::default();
        let other = "spiffe://cluster.local/ns/bank/sa/vault";
        params.subject_alt_names = vec![SanType::URI(other.try_into().unwrap())];
        let request = params.serialize_request(&key).unwrap();
        seed("csr", name, request.der());
        seed("csr", &format!("{name}.pem"), request.pem().unwrap().as_bytes());
    }
    let state = tempfile::tempdir().unwrap();
    let authority = Authority::generated(state.path(), Duration::from_secs(3600)).unwrap();
    let id: SpiffeId = "spiffe://cluster.local/ns/shop/sa/web".parse().unwrap();
    let outcomes = fuzz("csr", 10_000, |input| {
        match authority.sign(&id, &pem(input), Duration::from_secs(60)) {
            Ok((chain, _)) => {
                let leaf = CertificateDer::from_pem_slice(chain[0].as_bytes()).unwrap();
                assert_eq!(
                    leaf_identity(&leaf).as_ref(),
                    Ok(&id),
                    "of a request only the key is used"
                );
                "signed".into()
            }
            Err(SignError::Key) => "key".into(),
            Err(error) => kind(&error),
        }
    });
    assert!(outcomes > 3, "{outcomes} outcomes");
}

#[test]
fn fuzz_config_objects() {
    let folder = tempfile::tempdir().unwrap();
    let check: files::Check = Arc::new(|object| index::check(object, &settings()));
    let outcomes = fuzz("config_objects", 2_000, |input| {
        std::fs::write(folder.path().join("x.yaml"), input).unwrap();
        let changes = match files::Folder::new(folder.path().to_owned(), check.clone()).read_all() {
            Ok(changes) => changes,
            Err(mistakes) => return kind(&mistakes[0].what),
        };
        let Some(world) = Index::new(settings(), 0, Default::default()).apply(&changes, vec![], ALL) else {
            return "nothing new".into();
        };
        // What control takes, its nodes can read.
        let mut kinds = vec![];
        for (of, url) in TYPES.iter().enumerate() {
            for resource in world.all(of) {
                decode(url, &resource.bytes).unwrap_or_else(|e| panic!("{}: {e}", resource.name));
            }
            kinds.push(world.all(of).count());
        }
        format!("{kinds:?}")
    });
    assert!(outcomes > 10, "{outcomes} outcomes");
}
