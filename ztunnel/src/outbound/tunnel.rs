//! A pod's tunnels to its peers.
//!
//! ```text
//! Hop ──key──▶ tunnel with room, or a dial for each hundred who wait ──▶ CONNECT ──▶ Stream
//! ```
//! Invariant: a tunnel is used only under the key it was dialled for: this pod and its identity, the
//! destination workload, the identities expected of it, its address, and the trust of that moment
//! (settled D13). After either leaf has ended it takes no new stream (settled D14).

use super::route::Hop;
use crate::{
    context::{CONNECT_DEADLINE, Context, IDENTITY_PATIENCE},
    metrics::{Flag, Reporter},
    pods::Pod,
    trust::{Direction, Live},
};
use culvert_core::{
    hbone::Connect,
    ids::{SpiffeId, WorkloadUid},
    snapshot::Snapshot,
};
use culvert_io::{
    hbone::{DialError, MAX_STREAMS, OpenError, Stream, Tunnel, dial},
    identity::Credential,
    tls::{Expected, VerifyError, client_config},
};
use parking_lot::Mutex;
use std::{
    collections::HashMap,
    convert::Infallible,
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};
use tokio::{
    runtime::{self, Handle},
    task::{JoinError, JoinSet},
};

/// Streams a tunnel carries before another is dialled beside it.
const STRIPE_AT: usize = MAX_STREAMS as usize / 2;

/// Most dials of one slot in flight: thousands who have waited for a peer are not served by one after another.
const DIALS: usize = 8;

/// How soon who waits for a dial looks again for a stream that has ended meanwhile.
const LOOK_AGAIN: Duration = Duration::from_millis(2);

/// A tunnel without streams is closed after this.
const IDLE: Duration = Duration::from_secs(300);

/// A tunnel without streams beside another of its slot is closed after this: what a burst has opened goes
/// with it.
const SURPLUS_IDLE: Duration = Duration::from_secs(5);

/// How often idle tunnels are looked for.
const SWEEP: Duration = Duration::from_secs(1);

/// How long a failed dial answers for those who come right after it.
const FAILURE_LASTS: Duration = Duration::from_millis(100);

/// How soon a peer's node that has gone is noticed while its ztunnel is waited for: its kernel answers these.
const PROBE_AFTER: Duration = Duration::from_secs(10);
const PROBE_EVERY: Duration = Duration::from_secs(5);
const PROBES: u32 = 3;

/// What makes two connections to one endpoint share a tunnel (settled D13); the pod is the map's owner. A
/// tunnel's streams are relayed by the worker that drives it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Key {
    source: SpiffeId,
    expected: Box<[SpiffeId]>,
    peer: SocketAddr,
    trust: u64,
    worker: runtime::Id,
}

/// The tunnels of one pod.
#[derive(Default)]
pub struct Tunnels {
    /// By endpoint, whose load is asked for at every choice.
    slots: Mutex<HashMap<WorkloadUid, HashMap<Key, Arc<Slot>>>>,
}

struct Slot {
    /// Where its tunnels are driven.
    worker: Handle,
    /// Held by the first of those who wait, who dials for all of them; they are served in turn.
    pool: tokio::sync::Mutex<Pool>,
    /// How many want a tunnel.
    waiting: AtomicUsize,
    /// What others may look at without waiting for a dial.
    seen: Mutex<Vec<Tunnel>>,
}

#[derive(Default)]
struct Pool {
    tunnels: Vec<Pooled>,
    failed: Option<(Instant, Arc<TunnelError>)>,
    /// Dials under way. They outlive those who wait for them: an application that gives up does not take the
    /// place of the others in the peer's queue.
    dials: JoinSet<Result<Pooled, TunnelError>>,
}

struct Pooled {
    tunnel: Tunnel,
    own_not_after: SystemTime,
    used: Instant,
}

