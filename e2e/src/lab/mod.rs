//! The lab: nodes, pods and hosts of a small network, as network namespaces of this machine.
//!
//! ```text
//!   pod ──eth0╌╌p2── node a ──fab0╌╌┐                   ┌╌╌fab0── node b ──p2╌╌eth0── pod
//!        10.1.0.2          172.31.0.1│     fabric       │172.31.0.2         10.2.0.2
//!        fd00:10:1::2                ├── bridge br0 ────┤
//!   host (control, strangers) ──fab0╌┘  172.31.255.254  └╌╌ outside: 203.0.113.n, routed
//! ```
//! Invariant: a lab is self-contained. Its processes, mounts and namespaces are its own, nothing in it
//! reaches the machine's network, and the end of the process that made it ends it (`namespaces`).

pub mod capture;
mod endpoint;
mod faults;
mod limits;
pub mod memory;
mod namespaces;
mod process;
mod wires;

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;

use anyhow::{Context, Result, ensure};

pub use endpoint::{DEFAULT_WAIT, Endpoint};
pub use faults::Effect;
use faults::{Fault, Place};
pub use limits::Limits;
pub use namespaces::NetNs;
use namespaces::{FirstProcess, require_root};
pub use process::{Process, Start, poll_until, tail};
pub use wires::{Addresses, ENDPOINT_LINK, GATEWAY};
use wires::{Block, Role};

/// The link of nodes and fabric hosts towards the bridge.
const FABRIC_LINK: &str = "fab0";

/// Links between nodes: 172.31.0.n are nodes, 172.31.1.n hosts.
const FABRIC: Block = Block {
    v4: (Ipv4Addr::new(172, 31, 0, 0), 16),
    v6: (Ipv6Addr::new(0xfd00, 0x31, 0, 0, 0, 0, 0, 0), 64),
};
const FABRIC_ROUTER: Addresses = Addresses {
    v4: Ipv4Addr::new(172, 31, 255, 254),
    v6: Ipv6Addr::new(0xfd00, 0x31, 0, 0, 0, 0, 0, 0xffff),
};

/// Every address that a pod of any node can have.
pub const POD_RANGES: [&str; 2] = ["10.0.0.0/10", "fd00:10::/32"];
/// Where services have their virtual addresses; nothing in the lab routes them.
pub const SERVICE_RANGES: [&str; 2] = ["10.96.0.0/16", "fd00:96::/108"];

/// Most nodes of a lab: pod blocks are 10.n.0.0/16 inside `POD_RANGES`.
const MAX_NODES: u16 = 60;

/// A lab. Dropped, everything in it is gone.
#[derive(Debug)]
pub struct Lab {
    grounds: Arc<Grounds>,
}

/// What every part of a lab shares.
#[derive(Debug)]
struct Grounds {
    first: FirstProcess,
    fabric: NetNs,
    nodes: Mutex<Vec<Endpoint>>,
    hosts: AtomicU16,
    outside: AtomicU16,
    uids: AtomicU64,
    logs: Mutex<Vec<PathBuf>>,
    faults: Mutex<Vec<Fault>>,
    dns: OnceLock<Dns>,
}

impl Lab {
    /// An empty lab: a fabric with no node. Fails in one line when this process may not make one.
    pub fn new() -> Result<Self> {
        require_root()?;
        process::raise_nofile()?;
        let first = FirstProcess::start()?;
        fs::create_dir_all(first.path("/run/log"))?;
        let fabric = NetNs::fresh()?;
        wires::prepare(&fabric, Role::Router)?;
        wires::bridge(&fabric, FABRIC_ROUTER, FABRIC)?;
        let grounds = Grounds {
            first,
            fabric,
            nodes: Mutex::default(),
            hosts: AtomicU16::new(0),
            outside: AtomicU16::new(0),
            uids: AtomicU64::new(0),
            logs: Mutex::default(),
            faults: Mutex::default(),
            dns: OnceLock::new(),
        };
        Ok(Self {
            grounds: Arc::new(grounds),
        })
    }

