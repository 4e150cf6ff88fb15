//! Handshakes at a pace that leaves the thread to what is open.
//!
//! A handshake costs as much processor time as megabytes carried, and whoever reaches the port can ask for
//! one. Each worker thread therefore gives them half of its time at most; beyond that they wait, and what
//! is carried goes on.
//!
//! Invariant: time is counted on the thread that spends it. A handshake that waits costs nothing.

use std::{
    cell::Cell,
    pin::Pin,
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};
use tokio::time::Sleep;

/// Time that handshakes may spend at a stretch after a pause.
const BURST: Duration = Duration::from_millis(10);

/// Of a thread's time, one part in so many is for handshakes.
const PART: u32 = 2;

thread_local! {
    /// Up to when, on a clock that runs at the handshakes' share, time has been spent.
    static SPENT: Cell<Option<Instant>> = const { Cell::new(None) };
}

/// How long until this thread has time for handshakes.
fn owed(now: Instant) -> Duration {
    SPENT.get().map_or(Duration::ZERO, |spent| {
        spent.saturating_duration_since(now + BURST)
    })
}

fn spend(time: Duration, now: Instant) {
    let from = SPENT.get().map_or(now, |spent| spent.max(now));
    SPENT.set(Some(from + time * PART));
}

/// A handshake that keeps the pace.
pub struct Paced<F> {
    handshake: Pin<Box<F>>,
    pause: Option<Pin<Box<Sleep>>>,
}

impl<F: Future> Paced<F> {
    pub fn new(handshake: F) -> Self {
        Self {
            handshake: Box::pin(handshake),
            pause: None,
        }
    }
}

impl<F: Future> Future for Paced<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        loop {
            if let Some(pause) = &mut self.pause {
                ready!(pause.as_mut().poll(cx));
                self.pause = None;
            }
            let start = Instant::now();
            let owed = owed(start);
            if owed.is_zero() {
                let polled = self.handshake.as_mut().poll(cx);
                let end = Instant::now();
                spend(end - start, end);
                return polled;
            }
            self.pause = Some(Box::pin(tokio::time::sleep(owed)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn f26_handshakes_take_half_of_a_threads_time() {
        let busy = |rounds: u32| async move {
            for _ in 0..rounds {
                let start = Instant::now();
                while start.elapsed() < Duration::from_millis(2) {}
                tokio::task::yield_now().await;
            }
        };
        let start = Instant::now();
        let handshakes: Vec<_> = (0..10).map(|_| tokio::spawn(Paced::new(busy(10)))).collect();
        for handshake in handshakes {
            handshake.await.unwrap();
        }
        // 200 ms of work, of which the burst may come at once.
        assert!(
            start.elapsed() >= Duration::from_millis(350),
            "{:?}",
            start.elapsed()
        );
    }
}
