//! Faults of the fabric: packets lost or reset between two machines, and links made slow.
//!
//! ```text
//! machine ──▶ its port of the fabric: netdev ingress, table `faults` ──▶ bridge ──▶ tbf ──▶ machine
//! ```
//! Invariant: faults act in the fabric's namespace alone, so that no machine can see or flush them, and
//! every change replaces all of them at once.

use std::net::IpAddr;

use anyhow::{Context, Result, anyhow};
use nlink::netlink::nftables::{
    BaseChain, Chain, CmpOp, Expr, Family, FilterHook, Generated, NumgenKind, Priority, Register, Rule,
};
use nlink::netlink::tc::TbfConfig;
use nlink::{Bytes, Connection, Nftables, Rate, TcHandle};

use super::endpoint::Endpoint;
use super::{Lab, locked, wires};

const TABLE: &str = "faults";

/// What becomes of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    Lost,
    /// Lost, and its sender gets a TCP reset for it.
    Reset,
}

/// A machine's place on the fabric.
#[derive(Debug, Clone)]
pub(super) struct Place {
    /// The fabric's end of its link.
    pub port: String,
    /// Every address behind that port.
    pub blocks: Vec<(IpAddr, u8)>,
}

#[derive(Debug)]
pub(super) struct Fault {
    port: String,
    to: Vec<(IpAddr, u8)>,
    per_mille: u32,
    effect: Effect,
}

impl Lab {
    /// Nothing passes between `a` and `b` (nodes with their pods, hosts), either way, until `heal`.
    pub fn partition(&self, a: &Endpoint, b: &Endpoint) -> Result<()> {
        self.disturb(a, b, 1000, Effect::Lost)?;
        self.disturb(b, a, 1000, Effect::Lost)
    }

    /// Of the packets from `from` to `to`, `per_mille` of a thousand meet `effect`, until `heal`.
    pub fn disturb(&self, from: &Endpoint, to: &Endpoint, per_mille: u32, effect: Effect) -> Result<()> {
        let mut faults = locked(&self.grounds.faults);
        let (port, to) = (from.place()?.port.clone(), to.place()?.blocks.clone());
        faults.push(Fault {
            port,
            to,
            per_mille,
            effect,
        });
        self.put(&faults)
    }

    /// Ends everything that `partition` and `disturb` began.
    pub fn heal(&self) -> Result<()> {
        let mut faults = locked(&self.grounds.faults);
        faults.clear();
        self.put(&faults)
    }

    /// Lets `machine` receive at most this much, or as much as it can.
    pub fn limit_rate(&self, machine: &Endpoint, bits_per_second: Option<u64>) -> Result<()> {
        let port = machine.place()?.port.as_str();
        let done = wires::in_ns(&self.grounds.fabric, async |netlink| match bits_per_second {
            Some(rate) => {
                // A frame with segmentation left to the receiver must fit, or nothing passes.
                let shape = TbfConfig::new()
                    .rate(Rate::bits_per_sec(rate))
                    .burst(Bytes::new(128 << 10))
                    .limit(Bytes::new(1 << 20));
                netlink.replace_qdisc(port, shape).await
            }
            None => netlink.del_qdisc_if_exists(port, TcHandle::ROOT).await.map(drop),
        });
        done.with_context(|| format!("rate of {port}"))
    }

    fn put(&self, faults: &[Fault]) -> Result<()> {
        let ports: std::collections::BTreeSet<&str> = faults.iter().map(|fault| &*fault.port).collect();
        let chains = ports.iter().map(|&port| {
            let ingress = BaseChain::filter(FilterHook::ingress(port), Priority::Custom(0));
            Ok(Chain::new(TABLE, port)?.family(Family::Netdev).base(ingress))
        });
        let chains: Vec<Chain> = chains.collect::<nlink::Result<_>>()?;
        let rules: Vec<Rule> = faults.iter().flat_map(rules).collect();
        let work = async || -> nlink::Result<()> {
            let netlink = Connection::<Nftables>::new()?;
            let mut all = netlink.transaction();
            let there = netlink.list_tables_in(Family::Netdev).await?;
            let stands = there.iter().any(|table| table.name == TABLE);
            if !stands && chains.is_empty() {
                return Ok(());
            }
            if stands {
                all = all.del_table(TABLE, Family::Netdev);
            }
            if !chains.is_empty() {
                all = all.add_table(TABLE, Family::Netdev);
            }
            for chain in chains {
                all = all.add_chain(chain);
            }
            for rule in rules {
                all = all.add_rule(rule);
            }
            all.commit(&netlink).await
        };
        self.grounds
            .fabric
            .run(|| -> Result<()> {
                let runtime = tokio::runtime::Builder::new_current_thread()
                    .enable_all()
                    .build()?;
                Ok(runtime.block_on(work())?)
            })?
            .context("faults of the fabric")
    }
}

impl Endpoint {
    fn place(&self) -> Result<&Place> {
        self.place
            .as_ref()
            .ok_or_else(|| anyhow!("{} is a pod: faults act between nodes and hosts", self.name))
    }
}

fn rules(fault: &Fault) -> impl Iterator<Item = Rule> {
    fault.to.iter().map(|&(address, prefix)| {
        let mut rule = Rule::new(TABLE, &fault.port)
            .family(Family::Netdev)
            .match_daddr(address, prefix);
        if fault.per_mille < 1000 {
            let draw = Generated::Numgen {
                kind: NumgenKind::Random,
                modulus: 1000,
                offset: 0,
            };
            // The number is in host order: only a whole comparison of big-endian bytes orders it.
            rule = rule.generate(draw).expr(Expr::Byteorder {
                sreg: Register::R0,
                dreg: Register::R0,
                op: nlink::netlink::nftables::ByteorderOp::Hton,
                len: 4,
                size: 4,
            });
            let below = fault.per_mille.to_be_bytes().to_vec();
            rule = rule.expr(Expr::Cmp {
                sreg: Register::R0,
                op: CmpOp::Lt,
                data: below,
            });
        }
        match fault.effect {
            Effect::Lost => rule.drop(),
            Effect::Reset => rule.reject_tcp_reset(),
        }
    })
}

impl Endpoint {
    /// `nft flush ruleset`, as root inside this endpoint may do it.
    pub fn flush_rules(&self) -> Result<()> {
        self.inside(|| -> Result<()> {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?;
            Ok(runtime.block_on(async { Connection::<Nftables>::new()?.flush_ruleset().await })?)
        })?
        .with_context(|| format!("flush the rules of {}", self.name))
    }
}
