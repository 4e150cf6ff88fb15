//! Which rules a pod has.
//!
//! Invariant: this only says what shall be; the order inside a chain matters, and what exempts stands
//! before what takes.

use crate::{
    listeners::{DNS_PORT, HBONE_PORT, INBOUND_PORT, OUTBOUND_PORT},
    marks::{Marks, OURS},
};
use ipnet::IpNet;
use nix::libc;
use nlink::netlink::{
    nftables::{
        BaseChain, Chain, CtState, Family, FibFlags, Field, FilterHook, IcmpxCode, Match, NatHook, Policy,
        Priority, Reject, Rule, Stmt, TcpFlags, Value,
    },
    types::route::RouteType,
};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

pub const TABLE: &str = "culvert";
const MARK_IN: &str = "mark-in";
const MARK_OUT: &str = "mark-out";
const PREROUTING: &str = "prerouting";
const OUTPUT: &str = "output";
const REFUSE: &str = "refuse";

const TCP: u8 = libc::IPPROTO_TCP as u8;

/// What carries applications' bytes beside TCP: UDP, SCTP, DCCP, UDP-Lite, and tunnels of a pod's own (GRE, IP in
/// IP). ICMP is none of it: paths need it.
pub const OTHER_TRANSPORTS: [u8; 7] = [
    libc::IPPROTO_UDP as u8,
    libc::IPPROTO_SCTP as u8,
    libc::IPPROTO_DCCP as u8,
    libc::IPPROTO_UDPLITE as u8,
    libc::IPPROTO_GRE as u8,
    libc::IPPROTO_IPIP as u8,
    libc::IPPROTO_IPV6 as u8,
];

/// Routes answers to a borrowed source address back to ztunnel, which is in the pod too.
pub(super) const BACK: u32 = OURS | 1;

/// Asks the routes as if there were no wall: behind it every IPv6 address would look like the pod's own.
const LOOK: u32 = OURS;

