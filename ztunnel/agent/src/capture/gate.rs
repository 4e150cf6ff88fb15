//! The gate: while a pod goes from one kind of rules to another, the first segments of its connections wait outside.
//!
//! A connection is translated by what its first segment meets, and never again. While a transaction is carried out
//! a segment may meet old rules in one chain and new ones in the next: it would be marked as captured and not be
//! redirected, or be refused by a chain that was to find it redirected. Behind the gate nothing is lost: TCP sends
//! the segment again within a second.
//!
//! Invariant: what is dropped here no rule of ours and no part of connection tracking has seen.

use super::{fresh_table, rules::first_syn};
use crate::{
    marks::Marks,
    netns::{NetlinkError, Netns},
};
use nlink::{
    Connection, Nftables,
    netlink::nftables::{BaseChain, Chain, Family, FilterHook, Policy, Priority, Rule},
};
use std::os::fd::AsFd;

const TABLE: &str = "culvert-gate";
const IN: &str = "in";
const OUT: &str = "out";

/// A gate that is shut.
pub struct Gate {
    nft: Connection<Nftables>,
}

impl Gate {
    /// Lets ztunnel's own connections pass, and what stays inside of the pod.
    pub async fn shut(netns: &Netns, marks: Marks) -> Result<Self, NetlinkError> {
        let nft = Connection::<Nftables>::new_in(netns.as_fd())?;
        let mut batch = fresh_table(&nft, TABLE, Family::Inet).await?;
        for (name, hook) in [(IN, FilterHook::Prerouting), (OUT, FilterHook::Output)] {
            let base = BaseChain::filter(hook, Priority::Raw).policy(Policy::Accept);
            batch = batch.add_chain(Chain::new(TABLE, name)?.family(Family::Inet).base(base));
        }
        let ours = |chain| Rule::new(TABLE, chain).match_mark(marks.socket).accept();
        let rules = [
            ours(IN),
            Rule::new(TABLE, IN).match_iif("lo").accept(),
            Rule::new(TABLE, IN).then(first_syn()).drop(),
            ours(OUT),
            Rule::new(TABLE, OUT).match_oif("lo").accept(),
            Rule::new(TABLE, OUT).then(first_syn()).drop(),
        ];
        for rule in rules {
            batch = batch.add_rule(rule.family(Family::Inet));
        }
        batch.commit(&nft).await?;
        Ok(Self { nft })
    }

    pub async fn open(self) -> Result<(), NetlinkError> {
        remove(&self.nft).await
    }
}

/// Takes away a gate that an agent may have left shut.
pub(super) async fn remove(nft: &Connection<Nftables>) -> Result<(), NetlinkError> {
    nft.del_table_if_exists(TABLE, Family::Inet).await?;
    Ok(())
}
