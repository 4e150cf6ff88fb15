//! The CNI plugin's socket: a pod comes with its namespace, or goes.
//!
//! Invariant: one request, one answer, one connection; only root speaks here. A pod's start is held by not
//! answering yet, and a request that cannot be honoured in time is refused, so that the kubelet tries again.

use crate::{
    events::{Add, Event},
    records::is_uid,
};
use culvert_io::agent_socket::{Channel, Listener, SocketError};
use serde::{Deserialize, Serialize};
use std::{os::fd::OwnedFd, sync::Arc, time::Duration};
use tokio::sync::{Semaphore, mpsc, oneshot};

/// How long a pod's start is held (settled D3).
pub const HOLD: Duration = Duration::from_secs(20);

/// How long a caller may take to send its request.
const READ_WITHIN: Duration = Duration::from_secs(5);

/// Most callers at once; a node starts fewer pods than that at a time.
const CALLERS: usize = 256;

#[derive(Debug, Deserialize)]
#[serde(tag = "cmd", rename_all = "UPPERCASE")]
enum Request {
    Add(Add),
    Del { uid: String },
}

#[derive(Debug, Serialize)]
struct Answer {
    ok: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

/// Answers callers, each at the latest when it was held for `hold`.
pub async fn serve(listener: Listener, hold: Duration, events: mpsc::Sender<Event>) {
    let callers = Arc::new(Semaphore::new(CALLERS));
    loop {
        let Ok(permit) = callers.clone().acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok(channel) => {
                let events = events.clone();
                tokio::spawn(async move {
                    if let Err(error) = answer(channel, hold, events).await {
                        tracing::warn!(%error, "a CNI caller went away");
                    }
                    drop(permit);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "the CNI socket accepts nothing");
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        }
    }
}

async fn answer(channel: Channel, hold: Duration, events: mpsc::Sender<Event>) -> Result<(), SocketError> {
    let done = match channel.peer()?.uid {
        0 => attend(&channel, hold, events).await,
        uid => Err(format!("user {uid} may not speak here")),
    };
    let answer = Answer {
        ok: done.is_ok(),
        error: done.err(),
    };
    let bytes = serde_json::to_vec(&answer).map_err(std::io::Error::from)?;
    channel.send_bytes(&bytes, &[]).await
}

async fn attend(channel: &Channel, hold: Duration, events: mpsc::Sender<Event>) -> Result<(), String> {
    let received = tokio::time::timeout(READ_WITHIN, channel.recv_bytes())
        .await
        .map_err(|_| "no request came".to_owned())?
        .map_err(|e| e.to_string())?;
    let Some((bytes, fds)) = received else {
        return Err("no request came".to_owned());
    };
    let request: Request = serde_json::from_slice(&bytes).map_err(|e| format!("request: {e}"))?;
    let (reply, verdict) = oneshot::channel();
    let event = match request {
        Request::Add(add) => Event::Add {
            netns: one_fd(fds)?,
            add: checked(add)?,
            reply,
        },
        Request::Del { uid } => Event::Del { uid, reply },
    };
    let held = async {
        events.send(event).await.ok()?;
        verdict.await.ok()
    };
    tokio::time::timeout(hold, held)
        .await
        .map_err(|_| "the pod is held: nothing has said in time how it shall be".to_owned())?
        .unwrap_or_else(|| Err("the agent is stopping".to_owned()))
}

fn one_fd(fds: Vec<OwnedFd>) -> Result<OwnedFd, String> {
    let count = fds.len();
    let mut fds = fds.into_iter();
    match (fds.next(), count) {
        (Some(fd), 1) => Ok(fd),
        _ => Err(format!("{count} descriptors; one is needed, the pod's namespace")),
    }
}

fn checked(add: Add) -> Result<Add, String> {
    if is_uid(&add.uid) {
        Ok(add)
    } else {
        Err(format!("{:?} is no pod UID", add.uid))
    }
}
