//! The guard on the host end of a pod's link: what holds when the pod's own rules are gone.
//!
//! ```text
//! pod ──veth──▶ ingress hook: to 15008, resolvers, exclusions, declared plaintext ─▶ on
//!                             any other first SYN ─▶ dropped
//!                             any other segment towards the mesh ─▶ dropped
//! ```
//! Invariant: it is stateless and an allow-list (settled D8). It sees addresses and ports, never marks: a
//! destination is open to the whole pod or to none of it.

use crate::{
    capture::{
        fresh_table,
        rules::{OTHER_TRANSPORTS, first_syn, into_net, to},
    },
    listeners::HBONE_PORT,
    netns::NetlinkError,
};
use ipnet::IpNet;
use nix::libc;
use nlink::{
    Connection, Nftables,
    netlink::nftables::{
        BaseChain, Chain, CmpOp, Expr, Family, Field, FilterHook, Match, PacketField, PayloadBase, Policy,
        Priority, Register, Rule, Set, SetElement, SetKeyType, TcpFlags, Value,
    },
};
use std::{
    collections::{HashSet, VecDeque},
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
};

const CHAIN: &str = "from-pod";
const DECLARED_V4: &str = "declared4";
const DECLARED_V6: &str = "declared6";

/// Destinations that a pod may have declared at once; the oldest makes room.
const MAX_DECLARED: usize = 16384;

/// Ports that clients choose from by default (`net.ipv4.ip_local_port_range`).
const EPHEMERAL: (u16, u16) = (32768, 60999);

/// What a pod's link lets through.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuardRules {
    pub resolvers: Vec<IpAddr>,
    /// Where nothing may go in plaintext; empty while connections from before enrolment have their grace.
    pub mesh_nets: Vec<IpNet>,
    pub node: Vec<IpAddr>,
    pub probe_ports: Vec<u16>,
    pub inbound_ports: Vec<u16>,
    pub outbound_ports: Vec<u16>,
    pub outbound_nets: Vec<IpNet>,
    pub refuse_plaintext: bool,
    pub refuse_other_traffic: bool,
}

/// The rules of the host, of which every guard is a part: a change that was ours is no reason for all
/// guards to be looked at.
pub struct Host {
    nft: Connection<Nftables>,
    own: Arc<Own>,
}

/// Generations of the host's rules that differ only by what guards have changed: first and last.
type Own = Mutex<(u32, u32)>;

impl Host {
    pub fn new() -> Result<Self, NetlinkError> {
        Ok(Self {
            nft: Connection::<Nftables>::new()?,
            own: Arc::default(),
        })
    }

    /// What guards are compared with: asked once, it serves to look at all of them.
    pub async fn generation(&self) -> Result<u32, NetlinkError> {
        Ok(self.nft.generation().await?)
    }
}

/// The guard of one pod.
pub struct Guard {
    nft: Connection<Nftables>,
    own: Arc<Own>,
    table: String,
    device: String,
    rules: GuardRules,
    declared: HashSet<SocketAddr>,
    order: VecDeque<SocketAddr>,
    generation: u32,
    seen: Vec<Vec<u8>>,
    /// Packets dropped by rules that have since been replaced.
    dropped_before: u64,
}

impl Guard {
    /// Hooks on to the link with this index in the agent's own namespace.
    pub async fn stand(host: &Host, ifindex: u32, rules: GuardRules) -> Result<Self, NetlinkError> {
        let device = nix::net::if_::if_indextoname(ifindex).map_err(std::io::Error::from)?;
        let mut guard = Self {
            nft: Connection::<Nftables>::new()?,
            own: host.own.clone(),
            table: format!("culvert-{ifindex}"),
            device: device.to_string_lossy().into_owned(),
            rules,
            declared: HashSet::new(),
            order: VecDeque::new(),
            generation: 0,
            seen: vec![],
            dropped_before: 0,
        };
        guard.write().await?;
        Ok(guard)
    }

    pub fn rules(&self) -> &GuardRules {
        &self.rules
    }

    pub async fn replace(&mut self, rules: GuardRules) -> Result<(), NetlinkError> {
        self.rules = rules;
        self.repair().await
    }

    pub async fn repair(&mut self) -> Result<(), NetlinkError> {
        self.dropped_before = self.dropped().await.unwrap_or(self.dropped_before);
        self.write().await
    }