/// Why no stream came up.
#[derive(Debug, thiserror::Error)]
pub enum TunnelError {
    #[error("this pod has no valid SVID")]
    Identity,
    #[error("the agent gave no socket in time")]
    NoSocket,
    #[error("no connection to {peer} within {} s; does a NetworkPolicy or firewall block port 15008?", CONNECT_DEADLINE.as_secs())]
    Timeout { peer: SocketAddr },
    #[error("connecting to {peer}: {source}")]
    Connect { peer: SocketAddr, source: io::Error },
    #[error("{peer} has accepted the connection and is silent")]
    Slow { peer: SocketAddr },
    #[error("the endpoint or the pod has gone while it was dialled")]
    Gone,
    #[error("TLS configuration: {0}")]
    Config(#[from] rustls::Error),
    #[error(transparent)]
    Dial(#[from] DialError),
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error("{0}")]
    Shared(Arc<TunnelError>),
}

impl TunnelError {
    /// Whether another endpoint may take the connection: nothing of it has reached an application.
    pub fn elsewhere(&self) -> bool {
        match self {
            Self::Identity | Self::NoSocket | Self::Config(_) => false,
            Self::Timeout { .. } | Self::Connect { .. } | Self::Slow { .. } | Self::Gone | Self::Dial(_) => {
                true
            }
            Self::Open(OpenError::Refused(status)) => *status == http::StatusCode::SERVICE_UNAVAILABLE,
            Self::Open(
                OpenError::Closing(_) | OpenError::Failed(_) | OpenError::Full | OpenError::Silent,
            ) => true,
            Self::Open(OpenError::Request(_)) => false,
            Self::Shared(error) => error.elsewhere(),
        }
    }

    /// Whether the same endpoint may take the connection a moment later: the way to it failed, and nobody
    /// there has said no.
    pub fn passes(&self) -> bool {
        match self {
            Self::Timeout { .. } | Self::Slow { .. } | Self::Gone => true,
            Self::Connect { source, .. } => source.kind() == io::ErrorKind::ConnectionReset,
            Self::Dial(error) => error.broke(),
            Self::Open(error) => error.broke(),
            Self::Identity | Self::NoSocket | Self::Config(_) => false,
            Self::Shared(error) => error.passes(),
        }
    }

    /// The metrics' word for it.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Identity => "identity",
            Self::NoSocket => "no_socket",
            Self::Timeout { .. } => "timeout",
            Self::Slow { .. } => "slow",
            Self::Gone => "gone",
            Self::Connect { .. } => "connect",
            Self::Config(_) => "config",
            Self::Dial(error) => error.verdict().map_or("handshake", VerifyError::reason),
            Self::Open(OpenError::Refused(_)) => "refused_by_peer",
            Self::Open(_) => "tunnel",
            Self::Shared(error) => error.reason(),
        }
    }

    /// The field's word for it.
    pub fn flag(&self) -> Flag {
        match self {
            Self::Identity => Flag::IdentityError,
            Self::Timeout { .. } => Flag::NetworkPolicy,
            Self::NoSocket | Self::Connect { .. } | Self::Slow { .. } | Self::Gone => Flag::Connect,
            Self::Config(_) => Flag::TlsFailure,
            Self::Dial(DialError::Http(_)) => Flag::H2HandshakeFailure,
            Self::Dial(error) => match error.verdict() {
                Some(VerifyError::Revoked(_)) => Flag::CertRevoked,
                _ => Flag::TlsFailure,
            },
            Self::Open(OpenError::Refused(http::StatusCode::UNAUTHORIZED)) => Flag::Deny,
            Self::Open(_) => Flag::Connect,
            Self::Shared(error) => error.flag(),
        }
    }
}

impl Tunnels {
    /// Opens a stream to `hop`, over a tunnel in hand or a new one, which is waited for for `patience`.
    pub async fn open(
        &self,
        pod: &Arc<Pod>,
        context: &Arc<Context>,
        hop: &Hop,
        connect: &Connect,
        patience: Duration,
    ) -> Result<Stream, TunnelError> {
        let credential = pod
            .lease
            .wait(IDENTITY_PATIENCE)
            .await
            .ok_or(TunnelError::Identity)?;
        let key = Key {
            source: pod.identity().clone(),
            expected: hop.expected.clone(),
            peer: hop.peer,
            trust: credential.bundles.generation,
            worker: Handle::current().id(),
        };
        let slot = {
            let mut slots = self.slots.lock();
            let of_endpoint = slots.entry(hop.endpoint.uid.clone()).or_default();
            let slot = of_endpoint
                .entry(key)
                .or_insert_with(|| Slot::new(Handle::current()));
            slot.clone()
        };
        // A tunnel may close between being chosen and being used. No byte of the application's is sent before
        // the 200, so another tunnel may be asked.
        let tunnel = async || {
            let tunnel = slot.tunnel(pod, context, hop, &credential);
            tokio::time::timeout(patience, tunnel)
                .await
                .unwrap_or(Err(TunnelError::Slow { peer: hop.peer }))
        };
        for _ in 0..3 {
            let tunnel = tunnel().await?;
            match tunnel.open(connect).await {
                Err(OpenError::Closing(_) | OpenError::Failed(_) | OpenError::Full) => {
                    slot.forget(&tunnel).await
                }
                opened => return Ok(opened?),
            }
        }
        Ok(tunnel().await?.open(connect).await?)
    }

