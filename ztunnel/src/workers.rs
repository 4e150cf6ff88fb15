//! The threads that carry traffic.
//!
//! ```text
//! accepted on the pod's own worker ──▶ has it time? ─yes─▶ stays
//!                                          └──no──▶ the worker with most time
//! ```
//! Each has a runtime of its own, so that a tunnel, its streams and their sockets wake one another on one
//! thread. Invariant: a connection stays on the worker that took it, and so does a tunnel. A pod has one of
//! its own, and others take its new connections only while that one is busy: a light pod's connections
//! share tunnels, a heavy one is not held to one core.

use culvert_io::sys::give_memory_back;
use std::{
    convert::Infallible,
    io,
    sync::atomic::{AtomicU32, AtomicUsize, Ordering},
    time::{Duration, Instant},
};
use tokio::runtime::{Builder, Handle};

/// How often a thread gives back what it has freed.
const HOUSEKEEPING: Duration = Duration::from_secs(1);

/// Gives memory back to the system, again and again: after a burst of connections nothing else would
/// while a thread is idle. Each thread does so for itself.
pub async fn keep_house() -> Infallible {
    loop {
        tokio::time::sleep(HOUSEKEEPING).await;
        give_memory_back();
    }
}

/// How often it is looked at how busy each worker is.
const LOOK: Duration = Duration::from_millis(100);

/// A worker that works more than this share of the time, in permille, has no time for more.
const BUSY: u32 = 700;

/// How much more time, in permille, another worker must have to take a connection from a busy one.
const BETTER: u32 = 200;

/// What a connection is taken to cost until the next look, in permille: a burst spreads.
const GUESS: u32 = 10;

/// The worker threads; they end with the process.
pub struct Workers {
    workers: Box<[Worker]>,
    next: AtomicUsize,
}

struct Worker {
    handle: Handle,
    /// Share of the time in which it works, in permille: as last seen, and guessed for what came since.
    load: AtomicU32,
}

impl Workers {
    /// Starts `count` workers; 0 is one per core.
    pub fn start(count: usize) -> io::Result<Self> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let count = if count == 0 { cores } else { count };
        let workers = (0..count)
            .map(|index| {
                let runtime = Builder::new_current_thread().enable_all().build()?;
                let handle = runtime.handle().clone();
                std::thread::Builder::new()
                    .name(format!("worker-{index}"))
                    .spawn(move || runtime.block_on(keep_house()))?;
                Ok(Worker {
                    handle,
                    load: AtomicU32::new(0),
                })
            })
            .collect::<io::Result<_>>()?;
        Ok(Self {
            workers,
            next: AtomicUsize::new(0),
        })
    }

    /// The worker for the next pod, in turn.
    pub fn assign(&self) -> &Handle {
        let index = self.next.fetch_add(1, Ordering::Relaxed) % self.workers.len();
        &self.workers[index].handle
    }

    /// Who else shall take a connection that this worker has just accepted; none while it has time itself.
    pub fn elsewhere(&self) -> Option<&Handle> {
        let here = Handle::current().id();
        let own = self
            .workers
            .iter()
            .position(|worker| worker.handle.id() == here)?;
        let load = |index: usize| self.workers[index].load.load(Ordering::Relaxed);
        let index = taker(own, self.workers.len(), load);
        self.workers[index].load.fetch_add(GUESS, Ordering::Relaxed);
        (index != own).then(|| &self.workers[index].handle)
    }

    /// Looks at how busy each worker is, again and again, for as long as it is polled.
    pub async fn look(&self) -> Infallible {
        let worked = |worker: &Worker| worker.handle.metrics().worker_total_busy_duration(0);
        let mut before: Vec<Duration> = self.workers.iter().map(worked).collect();
        let mut at = Instant::now();
        loop {
            tokio::time::sleep(LOOK).await;
            let past = at.elapsed();
            at = Instant::now();
            for (worker, before) in self.workers.iter().zip(&mut before) {
                let now = worked(worker);
                let load = permille(now.saturating_sub(*before), past);
                *before = now;
                worker.load.store(load, Ordering::Relaxed);
            }
        }
    }
}

/// Share of `past` that was worked, at most all of it.
fn permille(worked: Duration, past: Duration) -> u32 {
    let share = worked.as_secs_f64() / past.as_secs_f64().max(f64::EPSILON);
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "between 0 and 1000"
    )]
    let permille = (share.clamp(0.0, 1.0) * 1000.0) as u32;
    permille
}

/// Which of `count` workers takes a connection: `own` while it has time, else the one that has most, if that
/// is clearly more.
fn taker(own: usize, count: usize, load: impl Fn(usize) -> u32) -> usize {
    let busy = load(own);
    if busy < BUSY {
        return own;
    }
    (0..count)
        .min_by_key(|index| load(*index))
        .filter(|least| load(*least) + BETTER <= busy)
        .unwrap_or(own)
}

#[cfg(test)]
mod tests {
    //! Who takes a connection, by how busy the workers are.

    use super::*;

    #[test]
    fn a_worker_gives_away_only_what_it_has_no_time_for() {
        for (load, own, takes) in [
            ([0, 0, 0], 0, 0),
            ([699, 0, 0], 0, 0),
            ([700, 300, 100], 0, 2),
            ([1000, 900, 801], 0, 0),
            ([1000, 800, 900], 0, 1),
            ([900, 100, 0], 1, 1),
        ] {
            assert_eq!(taker(own, load.len(), |index| load[index]), takes, "{load:?}");
        }
    }

    #[test]
    fn a_share_is_never_more_than_all() {
        let ms = Duration::from_millis;
        assert_eq!(permille(ms(50), ms(100)), 500);
        assert_eq!(permille(ms(150), ms(100)), 1000);
        assert_eq!(permille(ms(1), Duration::ZERO), 1000);
    }
}
