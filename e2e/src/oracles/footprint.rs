//! O3: what a process of the mesh holds, now and before.
//!
//! Invariant: growth alone is judged; a process that holds less than before has come back.

use std::fs;

use anyhow::{Context, Result, bail};

use crate::lab::Process;
use crate::mesh::{Mesh, MeshNode};

/// Beside the five percent: what a running load moves by itself.
const SLACK_KIB: u64 = 8 << 10;
const SLACK_FDS: u64 = 32;
const SLACK_THREADS: u64 = 4;
const SLACK_CONNECTIONS: u64 = 32;

/// What one process holds.
#[derive(Debug, Clone)]
pub(super) struct Footprint {
    pub name: String,
    resident_kib: u64,
    fds: u64,
    threads: u64,
    /// Connections that it says it carries.
    connections: u64,
}

/// Every process of the mesh; fails when one of them is not running.
pub(super) fn of(mesh: &Mesh, nodes: [&MeshNode; 2]) -> Result<Vec<Footprint>> {
    let mut all = vec![mesh.with_control(|control| Footprint::take("control", control, 0))??];
    for node in nodes {
        let open = node.metrics()?.sum("culvert_connections_open", &[]) as u64;
        let name = |program: &str| format!("{program} of {}", node.name());
        all.push(node.with_ztunnel(|ztunnel| Footprint::take(&name("ztunnel"), ztunnel, open))??);
        all.push(node.with_agent(|agent| Footprint::take(&name("agent"), agent, 0))??);
    }
    Ok(all)
}

impl Footprint {
    fn take(name: &str, process: &Process, connections: u64) -> Result<Self> {
        if let Some(status) = process.ended()? {
            bail!("{name} has ended: {status}");
        }
        let number = |field: &str| -> Result<u64> {
            let text = process.status_field(field)?;
            let digits = text.split_whitespace().next().context("an empty field")?;
            Ok(digits.parse()?)
        };
        Ok(Self {
            name: name.to_owned(),
            resident_kib: number("VmRSS")?,
            fds: fs::read_dir(format!("/proc/{}/fd", process.pid()))?.count() as u64,
            threads: number("Threads")?,
            connections,
        })
    }

    /// Fails, with the figure, unless nothing has grown beyond what is allowed.
    pub fn within(&self, before: &Self) -> Result<()> {
        for (what, now, then, slack) in [
            ("kB resident", self.resident_kib, before.resident_kib, SLACK_KIB),
            ("descriptors", self.fds, before.fds, SLACK_FDS),
            ("threads", self.threads, before.threads, SLACK_THREADS),
            (
                "connections",
                self.connections,
                before.connections,
                SLACK_CONNECTIONS,
            ),
        ] {
            if now > then + then / 20 + slack {
                bail!("{} has {now} {what}, and had {then}", self.name);
            }
        }
        Ok(())
    }
}
