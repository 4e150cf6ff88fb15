//! Capture in a pod: which connections ztunnel takes.
//!
//! ```text
//! output:      SYN of the app ─nat─▶ 15001     port 53 to a cluster resolver ─nat─▶ 15053…
//! prerouting:  SYN to the app ─nat─▶ 15006     15008, probes, exclusions pass
//! reply route: answers to a source address that ztunnel borrowed come back to it by mark
//! filter:      a SYN that nothing above took is rejected
//! ```
//! Invariant: one transaction puts all of it in place or nothing. Only a first SYN is redirected: a rule
//! that saw later segments would reset connections that were open before it (settled D7).

pub mod rules;

pub use rules::{Marks, Rules};

use crate::netns::{NetlinkError, Netns};
use nlink::{
    Connection, Nftables, Route,
    netlink::{
        nftables::{Family, Rule, Transaction},
        route::{Ipv4Route, Ipv6Route},
        rule::RuleBuilder,
        types::route::{RouteScope, RouteType},
    },
};
use rules::{TABLE, chains};
use std::{
    net::{Ipv4Addr, Ipv6Addr},
    os::fd::AsFd,
};

/// The routing table of borrowed source addresses.
const REPLY_TABLE: u32 = 100;
const REPLY_PRIORITY: u32 = 32764;
const AF_INET: u8 = nix::libc::AF_INET as u8;
const AF_INET6: u8 = nix::libc::AF_INET6 as u8;

/// The rules in one pod, and the means to look at them.
pub struct Capture {
    nft: Connection<Nftables>,
    route: Connection<Route>,
    rules: Rules,
    phase: Phase,
    seen: Seen,
    generation: u32,
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
            route: Connection::<Route>::new_in(netns.as_fd())?,
            rules,
            phase: Phase::Taking,
            seen: Seen::default(),
            generation: 0,
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

    /// Takes everything away.
    pub async fn remove(&mut self) -> Result<(), NetlinkError> {
        self.nft.del_table_if_exists(TABLE, Family::Inet).await?;
        let present = self.reply_families().await?;
        for (family, rule) in reply_rules(self.rules.marks.reply) {
            if present.contains(&family) {
                self.route.del_rule_if_exists(rule).await?;
            }
        }
        Ok(())
    }

    /// Whether everything is as it was put in place. While nobody touches any rule in the pod this costs
    /// one question to the kernel, and one for the routes.
    pub async fn is_intact(&mut self) -> Result<bool, NetlinkError> {
        if !self.replies_routed().await? {
            return Ok(false);
        }
        let generation = self.nft.generation().await?;
        if generation == self.generation {
            return Ok(true);
        }
        if self.look().await? != self.seen {
            return Ok(false);
        }
        self.generation = generation;
        Ok(true)
    }

    async fn write(&mut self) -> Result<(), NetlinkError> {
        self.route_replies().await?;
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
        self.generation = self.nft.generation().await?;
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

    async fn replies_routed(&self) -> Result<bool, NetlinkError> {
        let routes = self.route.get_routes_for_table(REPLY_TABLE).await?;
        Ok(self.reply_families().await?.len() == 2 && routes.len() >= 2)
    }

    /// The address families whose replies are routed by mark now.
    async fn reply_families(&self) -> Result<Vec<u8>, NetlinkError> {
        let mark = self.rules.marks.reply;
        let rules = self.route.get_rules().await?;
        let ours = rules
            .iter()
            .filter(|rule| rule.fwmark() == Some(mark) && rule.table_id() == REPLY_TABLE);
        Ok(ours.map(|rule| rule.family()).collect())
    }

    async fn route_replies(&self) -> Result<(), NetlinkError> {
        let present = self.reply_families().await?;
        for (family, rule) in reply_rules(self.rules.marks.reply) {
            if !present.contains(&family) {
                self.route.add_rule(rule).await?;
            }
        }
        let v4 = Ipv4Route::from_addr(Ipv4Addr::UNSPECIFIED, 0)
            .dev("lo")
            .route_type(RouteType::Local)
            .scope(RouteScope::Host)
            .table(REPLY_TABLE);
        self.route.replace_route(v4).await?;
        let v6 = Ipv6Route::from_addr(Ipv6Addr::UNSPECIFIED, 0)
            .dev("lo")
            .route_type(RouteType::Local)
            .table(REPLY_TABLE);
        Ok(self.route.replace_route(v6).await?)
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

fn reply_rules(mark: u32) -> [(u8, RuleBuilder); 2] {
    [(AF_INET, RuleBuilder::v4()), (AF_INET6, RuleBuilder::v6())].map(|(family, rule)| {
        (
            family,
            rule.fwmark(mark).table(REPLY_TABLE).priority(REPLY_PRIORITY),
        )
    })
}

#[cfg(test)]
mod tests;