    /// A new node, joined to the fabric and routed to every node there is.
    pub fn node(&self, name: &str) -> Result<Node> {
        let mut nodes = locked(&self.grounds.nodes);
        let number = u16::try_from(nodes.len() + 1)?;
        ensure!(number <= MAX_NODES, "a lab has at most {MAX_NODES} nodes");
        let addresses = Addresses {
            v4: Ipv4Addr::new(172, 31, 0, number as u8),
            v6: Ipv6Addr::new(0xfd00, 0x31, 0, 0, 0, 0, 0, number),
        };
        let ns = NetNs::fresh()?;
        wires::prepare(&ns, Role::Router)?;
        wires::join(
            &ns,
            FABRIC_LINK,
            addresses,
            FABRIC,
            &self.grounds.fabric,
            &node_port(number),
        )?;
        wires::route_via(&ns, None, FABRIC_ROUTER)?;
        wires::route_via(&self.grounds.fabric, Some(pod_block(number)), addresses)?;
        for (other, there) in (1..).zip(nodes.iter()) {
            wires::route_via(&ns, Some(pod_block(other)), there.addresses)?;
            wires::route_via(&there.ns, Some(pod_block(number)), addresses)?;
        }
        let endpoint = self.machine(
            name,
            ns,
            addresses,
            FABRIC_LINK,
            node_port(number),
            Some(pod_block(number)),
        );
        nodes.push(endpoint.clone());
        Ok(Node {
            endpoint,
            number,
            pods: Arc::new(AtomicU16::new(1)),
        })
    }

    /// A machine on the fabric that is no node: the control plane's, or a stranger's.
    pub fn host(&self, name: &str) -> Result<Endpoint> {
        let number = self.grounds.hosts.fetch_add(1, Ordering::Relaxed) + 1;
        let addresses = Addresses {
            v4: Ipv4Addr::new(172, 31, 1, u8::try_from(number)?),
            v6: Ipv6Addr::new(0xfd00, 0x31, 0, 0, 0, 0, 1, number),
        };
        let ns = NetNs::fresh()?;
        wires::prepare(&ns, Role::Endpoint)?;
        let port = format!("h{number}");
        wires::join(&ns, FABRIC_LINK, addresses, FABRIC, &self.grounds.fabric, &port)?;
        wires::route_via(&ns, None, FABRIC_ROUTER)?;
        Ok(self.machine(name, ns, addresses, FABRIC_LINK, port, None))
    }

    /// Pods made from here on ask `servers`, and search as in a cluster called `cluster_domain`.
    pub fn resolve_by(&self, servers: &[IpAddr], cluster_domain: &str) -> Result<()> {
        let dns = Dns {
            servers: servers.to_vec(),
            cluster_domain: cluster_domain.to_owned(),
        };
        ensure!(
            self.grounds.dns.set(dns).is_ok(),
            "the lab has a resolver already"
        );
        Ok(())
    }

    /// A machine outside of every range of the mesh.
    pub fn outside(&self, name: &str) -> Result<Endpoint> {
        let last = self.grounds.outside.load(Ordering::Relaxed) + 1;
        self.outside_at(name, Ipv4Addr::new(203, 0, 113, u8::try_from(last)?))
    }

    /// A machine outside of every range of the mesh, at an IPv4 address of the caller's choice.
    pub fn outside_at(&self, name: &str, v4: Ipv4Addr) -> Result<Endpoint> {
        let number = self.grounds.outside.fetch_add(1, Ordering::Relaxed) + 1;
        let addresses = Addresses {
            v4,
            v6: Ipv6Addr::new(0x2001, 0xdb8, 0x113, 0, 0, 0, 0, number),
        };
        let ns = NetNs::fresh()?;
        wires::prepare(&ns, Role::Endpoint)?;
        let port = format!("o{number}");
        wires::route_to_endpoint(&self.grounds.fabric, &port, FABRIC_ROUTER, &ns, addresses)?;
        Ok(self.machine(name, ns, addresses, ENDPOINT_LINK, port, None))
    }