    /// Dials a peer anew whose tunnel has come to the end of a leaf while streams are open on it: the new
    /// handshake vouches for them (settled D14).
    pub fn renew(&self, pod: &Arc<Pod>, context: &Arc<Context>, endpoint: &WorkloadUid) {
        let Some(credential) = pod.lease.current() else {
            return;
        };
        let slots: Vec<(Key, Arc<Slot>)> = {
            let mut slots = self.slots.lock();
            let Some(slots) = slots.get_mut(endpoint) else {
                return;
            };
            // By what is trusted now, whatever the old tunnels were dialled by.
            let trust = credential.bundles.generation;
            let old: Vec<(Key, Handle)> = slots
                .iter()
                .map(|(key, slot)| (Key { trust, ..key.clone() }, slot.worker.clone()))
                .collect();
            let slot = |(key, worker): (Key, Handle)| {
                let slot = slots.entry(key.clone()).or_insert_with(|| Slot::new(worker));
                (key, slot.clone())
            };
            old.into_iter().map(slot).collect()
        };
        for (key, slot) in slots {
            // Somebody who waits for a dial renews by that.
            let Ok(mut pool) = slot.pool.try_lock() else {
                continue;
            };
            slot.collect(&mut pool);
            let to = (key.peer, endpoint, &*key.expected);
            if pool.dials.is_empty() {
                let dial = Dial::new(to, &credential).run(pod.clone(), context.clone());
                pool.dials.spawn_on(dial, &slot.worker);
            }
        }
    }

    /// Streams open now to one endpoint.
    pub fn load(&self, endpoint: &WorkloadUid) -> usize {
        let slots = self.slots.lock();
        let of_endpoint = slots.get(endpoint).into_iter().flat_map(HashMap::values);
        of_endpoint
            .map(|slot| slot.seen.lock().iter().map(Tunnel::streams).sum::<usize>())
            .sum()
    }

    /// Closes idle tunnels and those to workloads that have gone.
    pub fn sweep(&self, snapshot: &Snapshot) {
        self.slots.lock().retain(|endpoint, slots| {
            let endpoint = snapshot.workload(endpoint);
            slots.retain(|key, slot| {
                let known = endpoint.is_some_and(|w| key.expected.contains(&w.identity));
                slot.sweep(known)
            });
            !slots.is_empty()
        });
    }

    pub fn count(&self) -> usize {
        let slots = self.slots.lock();
        let all = slots.values().flat_map(HashMap::values);
        all.map(|slot| slot.seen.lock().len()).sum()
    }

    /// Closes all: their streams end, then they do.
    pub fn close(&self) {
        self.slots.lock().clear();
    }
}

/// Closes what is idle, again and again, for as long as it is polled.
pub async fn sweep(context: Arc<Context>) -> Infallible {
    loop {
        tokio::time::sleep(SWEEP).await;
        let snapshot = context.discovery.snapshot();
        for pod in context.pods.all() {
            pod.tunnels.sweep(&snapshot);
        }
    }
}

impl Slot {
    fn new(worker: Handle) -> Arc<Self> {
        Arc::new(Self {
            worker,
            pool: tokio::sync::Mutex::default(),
            waiting: AtomicUsize::new(0),
            seen: Mutex::default(),
        })
    }

