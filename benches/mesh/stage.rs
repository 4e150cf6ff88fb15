//! What is measured: the same two nodes with and without the mesh between client and server.
//!
//! ```text
//! raw    plain/near ─────────────────────────────────▶ plain/far
//! relay  plain/near ──▶ plain/relay-a ──▶ plain/relay-b ──▶ plain/far
//! mesh   shop/web ──▶ ztunnel a ═══ HBONE ═══ ztunnel b ──▶ shop/cart
//! ```
//! Invariant: every path crosses the same veth pairs and bridge, from node a to node b.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result};
use culvert_e2e::lab::{Pod, PodSpec, poll_until};
use culvert_e2e::mesh::{Mesh, MeshNode, Options, config};

use crate::calibrate::Relay;
use crate::cost::{cpu_of, memory_of};
use crate::serve::{self, Answer};

pub const COUNT_PORT: u16 = 7001;
pub const PAGE_PORT: u16 = 8080;
pub const ECHO_PORT: u16 = 7000;
const PORTS: [(u16, Answer); 3] = [
    (COUNT_PORT, Answer::Count),
    (PAGE_PORT, Answer::Page),
    (ECHO_PORT, Answer::Echo),
];

/// How long the pods may take until they are published.
const PUBLISHED_WITHIN: Duration = Duration::from_secs(20);

pub struct Stage {
    near: Pod,
    far: Pod,
    web: Pod,
    vip: IpAddr,
    relays: [Relay; 2],
    pub a: MeshNode,
    pub b: MeshNode,
    // Last, so that what lives in it ends first.
    _mesh: Mesh,
}

/// One way from a client to a server.
#[derive(Clone, Copy)]
pub struct Path<'s> {
    pub client: &'s Pod,
    server: IpAddr,
}

impl Path<'_> {
    pub fn to(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.server, port)
    }
}

impl Stage {
    pub fn set() -> Result<Self> {
        let mesh = Mesh::start(Options::default())?;
        let (a, b) = (mesh.node("a")?, mesh.node("b")?);
        mesh.namespace("shop")?;
        mesh.apply_object(&config::namespace("plain", &[]))?;
        let ports: Vec<_> = PORTS
            .iter()
            .map(|(port, _)| (format!("p{port}"), *port))
            .collect();
        let ports: Vec<_> = ports.iter().map(|(name, port)| (&**name, *port, *port)).collect();
        let vip = mesh.service("shop", "cart", &ports)?.v4;
        let web = mesh.pod(&a, PodSpec::new("shop", "web"))?;
        let cart = mesh.pod(&b, PodSpec::new("shop", "cart"))?;
        let near = mesh.pod(&a, PodSpec::new("plain", "near"))?;
        let far = mesh.pod(&b, PodSpec::new("plain", "far"))?;
        let relay_b = mesh.pod(&b, PodSpec::new("plain", "relay-b"))?;
        let relay_a = mesh.pod(&a, PodSpec::new("plain", "relay-a"))?;
        for client in [&near, &web, &relay_a, &relay_b] {
            // Clients and relays are no part of what is measured: they shall not run out of ports.
            client.sysctl("ipv4/ip_local_port_range", "1024 65535")?;
            client.sysctl("ipv4/tcp_tw_reuse", "1")?;
        }
        for server in [&far, &cart] {
            for (port, answer) in PORTS {
                serve::start(server, port, answer)?;
            }
        }
        let ports = PORTS.map(|(port, _)| port);
        let relays = [
            Relay::start(&relay_a, relay_b.addresses().v4.into(), &ports)?,
            Relay::start(&relay_b, far.addresses().v4.into(), &ports)?,
        ];
        let to = SocketAddr::new(vip.into(), ECHO_PORT);
        poll_until("cart is published", PUBLISHED_WITHIN, || {
            Ok(crate::loads::idle(&web, to, 1).ok())
        })?;
        Ok(Self {
            near,
            far,
            web,
            vip: vip.into(),
            relays,
            a,
            b,
            _mesh: mesh,
        })
    }

    pub fn raw(&self) -> Path<'_> {
        Path {
            client: &self.near,
            server: self.far.addresses().v4.into(),
        }
    }

    pub fn relay(&self) -> Path<'_> {
        Path {
            client: &self.near,
            server: self.relays[0].address,
        }
    }

    pub fn mesh(&self) -> Path<'_> {
        Path {
            client: &self.web,
            server: self.vip,
        }
    }

    /// CPU time so far of both ztunnels and both agents.
    pub fn cpu(&self) -> Result<Duration> {
        self.of_all(cpu_of)
    }

    /// CPU time so far of both agents alone.
    pub fn agents_cpu(&self) -> Result<Duration> {
        [&self.a, &self.b]
            .iter()
            .map(|node| node.with_agent(|agent| cpu_of(agent.pid()))?)
            .sum()
    }

    /// Resident memory of both ztunnels and both agents.
    pub fn memory(&self) -> Result<u64> {
        self.of_all(memory_of)
    }

    /// CPU time so far of both relays.
    pub fn relay_cpu(&self) -> Result<Duration> {
        self.relays.iter().map(Relay::cpu).sum()
    }

    fn of_all<T: std::iter::Sum>(&self, of: fn(u32) -> Result<T>) -> Result<T> {
        let mut all = Vec::new();
        for node in [&self.a, &self.b] {
            all.push(node.with_ztunnel(|ztunnel| of(ztunnel.pid()))?);
            all.push(node.with_agent(|agent| of(agent.pid()))?);
        }
        all.into_iter().sum::<Result<T>>().context("the cost of the mesh")
    }
}