    /// Where this process sees a file of the lab; inside it is `inside`.
    pub fn path(&self, inside: &str) -> PathBuf {
        self.grounds.first.path(inside)
    }

    /// The files that processes of this lab have written their output to, those of ended ones included.
    pub fn logs(&self) -> Vec<PathBuf> {
        locked(&self.grounds.logs).clone()
    }

    /// The first process: its end ends the lab.
    pub fn first_pid(&self) -> u32 {
        self.grounds.first.pid()
    }

    /// A machine on `port` of the fabric, with what is behind it.
    fn machine(
        &self,
        name: &str,
        ns: NetNs,
        addresses: Addresses,
        link: &'static str,
        port: String,
        behind: Option<Block>,
    ) -> Endpoint {
        let mut blocks = vec![(addresses.v4.into(), 32), (addresses.v6.into(), 128)];
        if let Some(Block { v4, v6 }) = behind {
            blocks.extend([(v4.0.into(), v4.1), (v6.0.into(), v6.1)]);
        }
        Endpoint {
            grounds: self.grounds.clone(),
            name: name.to_owned(),
            ns: Arc::new(ns),
            addresses,
            link,
            place: Some(Place { port, blocks }),
            resolv_conf: None,
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if thread::panicking() {
            for log in locked(&self.grounds.logs).iter() {
                let name = log.file_name().unwrap_or_default().to_string_lossy();
                eprintln!(
                    "---- last lines of {name}\n{}",
                    tail(&process::read_lossy(log), 25)
                );
            }
        }
    }
}

impl Grounds {
    /// A new file for the output of a process called `name`.
    fn log(&self, name: &str) -> Result<PathBuf> {
        let mut logs = locked(&self.logs);
        let path = self.first.path(format!("/run/log/{name}.{}.log", logs.len()));
        logs.push(path.clone());
        Ok(path)
    }
}

/// A node: a namespace that forwards between the fabric and its pods.
#[derive(Debug, Clone)]
pub struct Node {
    endpoint: Endpoint,
    number: u16,
    pods: Arc<AtomicU16>,
}

impl Deref for Node {
    type Target = Endpoint;

    fn deref(&self) -> &Endpoint {
        &self.endpoint
    }
}

impl Node {
    /// A new pod, with the next addresses of this node's block.
    pub fn pod(&self, spec: PodSpec) -> Result<Pod> {
        let number = self.pods.fetch_add(1, Ordering::Relaxed) + 1;
        let [high, low] = number.to_be_bytes();
        let (v4, v6) = (
            pod_block(self.number).v4.0.octets(),
            pod_block(self.number).v6.0.segments(),
        );
        let addresses = Addresses {
            v4: Ipv4Addr::new(v4[0], v4[1], high, low),
            v6: Ipv6Addr::new(v6[0], v6[1], v6[2], 0, 0, 0, 0, number),
        };
        self.pod_at(spec, addresses)
    }