    async fn tunnel(
        &self,
        pod: &Arc<Pod>,
        context: &Arc<Context>,
        hop: &Hop,
        credential: &Credential,
    ) -> Result<Tunnel, TunnelError> {
        let asked = Instant::now();
        let waiting = Waiting::new(&self.waiting);
        let mut pool = self.pool.lock().await;
        let mut how = "reused";
        loop {
            self.collect(&mut pool);
            if let Some(tunnel) = pool.with_room() {
                context.metrics.checkouts.with_label_values(&[how]).inc();
                return Ok(tunnel);
            }
            let failed = pool
                .failed
                .as_ref()
                .filter(|(at, _)| *at > asked || at.elapsed() < FAILURE_LASTS);
            // While one has failed, another that is under way may still succeed, and none is begun.
            let wanted = match failed {
                Some((_, error)) if pool.dials.is_empty() => {
                    return Err(TunnelError::Shared(error.clone()));
                }
                Some(_) => 0,
                // A peer that is asked for all that has waited at once must shed a part of it.
                None if pool.tunnels.len() >= DIALS => 1,
                None => waiting.count().div_ceil(STRIPE_AT).min(DIALS),
            };
            how = "dialled";
            while pool.dials.len() < wanted {
                let dial = Dial::new((hop.peer, &hop.endpoint.uid, &*hop.expected), credential);
                pool.dials
                    .spawn_on(dial.run(pod.clone(), context.clone()), &self.worker);
            }
            // Dropped here, the dials go on and the next in line waits for them.
            tokio::select! {
                Some(dialled) = pool.dials.join_next() => {
                    if let Some(tunnel) = self.take(&mut pool, dialled) {
                        context.metrics.checkouts.with_label_values(&[how]).inc();
                        return Ok(tunnel);
                    }
                }
                () = tokio::time::sleep(LOOK_AGAIN), if !pool.tunnels.is_empty() => {}
            }
        }
    }

    /// Closes what is idle, or all if the endpoint is not what it was; whether anything is left.
    fn sweep(&self, known: bool) -> bool {
        // A slot that is dialling is in use.
        let Ok(mut pool) = self.pool.try_lock() else {
            return true;
        };
        self.collect(&mut pool);
        let now = Instant::now();
        let mut another = pool.tunnels.iter().any(|pooled| pooled.tunnel.streams() > 0);
        pool.tunnels.retain_mut(|pooled| {
            let kept = if pooled.tunnel.streams() > 0 {
                pooled.used = now;
                true
            } else {
                let patience = if another { SURPLUS_IDLE } else { IDLE };
                !pooled.tunnel.is_retired() && now.duration_since(pooled.used) < patience
            };
            let kept = kept && known && !pooled.tunnel.is_closed();
            another |= kept;
            kept
        });
        self.show(&pool);
        !pool.tunnels.is_empty() || !pool.dials.is_empty()
    }

    /// Takes what has been dialled meanwhile.
    fn collect(&self, pool: &mut Pool) {
        while let Some(dialled) = pool.dials.try_join_next() {
            self.take(pool, dialled);
        }
    }

    fn take(
        &self,
        pool: &mut Pool,
        dialled: Result<Result<Pooled, TunnelError>, JoinError>,
    ) -> Option<Tunnel> {
        match dialled.unwrap_or(Err(TunnelError::Gone)) {
            Ok(pooled) => {
                let tunnel = pooled.tunnel.clone();
                pool.failed = None;
                pool.tunnels.retain(|pooled| !pooled.tunnel.is_closed());
                pool.tunnels.push(pooled);
                self.show(pool);
                Some(tunnel)
            }
            Err(error) => {
                pool.failed = Some((Instant::now(), Arc::new(error)));
                None
            }
        }
    }

    fn show(&self, pool: &Pool) {
        *self.seen.lock() = pool.tunnels.iter().map(|pooled| pooled.tunnel.clone()).collect();
    }

    async fn forget(&self, gone: &Tunnel) {
        let mut pool = self.pool.lock().await;
        pool.tunnels
            .retain(|pooled| !pooled.tunnel.is_closed() && !pooled.tunnel.is(gone));
        self.show(&pool);
    }
}

impl Pool {
    /// The tunnel with the fewest streams, if there is one that takes another.
    fn with_room(&mut self) -> Option<Tunnel> {
        let now = SystemTime::now();
        let usable = |pooled: &&mut Pooled| {
            !pooled.tunnel.is_closed()
                && !pooled.tunnel.is_retired()
                && pooled.own_not_after > now
                && pooled.tunnel.peer_not_after() > now
                && pooled.tunnel.streams() < STRIPE_AT
        };
        let usable = self.tunnels.iter_mut().filter(usable);
        let pooled = usable.min_by_key(|pooled| pooled.tunnel.streams())?;
        pooled.used = Instant::now();
        Some(pooled.tunnel.clone())
    }
}

