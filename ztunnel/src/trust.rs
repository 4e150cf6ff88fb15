//! The tunnels that are up are judged again: by newer bundles and revocation lists, and as leaves end.
//!
//! ```text
//! handshake ──▶ Live ──every second──▶ judge ──▶ keep | ask for a renewal | cut
//! ```
//! Invariant: what [`judge`] cuts is reset in both directions at this end, whichever end dialled. Validity goes
//! by the wall clock; a clock that is set ends nothing at once that a renewal may still save.

use crate::{context::Context, pods::Pod};
use culvert_core::{
    ids::{NetworkAddress, SpiffeId, WorkloadUid},
    snapshot::Snapshot,
};
use culvert_io::{hbone::Watch, identity::Credential, tls::still_trusted};
use parking_lot::Mutex;
use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

/// Between two looks at all tunnels.
const LOOK: Duration = Duration::from_secs(1);

/// After a leaf has been seen to have ended, its holder has at most so long to show the next one: to have it
/// issued after a clock was set, and to complete a handshake.
const RENEWS_WITHIN: Duration = Duration::from_secs(30);

/// Which end began a tunnel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Direction {
    /// We did, to this endpoint.
    Outbound(WorkloadUid),
    Inbound,
}

/// A tunnel that is up.
pub struct Live {
    direction: Direction,
    peer_ip: IpAddr,
    watch: Watch,
    own_not_after: SystemTime,
    /// How long its peer may take for a renewal: no longer than its leaves had to live.
    patience: Duration,
    /// Since when a renewal is due, by a clock that is never set.
    due: Mutex<Option<Instant>>,
    /// Generation of the bundles that last judged its chain.
    judged: AtomicU64,
}

impl Live {
    pub fn new(direction: Direction, peer_ip: IpAddr, watch: Watch, own: &Credential) -> Self {
        Self {
            direction,
            peer_ip,
            own_not_after: own.svid.not_after(),
            patience: watch
                .peer
                .not_after
                .min(own.svid.not_after())
                .duration_since(SystemTime::now())
                .unwrap_or_default()
                .min(RENEWS_WITHIN),
            due: Mutex::default(),
            judged: AtomicU64::new(own.bundles.generation),
            watch,
        }
    }
}

impl Live {
    fn is_overdue(&self) -> bool {
        self.due
            .lock()
            .is_some_and(|since| since.elapsed() >= self.patience)
    }

    fn note(&self, verdict: Verdict) {
        let mut due = self.due.lock();
        *due = match verdict {
            Verdict::Renew => due.or_else(|| Some(Instant::now())),
            Verdict::Keep | Verdict::Retire | Verdict::Cut(_) => None,
        };
    }
}

/// The tunnels of a pod that are up, and until when the newest handshake with each peer vouches for it.
#[derive(Default)]
pub struct LiveTunnels {
    all: Mutex<Vec<Arc<Live>>>,
    vouched: Mutex<HashMap<(IpAddr, SpiffeId), SystemTime>>,
}

impl LiveTunnels {
    /// Lists a tunnel whose handshake is complete: it vouches for older ones with the same peer while both of
    /// its leaves are valid, so that both ends judge alike.
    pub fn add(&self, live: Live) {
        let peer = &live.watch.peer;
        let ends = peer.not_after.min(live.own_not_after);
        self.vouched
            .lock()
            .entry((live.peer_ip, peer.id.clone()))
            .and_modify(|until| *until = (*until).max(ends))
            .or_insert(ends);
        self.all.lock().push(Arc::new(live));
    }

    fn open(&self) -> Vec<Arc<Live>> {
        let mut all = self.all.lock();
        all.retain(|live| !live.watch.is_closed());
        all.clone()
    }

    /// The identities at the other ends of tunnels.
    pub fn peers(&self) -> Vec<SpiffeId> {
        let open = self.open().into_iter();
        open.map(|live| live.watch.peer.id.clone()).collect()
    }

    fn vouched(&self, live: &Live) -> Option<SystemTime> {
        let key = (live.peer_ip, live.watch.peer.id.clone());
        self.vouched.lock().get(&key).copied()
    }

    fn forget_ended(&self, now: SystemTime) {
        self.vouched.lock().retain(|_, until| *until > now);
    }
}

/// What a verdict depends on, of one tunnel.
#[derive(Debug, Clone, Copy)]
struct Facts {
    own_not_after: SystemTime,
    peer_not_after: SystemTime,
    /// Until when the leaves of the newest handshake with this peer are valid.
    vouched: Option<SystemTime>,
    /// Both identities are in the snapshot.
    known: bool,
    /// A stream ends with its tunnel's leaves.
    strict: bool,
    /// A renewal has been due for longer than it may be.
    overdue: bool,
}

/// What becomes of a tunnel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Keep,
    /// It takes no new stream; the open ones go on.
    Retire,
    /// As before, and the peer shall show a valid leaf.
    Renew,
    Cut(&'static str),
}

/// Settled D14.
fn judge(facts: Facts, now: SystemTime) -> Verdict {
    if now < facts.own_not_after.min(facts.peer_not_after) {
        return Verdict::Keep;
    }
    if facts.strict {
        return Verdict::Cut("ended");
    }
    if !facts.known {
        return Verdict::Cut("gone");
    }
    if facts.vouched.is_some_and(|until| now < until) {
        return Verdict::Retire;
    }
    if facts.overdue {
        Verdict::Cut("ended")
    } else {
        Verdict::Renew
    }
}

