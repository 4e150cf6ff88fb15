//! Which node calls.

use super::tls::Peer;
use anyhow::Context;
use sha2::{Digest, Sha256};
use std::{collections::BTreeMap, path::Path};
use tonic::{Request, Status};

/// Join tokens and their nodes. Tokens are compared by digest, so that timing tells nothing of them.
pub struct Tokens(Vec<([u8; 32], String)>);

/// Shortest token that is taken.
const MIN_BYTES: usize = 16;

impl Tokens {
    /// Reads a YAML map of token to node name.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("the nodes' join tokens, {}", path.display()))?;
        let map: BTreeMap<String, String> = serde_yaml::from_str(&text)
            .with_context(|| format!("{} is no YAML map of join token to node name", path.display()))?;
        Self::new(map)
    }

    pub fn new(map: BTreeMap<String, String>) -> anyhow::Result<Self> {
        for (token, node) in &map {
            anyhow::ensure!(
                token.len() >= MIN_BYTES,
                "the token of node {node} is shorter than {MIN_BYTES} bytes"
            );
            anyhow::ensure!(!node.is_empty(), "a token without a node");
            anyhow::ensure!(
                !node.contains(char::is_control),
                "node {node:?} of a token: no node's name has control characters"
            );
        }
        Ok(Self(
            map.into_iter()
                .map(|(token, node)| (Sha256::digest(token).into(), node))
                .collect(),
        ))
    }

    /// The node of a call, or a refusal that tells nothing.
    pub fn node<T>(&self, request: &Request<T>) -> Result<String, Status> {
        let header = request
            .metadata()
            .get("authorization")
            .and_then(|value| value.to_str().ok());
        let token = header
            .and_then(|value| value.strip_prefix("Bearer "))
            .unwrap_or_default();
        let digest: [u8; 32] = Sha256::digest(token).into();
        match self.0.iter().find(|(known, _)| *known == digest) {
            Some((_, node)) => {
                if let Some(peer) = request.extensions().get::<Peer>() {
                    peer.prove();
                }
                Ok(node.clone())
            }
            None => {
                let peer = request
                    .extensions()
                    .get::<Peer>()
                    .map(|peer| peer.address.to_string());
                tracing::warn!(target: "audit", peer, "call without a valid node token refused");
                Err(Status::unauthenticated("not authenticated"))
            }
        }
    }
}
