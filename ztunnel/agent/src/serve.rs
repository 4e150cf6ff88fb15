//! The socket that ztunnel dials: sockets and pods go out, wishes and states come in.
//!
//! ```text
//! ztunnel ──hello──▶ joined ──▶ pods (the owner)        wants sockets ──▶ made here, at once
//!         ◀─ pods, drain, declared ── its queue ◀── owner
//! ```
//! Invariant: only ztunnel's user speaks here, within bounds: a few instances, one message at a time each,
//! and a queue whose overflow ends the connection, since a ztunnel that does not read cannot serve.

use crate::{
    events::{Event, Outgoing},
    listeners::{Wanted, outbound_sockets},
    netns::Netns,
};
use culvert_io::{
    agent_socket::{Channel, Listener, SocketError, VERSION},
    sys::MAX_FDS,
};
use culvert_proto::agent::{
    AgentHello, FromAgent, FromZtunnel, SocketKind, Sockets, WantSockets, from_agent, from_ztunnel,
};
use std::{
    collections::HashMap,
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, RwLock},
    time::Duration,
};
use tokio::sync::{Semaphore, mpsc};

/// Instances at once: one serves, one comes, one goes, and one has not noticed yet that it is gone.
const INSTANCES: usize = 4;

/// How long a new instance may take to say who it is.
const HELLO_WITHIN: Duration = Duration::from_secs(5);

/// Pause after each accepted connection, so that one that comes and goes costs nothing.
const BETWEEN_ACCEPTS: Duration = Duration::from_millis(200);

/// Messages that wait for an instance: two for each pod of a large node.
const QUEUE: usize = 2048;

/// Where outbound sockets of the captured pods are made.
#[derive(Debug, Clone, Default)]
pub struct Sources(Arc<RwLock<HashMap<String, Source>>>);

#[derive(Debug, Clone)]
struct Source {
    netns: Netns,
    mark: u32,
}

impl Sources {
    pub fn add(&self, uid: &str, netns: Netns, mark: u32) {
        let mut sources = self.0.write().unwrap_or_else(|e| e.into_inner());
        sources.insert(uid.to_owned(), Source { netns, mark });
    }

    pub fn remove(&self, uid: &str) {
        let mut sources = self.0.write().unwrap_or_else(|e| e.into_inner());
        sources.remove(uid);
    }

    fn of(&self, uid: &str) -> Option<Source> {
        let sources = self.0.read().unwrap_or_else(|e| e.into_inner());
        sources.get(uid).cloned()
    }
}

/// Serves instances until the listener fails for good.
pub async fn serve(listener: Listener, uid: u32, sources: Sources, events: mpsc::Sender<Event>) {
    let instances = Arc::new(Semaphore::new(INSTANCES));
    for number in 0u64.. {
        let Ok(permit) = instances.clone().acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok(channel) => {
                let (sources, events) = (sources.clone(), events.clone());
                tokio::spawn(async move {
                    match attend(channel, uid, number, sources, events).await {
                        Ok(()) => tracing::info!(instance = number, "a ztunnel has gone"),
                        Err(error) => {
                            tracing::warn!(instance = number, %error, "a ztunnel is sent away");
                        }
                    }
                    drop(permit);
                });
            }
            Err(error) => tracing::warn!(%error, "the socket for ztunnel accepts nothing"),
        }
        tokio::time::sleep(BETWEEN_ACCEPTS).await;
    }
}

/// Why a connection is ended by us.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error(transparent)]
    Socket(#[from] SocketError),
    #[error("user {0} may not speak here")]
    Stranger(u32),
    #[error("it said no hello in time")]
    NoHello,
    #[error("it speaks version {0} of the protocol, not {VERSION}")]
    Version(u32),
    #[error("it does not read what it is sent")]
    Deaf,
    #[error("the agent is stopping")]
    Stopping,
}

