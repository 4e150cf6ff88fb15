//! The socket to the node's agent: pods arrive with their listeners, sockets in batches.
//!
//! ```text
//! agent ──AddPod + listeners──▶ Pod on a worker: outbound, inbound, plaintext, dns
//!       ──Sockets──▶ its stock          ◀──WantSockets, Declare, Ready──
//! ```
//! Invariant: pods outlive the connection. An agent that restarts gets its listeners back; ztunnel serves
//! on meanwhile.

use crate::{
    accept::accept_loop,
    context::Context,
    dns, inbound, outbound, passthrough,
    pods::{Introduction, Pod},
    sockets::Sockets,
};
use culvert_core::ids::PodUid;
use culvert_io::{
    agent_socket::{Channel, Peer, SocketError, VERSION},
    identity::handover,
};
use culvert_proto::agent::{
    AddPod, Declare, FromAgent, FromZtunnel, Introduce, Listener, ListenerFd, PodClosed, Ready,
    ReturnListeners, SocketKind, ZtunnelHello, from_agent, from_ztunnel::Message,
};
use parking_lot::Mutex;
use std::{
    collections::HashMap,
    io,
    net::{IpAddr, SocketAddr},
    os::fd::{AsFd, OwnedFd},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::{
    net::{TcpListener, UdpSocket},
    sync::{mpsc, oneshot},
    task::JoinHandle,
};

/// How long the agent may take to let a destination through the guard.
const DECLARE_DEADLINE: Duration = Duration::from_secs(5);

/// Destinations declared per pod that are remembered; beyond it each connection asks anew.
const REMEMBERED: usize = 4096;

/// Why the host guard does not let a destination through.
#[derive(Debug, thiserror::Error)]
pub enum DeclareError {
    #[error("the agent did not answer in time")]
    Timeout,
    #[error("the host guard refused: {0}")]
    Refused(String),
}

/// Plaintext destinations declared to the host guard.
pub struct Declarations {
    next: AtomicU64,
    requests: mpsc::UnboundedSender<FromZtunnel>,
    waiting: Mutex<HashMap<u64, oneshot::Sender<String>>>,
    known: Mutex<HashMap<PodUid, std::collections::HashSet<SocketAddr>>>,
}

impl Declarations {
    fn new(requests: mpsc::UnboundedSender<FromZtunnel>) -> Self {
        Self {
            next: AtomicU64::new(1),
            requests,
            waiting: Mutex::default(),
            known: Mutex::default(),
        }
    }

    /// Returns once the guard lets this pod's plaintext reach `address`.
    pub async fn declare(&self, uid: &PodUid, address: SocketAddr) -> Result<(), DeclareError> {
        if self
            .known
            .lock()
            .get(uid)
            .is_some_and(|known| known.contains(&address))
        {
            return Ok(());
        }
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (answer, answered) = oneshot::channel();
        self.waiting.lock().insert(id, answer);
        let declare = Declare {
            id,
            uid: uid.to_string(),
            address: octets(address.ip()),
            port: address.port().into(),
        };
        let _ = self.requests.send(FromZtunnel {
            message: Some(Message::Declare(declare)),
        });
        let answered = tokio::time::timeout(DECLARE_DEADLINE, answered).await;
        self.waiting.lock().remove(&id);
        match answered {
            Ok(Ok(error)) if error.is_empty() => {
                let mut known = self.known.lock();
                let known = known.entry(uid.clone()).or_default();
                if known.len() < REMEMBERED {
                    known.insert(address);
                }
                Ok(())
            }
            Ok(Ok(error)) => Err(DeclareError::Refused(error)),
            Ok(Err(_)) | Err(_) => Err(DeclareError::Timeout),
        }
    }

    fn answer(&self, id: u64, error: String) {
        if let Some(waiting) = self.waiting.lock().remove(&id) {
            // The connection may have given up.
            let _ = waiting.send(error);
        }
    }

    fn forget(&self, uid: &PodUid) {
        self.known.lock().remove(uid);
    }

    /// A new agent has an empty guard.
    fn forget_all(&self) {
        self.known.lock().clear();
    }
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

/// The queue towards the agent, and the declarations that use it.
pub fn requests() -> (
    mpsc::UnboundedSender<FromZtunnel>,
    mpsc::UnboundedReceiver<FromZtunnel>,
    Declarations,
) {
    let (sender, receiver) = mpsc::unbounded_channel();
    let declarations = Declarations::new(sender.clone());
    (sender, receiver, declarations)
}

/// Talks to the agent for as long as it is polled.
pub struct Node {
    pub path: PathBuf,
    pub context: Arc<Context>,
    pub outgoing: mpsc::UnboundedReceiver<FromZtunnel>,
    pub sender: mpsc::UnboundedSender<FromZtunnel>,
    /// Copies of the listeners held, to give back to an agent that has lost them.
    pub held: HashMap<PodUid, (u64, Vec<(ListenerFd, OwnedFd)>)>,
}

impl Node {
    pub async fn run(mut self) {
        loop {
            match self.connection().await {
                Ok(()) => tracing::warn!("agent has closed its socket; serving on"),
                Err(error) => {
                    tracing::warn!(socket = %self.path.display(), %error, "no agent; serving on");
                }
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    async fn connection(&mut self) -> Result<(), SocketError> {
        let channel = Channel::connect(&self.path)?;
        // What was asked of an earlier agent is not answered by this one.
        while self.outgoing.try_recv().is_ok() {}
        self.context.declarations.forget_all();
        for pod in self.context.pods.all() {
            pod.sockets.forget_requests();
        }
        let hello = ZtunnelHello {
            version: VERSION,
            instance: rand::random(),
        };
        send(&channel, Message::Hello(hello)).await?;
        let (mut ready, mut synced) = (false, false);
        let mut handover: Option<JoinHandle<()>> = None;
        loop {
            tokio::select! {
                received = channel.recv::<FromAgent>() => {
                    let Some((message, fds)) = received? else { return Ok(()) };
                    match message.message {
                        Some(from_agent::Message::Synced(_)) => synced = true,
                        Some(from_agent::Message::Introduce(introduce)) => {
                            handover = self.meet(introduce, fds, channel.peer()?);
                        }
                        Some(message) => self.take(&channel, message, fds).await?,
                        None => {}
                    }
                }
                Some(message) = self.outgoing.recv() => channel.send(&message, &[]).await?,
                _ = async { handover.as_mut()?.await.ok() }, if handover.is_some() => handover = None,
                // A predecessor drains once this is said: first comes what it has to give.
                () = self.context.ready(), if !ready && synced && handover.is_none() => {
                    ready = true;
                    send(&channel, Message::Ready(Ready {})).await?;
                }
            }
        }
    }

    async fn take(
        &mut self,
        channel: &Channel,
        message: from_agent::Message,
        fds: Vec<OwnedFd>,
    ) -> Result<(), SocketError> {
        match message {
            from_agent::Message::Hello(hello) => {
                if hello.version != VERSION {
                    tracing::error!(
                        version = hello.version,
                        "the agent speaks another version; upgrade both"
                    );
                }
                if hello.return_listeners {
                    self.return_listeners(channel).await?;
                }
            }
            from_agent::Message::AddPod(add) => self.add(add, fds),
            from_agent::Message::PodGone(gone) => {
                let uid = PodUid::from(gone.uid.as_str());
                self.held.remove(&uid);
                self.context.declarations.forget(&uid);
                if let Some(pod) = self.context.pods.remove(&uid) {
                    pod.leave();
                    self.context.metrics.pods.dec();
                    tracing::info!(pod = %pod.name, namespace = %pod.namespace, "pod gone");
                }
                send(channel, Message::PodClosed(PodClosed { uid: gone.uid })).await?;
            }
            from_agent::Message::Sockets(sockets) => {
                let kind = SocketKind::try_from(sockets.kind).unwrap_or(SocketKind::Tcp);
                if let Some(pod) = self.context.pods.get(&PodUid::from(sockets.uid.as_str())) {
                    pod.sockets.stock(kind, sockets.v6, fds);
                }
            }
            from_agent::Message::Declared(declared) => {
                self.context.declarations.answer(declared.id, declared.error);
            }
            from_agent::Message::Drain(_) => {
                tracing::info!("a successor is ready; draining");
                self.context.drain.send_replace(true);
            }
            from_agent::Message::Stats(stats) => self.context.agent.take(stats),
            from_agent::Message::Synced(_) | from_agent::Message::Introduce(_) => {}
        }
        Ok(())
    }

    /// Meets another instance: gives it this one's SVIDs, or takes that one's (settled D6).
    fn meet(&self, introduce: Introduce, fds: Vec<OwnedFd>, agent: Peer) -> Option<JoinHandle<()>> {
        let socket = fds.into_iter().next()?;
        let identities = self.context.identities.clone();
        Some(tokio::spawn(async move {
            let passed = async {
                let channel = Channel::new(socket)?;
                if introduce.give {
                    handover::give(channel, agent, &identities).await
                } else {
                    handover::take(channel, agent, &identities).await
                }
            };
            match passed.await {
                Ok(count) => tracing::info!(count, given = introduce.give, "SVIDs handed over"),
                Err(error) => tracing::warn!(%error, given = introduce.give, "SVIDs were not handed over"),
            }
        }))
    }

    async fn return_listeners(&self, channel: &Channel) -> Result<(), SocketError> {
        for (uid, (netns_cookie, listeners)) in &self.held {
            let message = ReturnListeners {
                uid: uid.to_string(),
                netns_cookie: *netns_cookie,
                listeners: listeners.iter().map(|(what, _)| what.clone()).collect(),
            };
            let fds: Vec<_> = listeners.iter().map(|(_, fd)| fd.as_fd()).collect();
            let message = FromZtunnel {
                message: Some(Message::ReturnListeners(message)),
            };
            channel.send(&message, &fds).await?;
        }
        Ok(())
    }

    /// Starts to serve a pod, or takes note of what is new about one that is served.
    fn add(&mut self, add: AddPod, fds: Vec<OwnedFd>) {
        let Some(pod) = add.pod else { return };
        let uid = PodUid::from(pod.uid.as_str());
        let identity = match pod.spiffe_id.parse() {
            Ok(identity) => identity,
            Err(error) => {
                return tracing::error!(pod = %pod.name, %error, "pod refused: its identity is none");
            }
        };
        if let Some(known) = self.context.pods.get(&uid) {
            if known.netns_cookie == pod.netns_cookie && *known.identity() == identity {
                return;
            }
            known.leave();
        }
        let addresses = pod.addresses.iter().filter_map(|bytes| address(bytes)).collect();
        let introduction = Introduction {
            uid: uid.clone(),
            namespace: pod.namespace,
            name: pod.name,
            workload_uid: pod.workload_uid.into(),
            addresses,
            netns_cookie: pod.netns_cookie,
            listeners: fds.len(),
        };
        let lease = self.context.identities.acquire(&identity);
        let limits = self.context.limits;
        let sockets = Sockets::new(uid.clone(), self.sender.clone(), limits.batch);
        let served = Arc::new(Pod::new(
            introduction,
            lease,
            sockets,
            limits,
            &self.context.buffers,
        ));
        tracing::info!(pod = %served.name, namespace = %served.namespace, %identity, "pod arrived");
        if self.context.pods.insert(served.clone()).is_none() {
            self.context.metrics.pods.inc();
        }
        let listeners: Vec<_> = add.listeners.into_iter().zip(fds).collect();
        self.serve(&served, &listeners);
        self.held.insert(uid, (served.netns_cookie, listeners));
    }

    /// Accepts on all of a pod's listeners, on the pod's own worker, from when the first snapshot is there.
    fn serve(&self, pod: &Arc<Pod>, listeners: &[(ListenerFd, OwnedFd)]) {
        let worker = self.context.workers.assign();
        for (what, fd) in listeners {
            let Ok(kind) = Listener::try_from(what.kind) else {
                continue;
            };
            let fd = match fd.try_clone() {
                Ok(fd) => fd,
                Err(error) => {
                    tracing::error!(pod = %pod.name, %error, "a listener cannot be used");
                    continue;
                }
            };
            let resolver = address(&what.resolver);
            let (pod, context) = (pod.clone(), self.context.clone());
            worker.spawn(async move {
                context.ready().await;
                let name = pod.name.clone();
                if let Err(error) = listen(kind, fd, resolver, pod, context).await {
                    tracing::error!(pod = name, ?kind, %error, "a listener cannot be used");
                }
            });
        }
    }
}

/// Serves what comes to one listener until the pod leaves or draining begins.
async fn listen(
    kind: Listener,
    fd: OwnedFd,
    resolver: Option<IpAddr>,
    pod: Arc<Pod>,
    context: Arc<Context>,
) -> io::Result<()> {
    let no_resolver = || io::Error::other("the agent named no resolver for it");
    if kind == Listener::DnsUdp {
        let listener = std::net::UdpSocket::from(fd);
        listener.set_nonblocking(true)?;
        let listener = UdpSocket::from_std(listener)?;
        dns::serve_udp(listener, resolver.ok_or_else(no_resolver)?, pod, context).await;
        return Ok(());
    }
    let listener = std::net::TcpListener::from(fd);
    listener.set_nonblocking(true)?;
    let listener = TcpListener::from_std(listener)?;
    match kind {
        Listener::Outbound => {
            accept_loop(
                listener,
                pod,
                context,
                outbound::capture::serve,
                outbound::capture::unserved,
            )
            .await
        }
        Listener::InboundPlaintext => {
            accept_loop(listener, pod, context, passthrough::serve, passthrough::unserved).await
        }
        Listener::InboundHbone => {
            accept_loop(
                listener,
                pod,
                context,
                inbound::accept::serve,
                inbound::accept::unserved,
            )
            .await
        }
        Listener::DnsTcp => {
            let resolver = resolver.ok_or_else(no_resolver)?;
            let serve = move |accepted, pod, context| dns::serve_tcp(accepted, resolver, pod, context);
            accept_loop(listener, pod, context, serve, outbound::capture::unserved).await;
        }
        Listener::DnsUdp => {}
    }
    Ok(())
}

async fn send(channel: &Channel, message: Message) -> Result<(), SocketError> {
    channel
        .send(
            &FromZtunnel {
                message: Some(message),
            },
            &[],
        )
        .await
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from),
        16 => <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from),
        _ => None,
    }
}
