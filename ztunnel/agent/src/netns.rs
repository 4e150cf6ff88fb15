//! A pod's network namespace, held by descriptor.
//!
//! Invariant: no runtime thread ever enters a namespace. Each visit has a thread of its own that ends with
//! it; what is made inside (sockets, rules) stays inside, whoever holds the descriptor.

use crate::records::{Record, Records};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns},
};
use std::{
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
    sync::Arc,
};

/// A network namespace. Clones share the descriptor.
#[derive(Debug, Clone)]
pub struct Netns(Arc<OwnedFd>);

impl Netns {
    pub fn new(fd: OwnedFd) -> Self {
        Self(Arc::new(fd))
    }

    /// Device and inode, which tell namespaces apart: two descriptors of one namespace have the same.
    pub fn key(&self) -> io::Result<(u64, u64)> {
        let metadata = std::fs::File::from(self.0.try_clone()?).metadata()?;
        Ok((metadata.dev(), metadata.ino()))
    }

    /// The kernel's cookie of the namespace, which its sockets show too.
    pub fn cookie(&self) -> io::Result<u64> {
        self.enter(|| {
            let socket = socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::DGRAM, None)?;
            culvert_io::sys::netns_cookie(&socket)
        })?
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
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Where namespaces are found again by path.
#[derive(Debug, Clone)]
pub struct Places {
    runtime: PathBuf,
    records: Records,
}

impl Places {
    /// `runtime` is the folder in which the container runtime keeps namespaces.
    pub fn new(runtime: PathBuf, records: Records) -> Self {
        Self { runtime, records }
    }

    /// The pod's namespace, by the inode that its record has.
    pub fn find(&self, record: &Record) -> Option<Netns> {
        let told = record.netns_path.clone();
        let own = self.records.own_netns(&record.uid);
        let kept = std::fs::read_dir(&self.runtime).into_iter().flatten();
        let kept = kept.flatten().map(|entry| entry.path());
        told.into_iter()
            .chain([own])
            .chain(kept)
            .filter(|path| is(path, record.netns))
            .find_map(|path| {
                let netns = Netns::new(std::fs::File::open(path).ok()?.into());
                (netns.key().ok()? == record.netns).then_some(netns)
            })
    }

    /// Keeps the namespace by a mount of the agent's own where no path leads to it. Best effort: without
    /// one, ztunnel's listeners lead there too.
    pub fn keep(&self, record: &Record, netns: &Netns) {
        if self.find(record).is_some() {
            return;
        }
        let path = self.records.own_netns(&record.uid);
        let source = format!("/proc/self/fd/{}", netns.0.as_raw_fd());
        let mounted = std::fs::File::create(&path).and_then(|_| {
            Ok(mount(
                Some(source.as_str()),
                &path,
                None::<&str>,
                MsFlags::MS_BIND,
                None::<&str>,
            )?)
        });
        if let Err(error) = mounted {
            tracing::debug!(pod = record.uid, %error, "its namespace has no path");
            let _ = std::fs::remove_file(path);
        }
    }

    /// Lets go of the agent's own mount.
    pub fn leave(&self, record: &Record) {
        let path = self.records.own_netns(&record.uid);
        let _ = umount2(&path, MntFlags::MNT_DETACH);
        let _ = std::fs::remove_file(path);
    }
}

fn is(path: &Path, key: (u64, u64)) -> bool {
    std::fs::metadata(path).is_ok_and(|metadata| (metadata.dev(), metadata.ino()) == key)
}

/// Why netlink work in a namespace failed.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    #[error("entering the namespace: {0}")]
    Enter(#[from] io::Error),
    #[error("netlink: {0}")]
    Netlink(#[from] nlink::Error),
    #[error("somebody else changed the rules while they were put in place")]
    Contested,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{lab::Lab, marks::Marks};

    #[tokio::test]
    async fn t40_a_namespace_is_found_by_its_inode_and_by_nothing_else() {
        let lab = Lab::new().await;
        let folder = tempfile::tempdir().unwrap();
        let records = Records::open(folder.path()).unwrap();
        let places = Places::new(folder.path().join("none"), records);
        let path = |netns: &Netns| PathBuf::from(format!("/proc/self/fd/{}", netns.0.as_raw_fd()));
        let mut record = Record {
            uid: "u-1".into(),
            namespace: "shop".into(),
            name: "web".into(),
            addresses: vec![],
            host_ifindex: 0,
            netns_path: Some(path(&lab.pod)),
            netns: lab.pod.key().unwrap(),
            marks: Marks::random(),
            order: None,
        };
        let found = places.find(&record).expect("where its path leads");
        assert_eq!(found.key().unwrap(), lab.pod.key().unwrap());
        // As after the end of a process whose number somebody else has now.
        record.netns_path = Some(path(&lab.node));
        assert!(places.find(&record).is_none(), "another namespace is at its path");
        record.netns_path = Some("/proc/self/ns/net".into());
        assert!(places.find(&record).is_none());
    }
}
