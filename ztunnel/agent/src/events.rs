//! What the agent's parts say to one another.
//!
//! ```text
//! cni, control, serve ──Event──▶ the owner of all pods ──Outgoing──▶ ztunnel instances
//! ```
//! Invariant: values alone; who says something knows nothing of who hears it.

use culvert_proto::{
    agent::{from_agent, from_ztunnel},
    node::{self, NodeReport},
};
use serde::Deserialize;
use std::{net::IpAddr, os::fd::OwnedFd, path::PathBuf, sync::Arc};
use tokio::sync::{mpsc, oneshot};

pub type Verdict = Result<(), String>;

/// What can happen to the agent.
#[derive(Debug)]
pub enum Event {
    Add {
        netns: OwnedFd,
        add: Add,
        reply: oneshot::Sender<Verdict>,
    },
    Del {
        uid: String,
        reply: oneshot::Sender<Verdict>,
    },
    ControlFound(mpsc::Sender<NodeReport>),
    ControlLost,
    Order(node::NodeOrder),
    Joined {
        instance: u64,
        outgoing: mpsc::Sender<Outgoing>,
    },
    Said {
        instance: u64,
        message: from_ztunnel::Message,
        fds: Vec<OwnedFd>,
    },
    Left {
        instance: u64,
    },
}

/// A new pod, as the plugin knows it.
#[derive(Debug, Clone, Deserialize)]
pub struct Add {
    pub uid: String,
    pub namespace: String,
    pub name: String,
    #[serde(default)]
    pub addresses: Vec<IpAddr>,
    #[serde(default)]
    pub host_ifindex: u32,
    #[serde(default)]
    pub netns_path: Option<PathBuf>,
}

/// One message and the descriptors that go with it.
#[derive(Debug, Clone)]
pub struct Outgoing {
    pub message: from_agent::Message,
    pub fds: Vec<Arc<OwnedFd>>,
}

impl From<from_agent::Message> for Outgoing {
    fn from(message: from_agent::Message) -> Self {
        Self { message, fds: vec![] }
    }
}
