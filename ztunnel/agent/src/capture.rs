//! Capture in a pod: which connections ztunnel takes.
//!
//! ```text
//! routes:      TCP without a mark of ours ends at the pod's own loopback (`wall`)
//! mark-out:    ztunnel's sockets, answers to probes, exclusions: marked, they leave as they are
//! output:      SYN of the app ─nat─▶ 15001     port 53 to a cluster resolver ─nat─▶ 15053…
//! prerouting:  SYN to the app ─nat─▶ 15006     15008, probes, exclusions pass
//! filter:      what nothing above took is rejected
//! ```
//! Invariant: one transaction puts all rules in place or none. Only a first SYN is redirected: a rule
//! that saw later segments would reset connections that were open before it. Nothing leaves the pod that
//! the rules do not send out, so with the rules gone nothing leaves it (settled D7).

mod changes;
mod gate;
pub mod rules;
mod wall;

pub use gate::Gate;
pub use rules::Rules;

use crate::{
    marks::Marks,
    netns::{NetlinkError, Netns},
};
use changes::Changes;
use nlink::{
    Connection, Nftables,
    netlink::{
        SockDiag,
        nftables::{Family, Rule, Transaction},
    },
    sockdiag::SocketFilter,
};
use rules::{TABLE, chains};
use std::os::fd::AsFd;
use wall::Wall;

/// The rules in one pod, and the means to look at them.
pub struct Capture {
    nft: Connection<Nftables>,
    wall: Wall,
    rules: Rules,
    phase: Phase,
    seen: Seen,
    changes: Changes,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Taking,
    Draining,
}

/// What the kernel showed right after the rules were put in place.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Seen {
    chains: Vec<String>,
    rules: Vec<(String, Vec<u8>)>,
}

impl Capture {
    /// Puts the rules in place, replacing what was there, in one step.
    pub async fn install(netns: &Netns, rules: Rules) -> Result<Self, NetlinkError> {
        let mut capture = Self {
            nft: Connection::<Nftables>::new_in(netns.as_fd())?,
            wall: Wall::new(netns)?,
            rules,
            phase: Phase::Taking,
            seen: Seen::default(),
            changes: netns.enter(Changes::of_rules)??,
        };
        capture.write().await?;
        Ok(capture)
    }

    pub fn rules(&self) -> &Rules {
        &self.rules
    }

    /// Puts other rules in place of these.
    pub async fn replace(&mut self, rules: Rules) -> Result<(), NetlinkError> {
        self.rules = rules;
        self.phase = Phase::Taking;
        self.write().await
    }

    /// Puts in place again what somebody has changed.
    pub async fn repair(&mut self) -> Result<(), NetlinkError> {
        self.write().await
    }

    /// Takes no new connection, and keeps those that were taken (settled D7).
    pub async fn drain(&mut self) -> Result<(), NetlinkError> {
        self.phase = Phase::Draining;
        self.write().await
    }

    /// Takes everything away. What ztunnel still has open in the pod is reset first, whether it lives or
    /// hangs: untranslated, the application's next segment would go to the original destination. The wall goes
    /// before the rules by which connections of the pod's own pass it.
    pub async fn remove(netns: &Netns, marks: Marks) -> Result<(), NetlinkError> {
        let left = SocketFilter::tcp()
            .connected()
            .mark(marks.socket, u32::MAX)
            .build_inet();
        let sockets = Connection::<SockDiag>::new_in(netns.as_fd())?;
        sockets.destroy_matching(&left).await?;
        Wall::new(netns)?.remove().await?;
        let nft = Connection::<Nftables>::new_in(netns.as_fd())?;
        nft.del_table_if_exists(TABLE, Family::Inet).await?;
        gate::remove(&nft).await
    }

    /// Whether an earlier agent has left rules in the pod.
    pub async fn is_left(netns: &Netns) -> Result<bool, NetlinkError> {
        let nft = Connection::<Nftables>::new_in(netns.as_fd())?;
        let tables = nft.list_tables_in(Family::Inet).await?;
        Ok(tables.iter().any(|table| table.name == TABLE))
    }

    /// Whether everything is as it was put in place. While nobody touches rules or routes in the pod this
    /// costs a look at two empty queues.
    pub async fn is_intact(&mut self) -> Result<bool, NetlinkError> {
        if !self.wall.is_intact().await? {
            return Ok(false);
        }
        if !self.changes.seen() {
            return Ok(true);
        }
        let intact = self.look().await? == self.seen;
        if !intact {
            self.changes.remember();
        }
        Ok(intact)
    }

    async fn write(&mut self) -> Result<(), NetlinkError> {
        let mut batch = fresh_table(&self.nft, TABLE, Family::Inet).await?;
        for chain in chains()? {
            batch = batch.add_chain(chain);
        }
        let rules: Vec<Rule> = match self.phase {
            Phase::Taking => self.rules.capturing(),
            Phase::Draining => self.rules.draining(),
        };
        let count = rules.len();
        for rule in rules {
            batch = batch.add_rule(rule.family(Family::Inet));
        }
        batch.commit(&self.nft).await?;
        self.wall.build().await?;
        // What has just been written is no news.
        self.changes.seen();
        self.seen = self.look().await?;
        if self.seen.rules.len() == count {
            Ok(())
        } else {
            Err(NetlinkError::Contested)
        }
    }

    async fn look(&self) -> Result<Seen, NetlinkError> {
        let chains = self.nft.list_chains_in(TABLE, Family::Inet).await?;
        let mut chains: Vec<String> = chains
            .iter()
            .map(|c| format!("{} {:?} {:?} {:?}", c.name, c.hook, c.priority, c.policy))
            .collect();
        chains.sort();
        let rules = self.nft.list_rules(TABLE, Family::Inet).await?;
        Ok(Seen {
            chains,
            rules: rules
                .into_iter()
                .map(|rule| (rule.chain, rule.expression_bytes))
                .collect(),
        })
    }
}

/// A transaction that begins with an empty table of this name, whatever it held before.
pub async fn fresh_table(
    nft: &Connection<Nftables>,
    name: &str,
    family: Family,
) -> Result<Transaction, NetlinkError> {
    let tables = nft.list_tables_in(family).await?;
    let mut batch = nft.transaction();
    if tables.iter().any(|table| table.name == name) {
        batch = batch.del_table(name, family);
    }
    Ok(batch.add_table(name, family))
}

#[cfg(test)]
mod tests;
