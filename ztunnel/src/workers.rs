//! The threads that carry traffic.
//!
//! Each has a runtime of its own, so that a tunnel, its streams and their sockets wake one another on one
//! thread. Invariant: a pod's traffic stays on the worker that it was given.

use culvert_io::sys::give_memory_back;
use std::{
    convert::Infallible,
    io,
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
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

/// The worker threads; they end with the process.
pub struct Workers {
    handles: Vec<Handle>,
    next: AtomicUsize,
}

impl Workers {
    /// Starts `count` workers; 0 is one per core.
    pub fn start(count: usize) -> io::Result<Self> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let count = if count == 0 { cores } else { count };
        let handles = (0..count)
            .map(|index| {
                let runtime = Builder::new_current_thread().enable_all().build()?;
                let handle = runtime.handle().clone();
                std::thread::Builder::new()
                    .name(format!("worker-{index}"))
                    .spawn(move || runtime.block_on(keep_house()))?;
                Ok(handle)
            })
            .collect::<io::Result<_>>()?;
        Ok(Self {
            handles,
            next: AtomicUsize::new(0),
        })
    }

    /// The worker for the next pod, in turn.
    pub fn assign(&self) -> &Handle {
        let index = self.next.fetch_add(1, Ordering::Relaxed) % self.handles.len();
        &self.handles[index]
    }
}
