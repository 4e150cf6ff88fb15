//! TLS between proxies: who the peer is, proved.
//!
//! ```text
//! Svid + TrustBundles ──▶ server_config / client_config ──▶ handshake ──▶ SpiffeId of the peer
//! ```
//! TLS 1.3 alone, hybrid X25519MLKEM768 first, no resumption and no early data: a resumed session would
//! outlive an SVID, a bundle or a policy. Invariant: a connection that came up has a peer whose leaf
//! names exactly one SPIFFE ID, chains to the roots of that ID's trust domain, and, where we dialled, is
//! one of those expected.

mod bundle;
mod config;
mod key;
mod leaf;
mod svid;
mod verify;

pub use bundle::{BundleError, RevocationLists, TrustBundles};
pub use config::{client_config, server_config};
pub use key::NewKey;
pub use leaf::{LeafError, leaf_expiry, leaf_identity};
pub use svid::{Svid, SvidError};
pub use verify::{Expected, VerifyError, still_trusted};

#[cfg(test)]
pub(crate) mod tests;