/// What a connection is, for as long as the kernel tracks it: it stays through a flush of all rules.
const CT_CAPTURED: u32 = 0x00c1_e801;
const CT_PASSING: u32 = 0x00c1_e802;

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
    /// Whether [`OTHER_TRANSPORTS`] are refused; otherwise they go out as they are.
    pub refuse_other_traffic: bool,
    /// Connections that were open before enrolment may go on (settled D8's grace).
    pub spare_older: bool,
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
        let mut rules = self.mark_known();
        self.mark_new(&mut rules);
        self.inbound(&mut rules);
        self.outbound(&mut rules);
        self.refuse(&mut rules);
        rules
    }

    /// Takes no new connection, and keeps the translation of those that were taken: without a rule in the
    /// nat chains the kernel would stop translating.
    pub fn draining(&self) -> Vec<Rule> {
        let mut rules = self.mark_known();
        rules.push(self.passing(Rule::new(TABLE, MARK_OUT)));
        for chain in [PREROUTING, OUTPUT] {
            rules.push(
                Rule::new(TABLE, chain)
                    .match_ct_state(CtState::ESTABLISHED)
                    .accept(),
            );
        }
        rules
    }

    /// Connections that have been judged: the kernel routes each of their packets again by its mark.
    fn mark_known(&self) -> Vec<Rule> {
        let Marks { socket, pass, .. } = self.marks;
        let out = || Rule::new(TABLE, MARK_OUT);
        vec![
            Rule::new(TABLE, MARK_IN)
                .match_mark(socket)
                .set_ct_mark(CT_CAPTURED),
            out().match_mark(socket).accept(),
            out().match_l4proto_not(TCP).accept(),
            out().match_ct_mark(CT_CAPTURED).set_mark(BACK).accept(),
            out().match_ct_mark(CT_PASSING).set_mark(pass).accept(),
        ]
    }

    /// What else may leave the pod. The rest gets a mark in any case, also what an application has sent
    /// around the routes with a raw socket: the change makes the kernel route it, and so into the wall.
    fn mark_new(&self, rules: &mut Vec<Rule>) {
        let chain = || Rule::new(TABLE, MARK_OUT);
        let walled = |rule: Rule| rule.set_mark(self.marks.wall).accept();
        for resolver in &self.resolvers {
            rules.push(walled(chain().then(to(*resolver)).match_tcp_dport(53)));
        }
        for port in &self.exclude_outbound_ports {
            rules.push(self.passing(chain().match_tcp_dport(*port)));
        }
        for net in &self.exclude_outbound_nets {
            rules.push(self.passing(chain().then(into_net(*net))));
        }
        rules.push(walled(chain().then(first_syn())));
        // The kernel's own refusals belong to no connection, and carry nothing.
        let reset = TcpFlags::RST;
        rules.push(
            chain()
                .match_tcp_flags(reset, reset)
                .set_mark(self.marks.pass)
                .accept(),
        );
        if self.spare_older {
            rules.push(self.passing(chain()));
        }
        rules.push(walled(chain()));
    }

    /// The connection may leave the pod as it is, from this packet on.
    fn passing(&self, rule: Rule) -> Rule {
        rule.set_ct_mark(CT_PASSING).set_mark(self.marks.pass).accept()
    }

    fn inbound(&self, rules: &mut Vec<Rule>) {
        let chain = || Rule::new(TABLE, PREROUTING);
        let passing = |rule: Rule| rule.set_ct_mark(CT_PASSING).accept();
        rules.push(chain().match_mark(self.marks.socket).accept());
        rules.push(chain().match_iif("lo").accept());
        rules.push(chain().match_tcp_dport(HBONE_PORT).accept());
        for node in &self.node {
            for port in &self.probe_ports {
                rules.push(passing(chain().then(from(*node)).match_tcp_dport(*port)));
            }
        }
        for port in &self.exclude_inbound_ports {
            rules.push(passing(chain().match_tcp_dport(*port)));
        }
        rules.push(redirect(chain(), INBOUND_PORT));
    }

    fn outbound(&self, rules: &mut Vec<Rule>) {
        let chain = || Rule::new(TABLE, OUTPUT);
        self.let_through(rules, &chain);
        for (port, resolver) in (DNS_PORT..).zip(&self.resolvers) {
            let asked = || chain().then(to(*resolver));
            rules.push(asked().match_udp_dport(53).then(Stmt::Redirect(Some(port))));
            let asked = asked().match_tcp_dport(53).set_ct_mark(CT_CAPTURED);
            rules.push(asked.then(Stmt::Redirect(Some(port))));
        }
        rules.push(redirect(chain(), OUTBOUND_PORT));
    }

    fn refuse(&self, rules: &mut Vec<Rule>) {
        let chain = || Rule::new(TABLE, REFUSE);
        rules.push(
            chain()
                .match_ct_state(CtState::ESTABLISHED | CtState::RELATED)
                .accept(),
        );
        for loopback in to_loopback() {
            rules.push(chain().then(loopback).accept());
        }
        self.let_through(rules, &chain);
        for net in &self.exclude_outbound_nets {
            rules.push(chain().then(into_net(*net)).accept());
        }
        rules.push(chain().match_l4proto(TCP).then(Stmt::Reject(Reject::TcpReset)));
        if self.refuse_other_traffic {
            for protocol in OTHER_TRANSPORTS {
                let refused = Stmt::Reject(Reject::Icmpx(IcmpxCode::PortUnreachable));
                rules.push(chain().match_l4proto(protocol).then(refused));
            }
        }
    }

    /// ztunnel's own, what may leave as it is, and what stays inside of the pod.
    fn let_through(&self, rules: &mut Vec<Rule>, chain: &dyn Fn() -> Rule) {
        rules.push(chain().match_mark(self.marks.socket).accept());
        rules.push(chain().match_mark(self.marks.pass).accept());
        rules.push(chain().match_l4proto(TCP).set_mark(LOOK));
        let flags = FibFlags::DADDR | FibFlags::MARK;
        rules.push(chain().match_fib_type(flags, RouteType::Local).accept());
    }
}

/// Takes a new connection to one of ztunnel's ports.
fn redirect(rule: Rule, port: u16) -> Rule {
    rule.then(first_syn())
        .set_ct_mark(CT_CAPTURED)
        .then(Stmt::Redirect(Some(port)))
}
