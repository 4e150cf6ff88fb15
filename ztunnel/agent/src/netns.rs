//! A pod's network namespace, held by descriptor.
//!
//! Invariant: no runtime thread ever enters a namespace. Each visit has a thread of its own that ends with
//! it; what is made inside (sockets, rules) stays inside, whoever holds the descriptor.

use nix::sched::{CloneFlags, setns};
use std::{
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    sync::Arc,
};

/// A network namespace. Clones share the descriptor.
#[derive(Debug, Clone)]
pub struct Netns(Arc<OwnedFd>);

impl Netns {
    pub fn new(fd: OwnedFd) -> Self {
        Self(Arc::new(fd))
    }

    /// What tells namespaces apart: two descriptors of one namespace have the same.
    pub fn inode(&self) -> io::Result<u64> {
        Ok(std::fs::File::from(self.0.try_clone()?).metadata()?.ino())
    }

    /// Runs `visit` inside, on a thread of its own, and waits for it.
    pub fn enter<T: Send>(&self, visit: impl FnOnce() -> T + Send) -> io::Result<T> {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                setns(self.0.as_fd(), CloneFlags::CLONE_NEWNET)?;
                Ok(visit())
            });
            thread
                .join()
                .unwrap_or_else(|_| Err(io::Error::other("the visit to a namespace panicked")))
        })
    }

    /// Runs netlink work inside, on a thread and a runtime of its own.
    pub fn netlink<T: Send>(
        &self,
        work: impl AsyncFnOnce() -> nlink::Result<T> + Send,
    ) -> Result<T, NetlinkError> {
        let done = self.enter(|| -> Result<T, NetlinkError> {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?;
            Ok(runtime.block_on(work())?)
        })?;
        done
    }
}

/// Why netlink work in a namespace failed.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    #[error("entering the namespace: {0}")]
    Enter(#[from] io::Error),
    #[error("netlink: {0}")]
    Netlink(#[from] nlink::Error),
}
