//! SVIDs pass from an instance to its successor, over a socket that their agent has made for the two.
//!
//! ```text
//! predecessor: Identities ──one packet each──▶ socketpair ──▶ successor: Identities
//! ```
//! Invariant: only a socket of the agent's making is used (the kernel names its maker); what arrives is
//! checked like a CA's answer, within bounds; every copy of a key is zeroed when it is let go.

use super::{Credential, Identities, IssueError};
use crate::{
    agent_socket::{Channel, Peer, SocketError},
    tls::{Svid, SvidError},
};
use bytes::Bytes;
use culvert_proto::agent::HandedSvid;
use prost::Message;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use std::time::{Duration, SystemTime};
use zeroize::Zeroizing;

/// Most identities that pass: far more than a node has pods.
const MAX_SVIDS: usize = 10_000;

/// How long all of it may take. The two are on one machine.
const DEADLINE: Duration = Duration::from_secs(5);

/// Why no SVIDs passed.
#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    #[error("the socket was not made by the agent")]
    Stranger,
    #[error(transparent)]
    Socket(#[from] SocketError),
    #[error("it took longer than {} s", DEADLINE.as_secs())]
    Timeout,
    #[error("more than {MAX_SVIDS} identities")]
    TooMany,
    #[error("an SVID was not taken: {0}")]
    Svid(#[from] IssueError),
}

impl From<SvidError> for HandoverError {
    fn from(error: SvidError) -> Self {
        Self::Svid(error.into())
    }
}

/// Gives every valid SVID to a successor, and returns how many.
pub async fn give(channel: Channel, agent: Peer, identities: &Identities) -> Result<usize, HandoverError> {
    of_the_agent(&channel, agent)?;
    let giving = async {
        let mut given = 0;
        for (_, credential) in identities.all() {
            let Some(credential) = credential.filter(|held| held.svid.not_after() > SystemTime::now()) else {
                continue;
            };
            channel.send_bytes(&encode(&credential), &[]).await?;
            given += 1;
        }
        Ok(given)
    };
    tokio::time::timeout(DEADLINE, giving)
        .await
        .map_err(|_| HandoverError::Timeout)?
}

/// Takes what a predecessor gives, and returns how many. What has been taken before a failure is kept.
pub async fn take(channel: Channel, agent: Peer, identities: &Identities) -> Result<usize, HandoverError> {
    of_the_agent(&channel, agent)?;
    let taking = async {
        let mut taken = 0;
        while let Some((bytes, _)) = channel.recv_bytes().await? {
            // Its parts are read where they lie: what decoding would copy is not zeroed.
            let bytes = Bytes::from_owner(Zeroizing::new(bytes));
            if taken == MAX_SVIDS {
                return Err(HandoverError::TooMany);
            }
            identities.take_over(decode(bytes, SystemTime::now())?);
            taken += 1;
        }
        Ok(taken)
    };
    let outcome = tokio::time::timeout(DEADLINE, taking).await;
    let identities = identities.clone();
    tokio::spawn(async move { identities.forget_unclaimed().await });
    outcome.map_err(|_| HandoverError::Timeout)?
}

/// A socketpair's ends carry the credentials of who made them.
fn of_the_agent(channel: &Channel, agent: Peer) -> Result<(), HandoverError> {
    if channel.peer()? == agent {
        Ok(())
    } else {
        Err(HandoverError::Stranger)
    }
}

fn encode(credential: &Credential) -> Zeroizing<Vec<u8>> {
    let mut handed = HandedSvid {
        chain: credential.svid.chain().iter().map(|der| der.to_vec()).collect(),
        key: credential.svid.key().to_vec(),
        roots_pem: credential.roots.to_string(),
    };
    // Its length is counted first: nothing of it is moved and left behind.
    let bytes = Zeroizing::new(handed.encode_to_vec());
    zeroize::Zeroize::zeroize(&mut handed.key);
    bytes
}

fn decode(bytes: Bytes, now: SystemTime) -> Result<Credential, HandoverError> {
    let handed = HandedSvid::decode(bytes).map_err(SocketError::from)?;
    let key = Zeroizing::new(handed.key);
    let chain = handed.chain.into_iter().map(CertificateDer::from).collect();
    let key = PrivateKeyDer::try_from(key.as_slice()).map_err(|_| SvidError::Key)?;
    let svid = Svid::from_der(chain, &key)?;
    let id = svid.id().clone();
    Ok(Credential::checked(&id, svid, &handed.roots_pem, now)?)
}
