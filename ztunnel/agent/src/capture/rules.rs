//! Which rules a pod has.
//!
//! Invariant: this only says what shall be; the order inside a chain matters, and what exempts stands
//! before what takes.

use crate::listeners::{DNS_PORT, HBONE_PORT, INBOUND_PORT, OUTBOUND_PORT};
use ipnet::IpNet;
use nlink::netlink::nftables::{
    BaseChain, Chain, CtState, Family, Field, FilterHook, IcmpxCode, Match, NatHook, Policy, Priority,
    Reject, Rule, Stmt, TcpFlags, Value,
};
use serde::{Deserialize, Serialize};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

pub const TABLE: &str = "culvert";
const MARK_IN: &str = "mark-in";
const MARK_OUT: &str = "mark-out";
const PREROUTING: &str = "prerouting";
const OUTPUT: &str = "output";
const REFUSE: &str = "refuse";

/// The two marks of a pod, random and different from zero and each other.
///
/// `socket` is on ztunnel's sockets and exempts them from capture; `reply` is on connections to the
/// application from a borrowed address, and routes their answers back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Marks {
    pub socket: u32,
    pub reply: u32,
}

impl Marks {
    pub fn random() -> Self {
        let socket = rand::random::<u32>() | 0x8000_0000;
        Self {
            socket,
            reply: socket ^ 1,
        }
    }
}

/// What the rules of a pod depend on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rules {
    pub marks: Marks,
    pub resolvers: Vec<IpAddr>,
    /// Addresses of the node, from which probes come.
    pub node: Vec<IpAddr>,
    pub probe_ports: Vec<u16>,
    pub exclude_inbound_ports: Vec<u16>,
    pub exclude_outbound_ports: Vec<u16>,
    pub exclude_outbound_nets: Vec<IpNet>,
    pub refuse_other_traffic: bool,
}

pub fn chains() -> nlink::Result<Vec<Chain>> {
    let base = |name, base| Ok::<_, nlink::Error>(Chain::new(TABLE, name)?.family(Family::Inet).base(base));
    Ok(vec![
        base(
            MARK_IN,
            BaseChain::filter(FilterHook::Prerouting, Priority::Mangle).policy(Policy::Accept),
        )?,
        base(
            MARK_OUT,
            BaseChain::route(Priority::Mangle).policy(Policy::Accept),
        )?,
        base(
            PREROUTING,
            BaseChain::nat(NatHook::Prerouting, Priority::DstNat).policy(Policy::Accept),
        )?,
        base(
            OUTPUT,
            BaseChain::nat(NatHook::Output, Priority::Custom(-100)).policy(Policy::Accept),
        )?,
        base(
            REFUSE,
            BaseChain::filter(FilterHook::Output, Priority::Filter).policy(Policy::Accept),
        )?,
    ])
}

/// A connection's first segment.
pub(crate) fn first_syn() -> Match {
    let looked_at = TcpFlags::FIN | TcpFlags::SYN | TcpFlags::RST | TcpFlags::ACK;
    Match::eq(
        Field::TcpFlags,
        Value::Masked {
            value: TcpFlags::SYN.bits().into(),
            mask: looked_at.bits().into(),
        },
    )
}

pub(crate) fn to(ip: IpAddr) -> Match {
    Match::eq(
        if ip.is_ipv4() {
            Field::Ip4Daddr
        } else {
            Field::Ip6Daddr
        },
        ip,
    )
}

pub(crate) fn from(ip: IpAddr) -> Match {
    Match::eq(
        if ip.is_ipv4() {
            Field::Ip4Saddr
        } else {
            Field::Ip6Saddr
        },
        ip,
    )
}

pub(crate) fn into_net(net: IpNet) -> Match {
    let field = if net.addr().is_ipv4() {
        Field::Ip4Daddr
    } else {
        Field::Ip6Daddr
    };
    Match::eq(field, Value::Prefix(net.network(), net.prefix_len()))
}

/// Redirected connections end at the pod's own loopback.
fn to_loopback() -> [Match; 2] {
    [
        Match::eq(
            Field::Ip4Daddr,
            Value::Prefix(Ipv4Addr::new(127, 0, 0, 0).into(), 8),
        ),
        Match::eq(Field::Ip6Daddr, IpAddr::V6(Ipv6Addr::LOCALHOST)),
    ]
}