    /// A new pod with addresses of this node's block that no other pod has now.
    pub fn pod_at(&self, spec: PodSpec, addresses: Addresses) -> Result<Pod> {
        let grounds = &self.endpoint.grounds;
        let serial = grounds.uids.fetch_add(1, Ordering::Relaxed) + 1;
        let uid = format!("{serial:08x}-c01d-4000-8000-{serial:012x}");
        let ns = NetNs::fresh()?;
        wires::prepare(&ns, Role::Endpoint)?;
        let host_link = format!("p{serial}");
        let host_ifindex = wires::route_to_endpoint(
            &self.endpoint.ns,
            &host_link,
            self.endpoint.addresses,
            &ns,
            addresses,
        )
        .with_context(|| format!("pod {}/{}", spec.namespace, spec.name))?;
        let endpoint = Endpoint {
            grounds: grounds.clone(),
            name: format!("{}/{}", spec.namespace, spec.name),
            ns: Arc::new(ns),
            addresses,
            link: ENDPOINT_LINK,
            place: None,
            resolv_conf: self.resolv_conf(&spec.namespace, &uid)?,
        };
        Ok(Pod {
            endpoint,
            node: self.clone(),
            spec,
            uid,
            host_link,
            host_ifindex,
        })
    }
}

impl Node {
    /// A pod's resolver configuration, as kubelet writes it.
    fn resolv_conf(&self, namespace: &str, uid: &str) -> Result<Option<PathBuf>> {
        let grounds = &self.endpoint.grounds;
        let Some(dns) = grounds.dns.get() else {
            return Ok(None);
        };
        let domain = &dns.cluster_domain;
        let mut text = format!("search {namespace}.svc.{domain} svc.{domain} {domain}\noptions ndots:5\n");
        for server in &dns.servers {
            text.push_str(&format!("nameserver {server}\n"));
        }
        let path = Path::new("/run/resolv").join(uid);
        fs::create_dir_all(grounds.first.path("/run/resolv"))?;
        fs::write(grounds.first.path(&path), text)?;
        Ok(Some(path))
    }
}

/// The resolver that pods are given.
#[derive(Debug)]
struct Dns {
    servers: Vec<IpAddr>,
    cluster_domain: String,
}

/// What a pod says of itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PodSpec {
    pub namespace: String,
    pub name: String,
    pub service_account: String,
    pub labels: Vec<(String, String)>,
    pub annotations: Vec<(String, String)>,
    /// Ports that its containers declare, by name.
    pub ports: Vec<(String, u16)>,
    /// Ports that the node's probes ask.
    pub probes: Vec<u16>,
}

impl PodSpec {
    /// `namespace/name`, with a service account and a label `app` of the same name.
    pub fn new(namespace: &str, name: &str) -> Self {
        Self {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            service_account: name.to_owned(),
            labels: vec![("app".to_owned(), name.to_owned())],
            ..Self::default()
        }
    }

    pub fn service_account(mut self, name: &str) -> Self {
        name.clone_into(&mut self.service_account);
        self
    }

    pub fn label(mut self, name: &str, value: &str) -> Self {
        self.labels.retain(|(label, _)| label != name);
        self.labels.push((name.to_owned(), value.to_owned()));
        self
    }

    pub fn annotation(mut self, name: &str, value: &str) -> Self {
        self.annotations.push((name.to_owned(), value.to_owned()));
        self
    }

    pub fn port(mut self, name: &str, port: u16) -> Self {
        self.ports.push((name.to_owned(), port));
        self
    }

    pub fn probe(mut self, port: u16) -> Self {
        self.probes.push(port);
        self
    }
}

/// A pod: a namespace with one link, whose other end is in its node.
#[derive(Debug, Clone)]
pub struct Pod {
    endpoint: Endpoint,
    node: Node,
    spec: PodSpec,
    uid: String,
    host_link: String,
    host_ifindex: u32,
}

impl Deref for Pod {
    type Target = Endpoint;

    fn deref(&self) -> &Endpoint {
        &self.endpoint
    }
}

impl Pod {
    pub fn uid(&self) -> &str {
        &self.uid
    }

    pub fn spec(&self) -> &PodSpec {
        &self.spec
    }

    pub fn node(&self) -> &Node {
        &self.node
    }

    /// The index, in the node's namespace, of the host end of its link.
    pub fn host_ifindex(&self) -> u32 {
        self.host_ifindex
    }

    pub fn host_link(&self) -> &str {
        &self.host_link
    }

    /// Takes the pod off the network; its addresses are free when this returns.
    pub fn unplug(&self) -> Result<()> {
        wires::cut(&self.node.endpoint.ns, &self.host_link)
    }
}

fn pod_block(node: u16) -> Block {
    Block {
        v4: (Ipv4Addr::new(10, node as u8, 0, 0), 16),
        v6: (Ipv6Addr::new(0xfd00, 0x10, node, 0, 0, 0, 0, 0), 64),
    }
}

/// The fabric's end of a node's link.
fn node_port(node: u16) -> String {
    format!("n{node}")
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