    /// Opens the link for plaintext to `destination`; it is open when this returns.
    pub async fn declare(&mut self, destination: SocketAddr) -> Result<(), NetlinkError> {
        if !self.declared.insert(destination) {
            return Ok(());
        }
        self.order.push_back(destination);
        let mut batch = self.nft.transaction();
        if self.order.len() > MAX_DECLARED
            && let Some(oldest) = self.order.pop_front()
        {
            self.declared.remove(&oldest);
            batch = batch.del_set_elements(&self.set(oldest.ip()), &[element(oldest)]);
        }
        let added = batch
            .add_set_elements(&self.set(destination.ip()), &[element(destination)])
            .commit(&self.nft)
            .await;
        if let Err(error) = added {
            self.declared.remove(&destination);
            self.order.pop_back();
            return Err(error.into());
        }
        self.changed().await?;
        Ok(())
    }

    /// Packets dropped so far.
    pub async fn dropped(&self) -> Result<u64, NetlinkError> {
        let rules = self.nft.list_rules(&self.table, Family::Netdev).await?;
        let now: u64 = rules.iter().filter_map(|rule| rule.counter()).map(|c| c.0).sum();
        Ok(self.dropped_before + now)
    }

    /// Whether the rules are as they were put in place, at this generation of the host's.
    pub async fn is_intact(&mut self, host: u32) -> Result<bool, NetlinkError> {
        let (first, last) = *self.own.lock().unwrap_or_else(PoisonError::into_inner);
        let own = first..=last;
        let ours = own.contains(&self.generation) && own.contains(&host);
        if host != self.generation && !ours && self.look().await? != self.seen {
            return Ok(false);
        }
        self.generation = host;
        Ok(true)
    }

    /// Takes note of a change that was this guard's.
    async fn changed(&mut self) -> Result<u32, NetlinkError> {
        let now = self.nft.generation().await?;
        let mut own = self.own.lock().unwrap_or_else(PoisonError::into_inner);
        match own.1.checked_add(1) {
            Some(next) if next == now => own.1 = now,
            // Somebody else was here, too.
            _ => *own = (now, now),
        }
        Ok(now)
    }

    pub async fn leave(mut self) -> Result<(), NetlinkError> {
        self.nft
            .del_table_if_exists(self.table.as_str(), Family::Netdev)
            .await?;
        self.changed().await?;
        Ok(())
    }

    async fn write(&mut self) -> Result<(), NetlinkError> {
        let base = BaseChain::filter(FilterHook::ingress(self.device.as_str()), Priority::Filter);
        let chain = Chain::new(self.table.as_str(), CHAIN)?
            .family(Family::Netdev)
            .base(base.policy(Policy::Accept));
        let mut batch = fresh_table(&self.nft, &self.table, Family::Netdev)
            .await?
            .add_chain(chain);
        for any in [IpAddr::from([0; 4]), IpAddr::from([0; 16])] {
            let set = self.set(any);
            let declared = self.order.iter().filter(|d| d.is_ipv4() == any.is_ipv4());
            let elements: Vec<_> = declared.map(|d| element(*d)).collect();
            batch = batch.add_set(set.clone());
            if !elements.is_empty() {
                batch = batch.add_set_elements(&set, &elements);
            }
        }
        for rule in self.all() {
            batch = batch.add_rule(rule.family(Family::Netdev));
        }
        batch.commit(&self.nft).await?;
        self.generation = self.changed().await?;
        self.seen = self.look().await?;
        Ok(())
    }

    /// The rules without their counters, and the chain's link.
    async fn look(&self) -> Result<Vec<Vec<u8>>, NetlinkError> {
        let chains = self
            .nft
            .list_chains_in(self.table.as_str(), Family::Netdev)
            .await?;
        let chains = chains
            .iter()
            .map(|c| format!("{} {:?} {:?} {:?}", c.name, c.hook, c.device, c.devices).into_bytes());
        let rules = self.nft.list_rules(&self.table, Family::Netdev).await?;
        let rules = rules
            .iter()
            .map(|rule| rule.nft_syntax_stateless().unwrap_or_default().into_bytes());
        Ok(chains.chain(rules).collect())
    }

    fn set(&self, ip: IpAddr) -> Set {
        let (name, key) = match ip {
            IpAddr::V4(_) => (DECLARED_V4, SetKeyType::Ipv4Addr),
            IpAddr::V6(_) => (DECLARED_V6, SetKeyType::Ipv6Addr),
        };
        Set::new(&self.table, name)
            .family(Family::Netdev)
            .key_type(SetKeyType::Concat(vec![key, SetKeyType::InetService]))
    }