/// Judges all tunnels for as long as it is polled.
pub async fn run(context: Arc<Context>) {
    let mut ticks = tokio::time::interval(LOOK);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let (snapshot, now) = (context.discovery.snapshot(), SystemTime::now());
        for pod in context.pods.all() {
            let bundles = pod
                .lease
                .changes()
                .borrow()
                .as_ref()
                .map(|held| held.bundles.clone());
            for live in pod.live.open() {
                if let Some(bundles) = &bundles
                    && live.judged.swap(bundles.generation, Ordering::Relaxed) != bundles.generation
                    && let Err(error) = still_trusted(bundles, &live.watch.peer.chain)
                {
                    tracing::warn!(pod = %pod.name, peer = %live.watch.peer.id, %error, "tunnel cut");
                    cut(&context, &live, error.reason());
                    continue;
                }
                let verdict = judge(facts(&snapshot, &pod, &live), now);
                live.note(verdict);
                match verdict {
                    Verdict::Keep => {}
                    Verdict::Retire => live.watch.retire(),
                    Verdict::Renew => {
                        live.watch.retire();
                        if let Direction::Outbound(endpoint) = &live.direction
                            && live.watch.streams() > 0
                        {
                            pod.tunnels.renew(&pod, &context, endpoint);
                        }
                    }
                    Verdict::Cut(reason) => cut(&context, &live, reason),
                }
            }
            pod.live.forget_ended(now);
            tokio::task::yield_now().await;
        }
    }
}

fn facts(snapshot: &Snapshot, pod: &Pod, live: &Live) -> Facts {
    let own = snapshot.workload(&pod.workload_uid);
    let peer = match &live.direction {
        Direction::Outbound(endpoint) => snapshot.workload(endpoint),
        Direction::Inbound => own.and_then(|own| {
            snapshot.workload_at(&NetworkAddress {
                network: own.network.clone(),
                ip: live.peer_ip,
            })
        }),
    };
    Facts {
        own_not_after: live.own_not_after,
        peer_not_after: live.watch.peer.not_after,
        vouched: pod.live.vouched(live),
        known: own.is_some_and(|own| own.identity == *pod.identity())
            && peer.is_some_and(|peer| peer.identity == live.watch.peer.id),
        strict: snapshot.config().is_some_and(|config| config.close_at_expiry),
        overdue: live.is_overdue(),
    }
}

fn cut(context: &Context, live: &Live, reason: &'static str) {
    let direction = match live.direction {
        Direction::Outbound(_) => "outbound",
        Direction::Inbound => "inbound",
    };
    context
        .metrics
        .tunnels_cut
        .with_label_values(&[direction, reason])
        .inc();
    live.watch.cut();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f55_d14_open_streams_outlive_a_leaf_only_while_its_holder_has_another() {
        const HOUR: Duration = Duration::from_secs(3600);
        // 2038, and whatever clock: only differences count.
        let start = SystemTime::UNIX_EPOCH + Duration::from_secs(1 << 31);
        let ends = start + HOUR;
        let facts = Facts {
            own_not_after: ends,
            peer_not_after: ends,
            vouched: Some(ends),
            known: true,
            strict: false,
            overdue: false,
        };
        let renewed = Some(ends + HOUR);
        let second = Duration::from_secs(1);
        for (case, facts, now, want) in [
            ("both valid", facts, start, Verdict::Keep),
            ("a clock set back", facts, start - HOUR, Verdict::Keep),
            ("just ended", facts, ends, Verdict::Renew),
            (
                "a clock set ahead by hours ends nothing at once",
                facts,
                ends + 3 * HOUR,
                Verdict::Renew,
            ),
            (
                "not renewed",
                Facts {
                    overdue: true,
                    ..facts
                },
                ends + second,
                Verdict::Cut("ended"),
            ),
            (
                "renewed",
                Facts {
                    vouched: renewed,
                    ..facts
                },
                ends + HOUR / 2,
                Verdict::Retire,
            ),
            (
                "renewed once, and ended again",
                Facts {
                    vouched: renewed,
                    ..facts
                },
                ends + HOUR,
                Verdict::Renew,
            ),
            (
                "renewed once, and not again",
                Facts {
                    vouched: renewed,
                    overdue: true,
                    ..facts
                },
                ends + HOUR + second,
                Verdict::Cut("ended"),
            ),
            (
                "gone",
                Facts {
                    vouched: renewed,
                    known: false,
                    ..facts
                },
                ends,
                Verdict::Cut("gone"),
            ),
            (
                "gone, and still valid",
                Facts {
                    known: false,
                    ..facts
                },
                start,
                Verdict::Keep,
            ),
            (
                "strict",
                Facts {
                    vouched: renewed,
                    strict: true,
                    ..facts
                },
                ends,
                Verdict::Cut("ended"),
            ),
            (
                "strict, and still valid",
                Facts {
                    strict: true,
                    ..facts
                },
                start,
                Verdict::Keep,
            ),
            (
                "only our own has ended",
                Facts {
                    own_not_after: start,
                    ..facts
                },
                start + HOUR / 2,
                Verdict::Retire,
            ),
        ] {
            assert_eq!(judge(facts, now), want, "{case}");
        }
    }
}