/// Counts who wants a tunnel, for as long as they do.
struct Waiting<'s>(&'s AtomicUsize);

impl<'s> Waiting<'s> {
    fn new(all: &'s AtomicUsize) -> Self {
        all.fetch_add(1, Ordering::Relaxed);
        Self(all)
    }

    /// All who want one, this one too.
    fn count(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// One dial of a tunnel, for all who wait for it.
struct Dial {
    peer: SocketAddr,
    endpoint: WorkloadUid,
    expected: Box<[SpiffeId]>,
    credential: Credential,
}

impl Dial {
    fn new(
        (peer, endpoint, expected): (SocketAddr, &WorkloadUid, &[SpiffeId]),
        credential: &Credential,
    ) -> Self {
        Self {
            peer,
            endpoint: endpoint.clone(),
            expected: expected.into(),
            credential: credential.clone(),
        }
    }

    /// Ends early when the pod leaves, or the endpoint is no longer who is expected there.
    async fn run(self, pod: Arc<Pod>, context: Arc<Context>) -> Result<Pooled, TunnelError> {
        let started = Instant::now();
        let dialled = tokio::select! {
            dialled = self.connect(&pod, &context) => dialled,
            () = pod.left() => Err(TunnelError::Gone),
            () = self.endpoint_leaves(&context) => Err(TunnelError::Gone),
        };
        let outcome = dialled.as_ref().map_or_else(TunnelError::reason, |_| "up");
        let metrics = &context.metrics;
        metrics.tunnels.with_label_values(&["outbound", outcome]).inc();
        let tunnel = dialled?;
        metrics
            .handshake_seconds
            .with_label_values(&["outbound"])
            .observe(started.elapsed().as_secs_f64());
        tracing::debug!(pod = %pod.name, peer = %self.peer, identity = %tunnel.peer(), "tunnel up");
        let direction = Direction::Outbound(self.endpoint.clone());
        let live = Live::new(
            direction,
            self.peer.ip(),
            tunnel.watch().clone(),
            &self.credential,
        );
        pod.live.add(live);
        Ok(Pooled {
            tunnel,
            own_not_after: self.credential.svid.not_after(),
            used: Instant::now(),
        })
    }

    async fn connect(&self, pod: &Pod, context: &Context) -> Result<Tunnel, TunnelError> {
        let _pending = pod.pending.acquire().await.map_err(|_| TunnelError::NoSocket)?;
        let peer = self.peer;
        let config = client_config(
            &self.credential.svid,
            &self.credential.bundles,
            Expected::OneOf(self.expected.clone()),
        )?;
        let socket = pod
            .sockets
            .tcp(peer.is_ipv6())
            .await
            .ok_or(TunnelError::NoSocket)?;
        let socket = tokio::time::timeout(CONNECT_DEADLINE, socket.connect(peer))
            .await
            .map_err(|_| TunnelError::Timeout { peer })?
            .map_err(|source| TunnelError::Connect { peer, source })?;
        let probes = socket2::TcpKeepalive::new()
            .with_time(PROBE_AFTER)
            .with_interval(PROBE_EVERY)
            .with_retries(PROBES);
        socket2::SockRef::from(&socket)
            .set_tcp_keepalive(&probes)
            .map_err(|source| TunnelError::Connect { peer, source })?;
        let (tunnel, driver) = dial(socket, config, &pod.budget).await?;
        let open = context.metrics.tunnel(Reporter::Source);
        tokio::spawn(async move {
            driver.await;
            drop(open);
        });
        Ok(tunnel)
    }

    async fn endpoint_leaves(&self, context: &Context) {
        let mut generations = context.discovery.generations();
        loop {
            let known = context
                .discovery
                .snapshot()
                .workload(&self.endpoint)
                .is_some_and(|endpoint| self.expected.contains(&endpoint.identity));
            if !known {
                return;
            }
            if generations.changed().await.is_err() {
                return std::future::pending().await;
            }
        }
    }
}