async fn attend(
    channel: Channel,
    uid: u32,
    number: u64,
    sources: Sources,
    events: mpsc::Sender<Event>,
) -> Result<(), Refusal> {
    let peer = channel.peer()?;
    if peer.uid != uid {
        return Err(Refusal::Stranger(peer.uid));
    }
    let hello = from_agent::Message::Hello(AgentHello {
        version: VERSION,
        return_listeners: true,
    });
    send(&channel, hello.into()).await?;
    let first = tokio::time::timeout(HELLO_WITHIN, channel.recv::<FromZtunnel>())
        .await
        .map_err(|_| Refusal::NoHello)??;
    let hello = match first {
        Some((
            FromZtunnel {
                message: Some(from_ztunnel::Message::Hello(hello)),
            },
            _,
        )) => hello,
        Some(_) => return Err(Refusal::NoHello),
        None => return Ok(()),
    };
    if hello.version != VERSION {
        return Err(Refusal::Version(hello.version));
    }
    let (outgoing, queue) = mpsc::channel(QUEUE);
    let joined = Event::Joined {
        instance: number,
        outgoing,
    };
    events.send(joined).await.map_err(|_| Refusal::Stopping)?;
    tracing::info!(instance = number, pid = peer.pid, "a ztunnel has come");
    let ended = tokio::select! {
        ended = listen(&channel, number, &sources, &events) => ended,
        ended = speak(&channel, queue) => ended,
    };
    let _ = events.send(Event::Left { instance: number }).await;
    ended
}

/// Takes messages until the peer closes. Sockets are made here, one wish after the other.
async fn listen(
    channel: &Channel,
    instance: u64,
    sources: &Sources,
    events: &mpsc::Sender<Event>,
) -> Result<(), Refusal> {
    while let Some((message, fds)) = channel.recv::<FromZtunnel>().await? {
        match message.message {
            Some(from_ztunnel::Message::WantSockets(wanted)) => {
                let sockets = make(sources, &wanted).await;
                let fds = sockets.into_iter().map(Arc::new).collect();
                let message = from_agent::Message::Sockets(Sockets {
                    uid: wanted.uid,
                    v6: wanted.v6,
                    kind: wanted.kind,
                });
                send(channel, Outgoing { message, fds }).await?;
            }
            Some(message) => {
                // Descriptors that nobody asked for are closed here, before they pile up anywhere.
                let fds = match &message {
                    from_ztunnel::Message::ReturnListeners(_) => fds,
                    _ => vec![],
                };
                let said = Event::Said {
                    instance,
                    message,
                    fds,
                };
                events.send(said).await.map_err(|_| Refusal::Stopping)?;
            }
            // A message of a later version: nothing that this one has to answer.
            None => tracing::debug!(instance, "a message without content"),
        }
    }
    Ok(())
}

async fn speak(channel: &Channel, mut queue: mpsc::Receiver<Outgoing>) -> Result<(), Refusal> {
    while let Some(outgoing) = queue.recv().await {
        send(channel, outgoing).await?;
    }
    // The owner has dropped its end: the queue was full, or the agent stops.
    Err(Refusal::Deaf)
}

async fn send(channel: &Channel, outgoing: Outgoing) -> Result<(), SocketError> {
    let message = FromAgent {
        message: Some(outgoing.message),
    };
    let fds: Vec<_> = outgoing.fds.iter().map(|fd| fd.as_fd()).collect();
    channel.send(&message, &fds).await
}

/// The sockets wished for; none for a pod that is not captured, or when they cannot be made.
async fn make(sources: &Sources, wanted: &WantSockets) -> Vec<OwnedFd> {
    let Some(source) = sources.of(&wanted.uid) else {
        return vec![];
    };
    let what = Wanted {
        v6: wanted.v6,
        datagram: wanted.kind() == SocketKind::Udp,
        count: usize::try_from(wanted.count).unwrap_or(MAX_FDS).min(MAX_FDS),
    };
    let made = tokio::task::spawn_blocking(move || outbound_sockets(&source.netns, source.mark, what)).await;
    match made {
        Ok(Ok(sockets)) => sockets,
        Ok(Err(error)) => {
            tracing::warn!(pod = wanted.uid, %error, "sockets could not be made");
            vec![]
        }
        Err(error) => {
            tracing::error!(pod = wanted.uid, %error, "making sockets panicked");
            vec![]
        }
    }
}