    fn all(&self) -> Vec<Rule> {
        let chain = || Rule::new(&self.table, CHAIN);
        let mut rules = vec![];
        self.other_protocols(&mut rules, &chain);
        rules.push(chain().match_tcp_dport(HBONE_PORT).accept());
        rules.push(chain().match_tcp_sport(HBONE_PORT).accept());
        for resolver in &self.rules.resolvers {
            rules.push(chain().then(to(*resolver)).match_tcp_dport(53).accept());
        }
        for port in &self.rules.outbound_ports {
            rules.push(chain().match_tcp_dport(*port).accept());
        }
        for net in &self.rules.outbound_nets {
            rules.push(chain().then(into_net(*net)).accept());
        }
        for (field, set) in [
            (PacketField::Ip4Daddr, DECLARED_V4),
            (PacketField::Ip6Daddr, DECLARED_V6),
        ] {
            let fields = [field, PacketField::TcpDport];
            rules.push(chain().match_concat_in_set(&fields, set).accept());
        }
        rules.push(chain().then(first_syn()).counter().drop());
        self.answers(&mut rules, &chain);
        for net in &self.rules.mesh_nets {
            rules.push(chain().then(into_net(*net)).match_l4proto(TCP).counter().drop());
        }
        rules
    }

    fn other_protocols(&self, rules: &mut Vec<Rule>, chain: &dyn Fn() -> Rule) {
        if !self.rules.refuse_other_traffic {
            return;
        }
        for resolver in &self.rules.resolvers {
            rules.push(chain().then(to(*resolver)).match_udp_dport(53).accept());
        }
        for protocol in OTHER_TRANSPORTS {
            rules.push(chain().match_l4proto(protocol).counter().drop());
        }
    }

    /// Segments that can only answer what came in: they open nothing, and carry no more than the pod's
    /// own servers say.
    fn answers(&self, rules: &mut Vec<Rule>, chain: &dyn Fn() -> Rule) {
        for node in &self.rules.node {
            for port in &self.rules.probe_ports {
                rules.push(chain().then(to(*node)).match_tcp_sport(*port).accept());
            }
        }
        for port in &self.rules.inbound_ports {
            rules.push(chain().match_tcp_sport(*port).accept());
        }
        // A handshake's answer and a refusal: without them a caller in plaintext would hang, not be refused.
        let both = u32::from((TcpFlags::SYN | TcpFlags::ACK).bits());
        let answer = Value::Masked {
            value: both.into(),
            mask: both.into(),
        };
        for (flags, options) in [
            (Match::eq(Field::TcpFlags, answer), HANDSHAKE_OPTIONS),
            (Match::eq(Field::TcpFlags, TcpFlags::RST), RESET_OPTIONS),
        ] {
            for empty in without_payload(options) {
                rules.push(empty(chain().then(flags.clone())).accept());
            }
        }
        if !self.rules.refuse_plaintext {
            // A server's port is none that clients are given, so this is no captured connection whose
            // translation was lost: that one has a client's port.
            let (first, last) = EPHEMERAL;
            rules.push(
                chain()
                    .match_range_not(PacketField::TcpSport, first, last)
                    .accept(),
            );
        }
    }
}

const TCP: u8 = libc::IPPROTO_TCP as u8;

/// What Linux puts into a handshake's answer (segment size, scale, SACK, timestamp) and into a reset
/// (timestamp). Where less is there a root's own segments can carry the difference, and no more.
const HANDSHAKE_OPTIONS: u16 = 20;
const RESET_OPTIONS: u16 = 12;

/// The two ways, one for each family, to say of a TCP rule that there is no payload after so many bytes of
/// options.
fn without_payload(options: u16) -> [impl Fn(Rule) -> Rule; 2] {
    let tcp = 20 + options;
    // An IPv4 length counts its own header, an IPv6 length does not.
    let [v4, v6] = [(libc::ETH_P_IP, 2, 20 + tcp), (libc::ETH_P_IPV6, 4, tcp)];
    [v4, v6].map(|(family, offset, most)| {
        move |rule: Rule| {
            let length = Expr::Payload {
                dreg: Register::R0,
                base: PayloadBase::Network,
                offset,
                len: 2,
            };
            let few = Expr::Cmp {
                sreg: Register::R0,
                op: CmpOp::Lte,
                data: most.to_be_bytes().to_vec(),
            };
            rule.then(Match::eq(Field::Protocol, family as u16))
                .expr(length)
                .expr(few)
        }
    })
}

fn element(destination: SocketAddr) -> SetElement {
    let ip = match destination.ip() {
        IpAddr::V4(ip) => SetElement::ipv4(ip),
        IpAddr::V6(ip) => SetElement::ipv6(ip),
    };
    SetElement::concat([ip, SetElement::port(destination.port())])
}

#[cfg(test)]
mod tests;
