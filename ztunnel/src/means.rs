//! What this process may use of the machine, looked up once at the start.
//!
//! Invariant: what is shared out between workloads is less than there is, so that ztunnel's own work
//! (control, the agent, its pages) goes on when they have taken all of theirs.

use crate::{privilege::PrivilegeError, sockets::MAX_BATCH};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use std::path::Path;

/// Most that workloads may buffer together.
const MAX_BUFFERED: usize = 512 << 20;

/// Descriptors and memory.
#[derive(Debug, Clone, Copy)]
pub struct Means {
    descriptors: usize,
    memory: usize,
}

impl Means {
    /// Raises what may be raised and reads the limits.
    pub fn of_this_process() -> Result<Self, PrivilegeError> {
        let system = |error: nix::Error| PrivilegeError::System(error.to_string());
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).map_err(system)?;
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard).map_err(system)?;
        Ok(Self {
            descriptors: usize::try_from(hard).unwrap_or(usize::MAX),
            memory: memory_limit().unwrap_or(usize::MAX),
        })
    }

    /// Descriptors for connections. A quarter is for sockets in stock and tunnels to peers, and what is left
    /// for everything else.
    pub fn connections(&self) -> usize {
        (self.descriptors - self.descriptors / 4).saturating_sub(64)
    }

    /// Sockets that a pod has in stock of each kind.
    pub fn batch(&self) -> u32 {
        u32::try_from(self.descriptors / 64).map_or(MAX_BATCH, |batch| batch.clamp(1, MAX_BATCH))
    }

    /// Bytes that may wait for slow readers.
    pub fn buffers(&self) -> usize {
        (self.memory / 4).min(MAX_BUFFERED)
    }
}

/// The limit of this process's control group, of either version; none where there is none.
fn memory_limit() -> Option<usize> {
    let groups = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    groups.lines().filter_map(limit_of).min()
}

/// What a line of `/proc/self/cgroup` leads to: `number:controllers:path`, version 2 without controllers.
fn limit_of(line: &str) -> Option<usize> {
    let mut parts = line.splitn(3, ':').skip(1);
    let (controllers, path) = (parts.next()?, parts.next()?);
    let (root, file) = match controllers {
        "" => ("/sys/fs/cgroup", "memory.max"),
        "memory" => ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
        _ => return None,
    };
    // In a container the group may be mounted as the root.
    [path.trim_start_matches('/'), ""]
        .iter()
        .find_map(|path| std::fs::read_to_string(Path::new(root).join(path).join(file)).ok())?
        .trim()
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f32_f34_what_is_shared_out_leaves_something() {
        for (descriptors, memory, connections, batch, buffers) in [
            (256, 64 << 20, 128, 4, 16 << 20),
            (1024, usize::MAX, 704, 16, MAX_BUFFERED),
            (20_000, 1 << 30, 14_936, 64, 256 << 20),
            (32, 0, 0, 1, 0),
        ] {
            let means = Means { descriptors, memory };
            assert_eq!(means.connections(), connections, "{descriptors}");
            assert_eq!(means.batch(), batch, "{descriptors}");
            assert_eq!(means.buffers(), buffers, "{memory}");
        }
    }
}