impl Rules {
    /// Takes the pod's new connections.
    pub fn capturing(&self) -> Vec<Rule> {
        let mut rules = vec![];
        self.mark(&mut rules);
        self.inbound(&mut rules);
        self.outbound(&mut rules);
        self.refuse(&mut rules);
        rules
    }

    /// Takes no new connection, and keeps the translation of those that were taken: without a rule in the
    /// nat chains the kernel would stop translating, and their next segment would leave in plaintext.
    pub fn draining(&self) -> Vec<Rule> {
        let mut rules = vec![];
        self.mark(&mut rules);
        for chain in [PREROUTING, OUTPUT] {
            rules.push(
                Rule::new(TABLE, chain)
                    .match_ct_state(CtState::ESTABLISHED)
                    .accept(),
            );
        }
        rules
    }

    fn mark(&self, rules: &mut Vec<Rule>) {
        let Marks { socket, reply } = self.marks;
        rules.push(
            Rule::new(TABLE, MARK_IN)
                .match_mark(socket)
                .then(Stmt::SetCtMark(reply)),
        );
        rules.push(
            Rule::new(TABLE, MARK_OUT)
                .then(Match::eq(Field::CtMark, reply))
                .then(Stmt::SetMark(reply)),
        );
    }

    fn inbound(&self, rules: &mut Vec<Rule>) {
        let chain = || Rule::new(TABLE, PREROUTING);
        rules.push(chain().match_mark(self.marks.socket).accept());
        rules.push(chain().match_iif("lo").accept());
        rules.push(chain().match_tcp_dport(HBONE_PORT).accept());
        for node in &self.node {
            for port in &self.probe_ports {
                rules.push(chain().then(from(*node)).match_tcp_dport(*port).accept());
            }
        }
        for port in &self.exclude_inbound_ports {
            rules.push(chain().match_tcp_dport(*port).accept());
        }
        rules.push(chain().then(first_syn()).then(Stmt::Redirect(Some(INBOUND_PORT))));
    }

    fn outbound(&self, rules: &mut Vec<Rule>) {
        let chain = || Rule::new(TABLE, OUTPUT);
        rules.push(chain().match_mark(self.marks.socket).accept());
        rules.push(chain().match_oif("lo").accept());
        for (port, resolver) in (DNS_PORT..).zip(&self.resolvers) {
            rules.push(
                chain()
                    .then(to(*resolver))
                    .match_udp_dport(53)
                    .then(Stmt::Redirect(Some(port))),
            );
            rules.push(
                chain()
                    .then(to(*resolver))
                    .match_tcp_dport(53)
                    .then(Stmt::Redirect(Some(port))),
            );
        }
        self.exclusions(rules, &chain);
        rules.push(
            chain()
                .then(first_syn())
                .then(Stmt::Redirect(Some(OUTBOUND_PORT))),
        );
    }

    fn exclusions(&self, rules: &mut Vec<Rule>, chain: &dyn Fn() -> Rule) {
        for port in &self.exclude_outbound_ports {
            rules.push(chain().match_tcp_dport(*port).accept());
        }
        for net in &self.exclude_outbound_nets {
            rules.push(chain().then(into_net(*net)).accept());
        }
    }

    fn refuse(&self, rules: &mut Vec<Rule>) {
        let chain = || Rule::new(TABLE, REFUSE);
        rules.push(chain().match_mark(self.marks.socket).accept());
        rules.push(chain().match_oif("lo").accept());
        for loopback in to_loopback() {
            rules.push(chain().then(loopback).accept());
        }
        rules.push(
            chain()
                .match_ct_state(CtState::ESTABLISHED | CtState::RELATED)
                .accept(),
        );
        self.exclusions(rules, &chain);
        rules.push(chain().then(first_syn()).then(Stmt::Reject(Reject::TcpReset)));
        if self.refuse_other_traffic {
            for protocol in [nix::libc::IPPROTO_UDP, nix::libc::IPPROTO_SCTP] {
                // Protocol numbers are small and positive.
                let number = u8::try_from(protocol).unwrap_or_default();
                rules.push(
                    chain()
                        .then(Match::eq(Field::L4Proto, number))
                        .then(Stmt::Reject(Reject::Icmpx(IcmpxCode::PortUnreachable))),
                );
            }
        }
    }
}
