//! The four oracles, over a steady load: what every fault and abuse is judged by.
//!
//! ```text
//! Steady::start ─▶ two tenants, 20 pairs: attempts, byte-exact streams, idle sockets, intruders
//!      │ fault; `cut` or `outage` around what may cost connections
//! verdict ─▶ O3 comes back (while the load still runs) ─▶ stop ─▶ O1 nothing lost
//!                                      O2 nobody let in, no canary anywhere ─▶ O4 told
//! ```
//! Invariant: an oracle forgives only what the test has named: a connection that was open during a `cut`
//! may be reset, one under way during an `outage` may fail. Bytes that differ and a refused caller that is
//! heard are never forgiven.

mod footprint;
pub mod records;
mod steady;

use std::fs;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use serde_json::json;
use tokio::io::AsyncReadExt;
use tokio::sync::watch;

use crate::lab::capture::Capture;
use crate::lab::{Addresses, Pod, PodSpec, poll_until};
use crate::load::percentile;
use crate::mesh::{Mesh, MeshNode};
use crate::traffic::Server;
use footprint::Footprint;
use records::{Record, records};
use steady::{Client, Pair, Tally};

pub use crate::load::{Attempt, Failure};
pub use steady::{Intrusion, StreamEnd};

/// In every message of the load, and nowhere else: whoever sees it has seen plaintext.
pub const CANARY: &str = "canary-steady-5d0c61f7e9";

/// The tenants of the load.
const TENANTS: [&str; 2] = ["north", "south"];
/// Where servers echo, and the port of their service.
const ECHO: u16 = 8080;
const SERVICE: u16 = 80;
/// Where a server listens that nobody may reach.
const VAULT: u16 = 9999;
/// The policy that guards it.
const VAULT_RULE: &str = "no-vault";

/// How long an attempt of the load may take, unless the test says otherwise.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long until everything is back at its baseline (O3).
const BACK_WITHIN: Duration = Duration::from_secs(60);
/// How long the start may take: certificates for eight identities, on a loaded machine.
const START_WITHIN: Duration = Duration::from_secs(30);
/// How much later than its reset a refusal may be on record.
const RECORD_FOLLOWS: Duration = Duration::from_millis(500);
/// A killed process may take the last lines of its log with it.
const LOST_LINES: Duration = Duration::from_secs(1);

/// The steady load of the fault catalogue, at L4: running.
#[derive(Debug)]
pub struct Steady<'m> {
    mesh: &'m Mesh,
    nodes: [&'m MeshNode; 2],
    stop: watch::Sender<bool>,
    clients: Vec<JoinHandle<Result<Tally>>>,
    _servers: Vec<Server>,
    vault: Vault,
    links: Vec<(String, Capture)>,
    baseline: Vec<Footprint>,
    forgiven: Mutex<Vec<Forgiven>>,
}

/// What the servers that nobody may reach have heard.
#[derive(Debug, Default)]
struct Vault {
    servers: Vec<Server>,
    bytes: Arc<AtomicU64>,
}

/// An interval in which the test broke something.
#[derive(Debug, Clone, Copy)]
struct Forgiven {
    from: Instant,
    until: Instant,
    /// Whether any failure is forgiven, or resets alone.
    any: bool,
}

/// What the load has done and seen, judged good.
#[derive(Debug)]
pub struct Account {
    pub attempts: Vec<Attempt>,
    pub streams: Vec<StreamEnd>,
    pub intrusions: Vec<Intrusion>,
    /// Attempts and streams that failed within what the test had named.
    pub forgiven: usize,
}

impl Account {
    /// The time that `percent` of a hundred attempts did not exceed.
    pub fn percentile(&self, percent: usize) -> Duration {
        percentile(&self.attempts, percent)
    }
}

impl<'m> Steady<'m> {
    /// Brings up two tenants on both nodes and starts the load; returns once every pair has spoken, and the
    /// baseline has been taken.
    pub fn start(mesh: &'m Mesh, nodes: [&'m MeshNode; 2]) -> Result<Self> {
        Self::start_with(mesh, nodes, PATIENCE)
    }

    /// As `start`, with more patience: for faults that hold connections up for longer.
    pub fn start_with(mesh: &'m Mesh, nodes: [&'m MeshNode; 2], patience: Duration) -> Result<Self> {
        let tenants = TENANTS
            .iter()
            .map(|tenant| Tenant::settle(mesh, nodes, tenant))
            .collect::<Result<Vec<_>>>()?;
        let mut vault = Vault::default();
        let mut servers = Vec::new();
        for pod in tenants.iter().flat_map(|tenant| &tenant.servers) {
            servers.push(Server::echo(pod.listen(ECHO)?)?);
            vault.guard(pod)?;
        }
        for tenant in &tenants {
            tenant.published(nodes)?;
        }
        let links = nodes
            .iter()
            .map(|node| Ok((node.name().to_owned(), node.node().capture(&[CANARY.as_bytes()])?)))
            .collect::<Result<Vec<_>>>()?;
        let (stop, stopped) = watch::channel(false);
        let (ready, up) = std::sync::mpsc::channel();
        let mut clients = Vec::new();
        let mut expected = 0;
        for (tenant, other) in [(&tenants[0], &tenants[1]), (&tenants[1], &tenants[0])] {
            for (number, pod) in tenant.clients.iter().enumerate() {
                let client = tenant.client(pod, number, other, patience);
                expected += 2 * client.pairs.len();
                let (ready, stopped) = (ready.clone(), stopped.clone());
                clients.push(pod.spawn_inside("steady load", move || client.run(&ready, stopped))?);
            }
        }
        let deadline = Instant::now() + START_WITHIN;
        for number in 0..expected {
            up.recv_timeout(deadline.saturating_duration_since(Instant::now()))
                .with_context(|| {
                    format!("{number} of {expected} streams of the load are up in {START_WITHIN:?}")
                })?;
        }
        // A second of everything: what grows once has grown.
        std::thread::sleep(Duration::from_secs(1));
        Ok(Self {
            mesh,
            nodes,
            stop,
            clients,
            _servers: servers,
            vault,
            links,
            baseline: footprint::of(mesh, nodes)?,
            forgiven: Mutex::default(),
        })
    }

    /// Does what resets open connections: those that are open meanwhile may be reset, and are counted.
    pub fn cut<T>(&self, fault: impl FnOnce() -> T) -> T {
        self.during(false, fault)
    }

    /// Takes something away and brings it back: what is under way meanwhile may fail, and is counted.
    pub fn outage<T>(&self, fault: impl FnOnce() -> T) -> T {
        self.during(true, fault)
    }

    fn during<T>(&self, any: bool, fault: impl FnOnce() -> T) -> T {
        let from = Instant::now();
        let done = fault();
        self.forgiven
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(Forgiven {
                from,
                until: Instant::now(),
                any,
            });
        done
    }

    /// Ends the load and judges it by all four oracles; fails with everything that any of them found.
    pub fn verdict(self) -> Result<Account> {
        let mut found = Vec::new();
        let mut judge = |oracle: &str, verdict: Result<()>| {
            if let Err(error) = verdict {
                found.push(format!("{oracle}: {error:#}"));
            }
        };
        judge("O3, comes back", self.comes_back());
        let Self {
            mesh,
            nodes,
            stop,
            clients,
            vault,
            links,
            forgiven,
            ..
        } = self;
        let forgiven = forgiven.into_inner().unwrap_or_else(PoisonError::into_inner);
        let _ = stop.send(true);
        let mut all = Tally::default();
        for client in clients {
            all.add(
                client
                    .join()
                    .map_err(|_| anyhow!("a thread of the load panicked"))??,
            );
        }
        let lost = nothing_lost(&all, &forgiven);
        let count = *lost.as_ref().unwrap_or(&0);
        judge("O1, nothing lost", lost.map(drop));
        judge("O2, nobody let in", vault.silent());
        judge("O2, nobody let in", refused(&all.intrusions, &forgiven));
        for (node, link) in links {
            judge("O2, nobody let in", no_sighting(&node, link));
        }
        judge("O2, nobody let in", no_canary_on_pages(mesh, nodes));
        // A log that does not block is written a moment later.
        let recorded = poll_until("every refusal is on record", Duration::from_secs(5), || {
            told(mesh, &all.intrusions, &forgiven).map(Some)
        });
        judge("O4, told", recorded);
        if !found.is_empty() {
            bail!("the oracles found:\n{}", found.join("\n"));
        }
        Ok(Account {
            attempts: all.attempts,
            streams: all.streams,
            intrusions: all.intrusions,
            forgiven: count,
        })
    }

    /// O3: every process is alive and as large as before, within a minute.
    fn comes_back(&self) -> Result<()> {
        poll_until("everything is as it was", BACK_WITHIN, || {
            for now in footprint::of(self.mesh, self.nodes)? {
                let before = self
                    .baseline
                    .iter()
                    .find(|before| before.name == now.name)
                    .with_context(|| format!("{} is new", now.name))?;
                now.within(before)?;
            }
            Ok(Some(()))
        })
    }
}

/// O1: every attempt and stream whole, but for what is forgiven; returns how many that were.
fn nothing_lost(all: &Tally, forgiven: &[Forgiven]) -> Result<usize> {
    let attempts = all.attempts.iter().map(|attempt| {
        let ended = attempt.started + attempt.took;
        ("an attempt", attempt.started, ended, attempt.outcome.err())
    });
    let streams = all
        .streams
        .iter()
        .map(|end| (end.kind, end.opened, end.ended, end.failure));
    let failed: Vec<_> = attempts
        .chain(streams)
        .filter_map(|(what, from, until, failure)| Some((what, from, until, failure?)))
        .collect();
    let (pardoned, lost): (Vec<_>, Vec<_>) = failed
        .into_iter()
        .partition(|(_, from, until, failure)| is_forgiven(forgiven, *from, *until, *failure));
    match lost[..] {
        [] => Ok(pardoned.len()),
        [(what, from, until, failure), ..] => bail!(
            "{} of {} attempts and {} streams failed, first: {what}, after {:?}: {failure:?}",
            lost.len(),
            all.attempts.len(),
            all.streams.len(),
            until - from
        ),
    }
}

fn is_forgiven(forgiven: &[Forgiven], from: Instant, until: Instant, failure: Failure) -> bool {
    let may = |any: bool| match failure {
        Failure::Differs => false,
        Failure::Lost(kind) => any || steady::is_reset(kind),
        Failure::Connect(_) | Failure::Silence => any,
    };
    forgiven
        .iter()
        .any(|fault| from <= fault.until && until >= fault.from && may(fault.any))
}

/// O2: each refused caller has met a reset, not an answer and not an end as if all were well.
fn refused(intrusions: &[Intrusion], forgiven: &[Forgiven]) -> Result<()> {
    if intrusions.is_empty() {
        bail!("no intruder has tried");
    }
    for tried in intrusions {
        let (from, until) = (tried.started, tried.started + tried.took);
        match tried.end {
            Some(failure) if failure.is_refusal() || is_forgiven(forgiven, from, until, failure) => {}
            end => bail!(
                "{} to {}: {end:?}, and a refusal is a reset",
                tried.from,
                tried.to
            ),
        }
    }
    Ok(())
}

fn no_sighting(node: &str, link: Capture) -> Result<()> {
    let recording = link.stop()?;
    match recording.sightings() {
        [] => Ok(()),
        [first, ..] => bail!("plaintext on the link of node {node}: {first:?}"),
    }
}

/// O2: no log, metric or dump of the mesh holds what applications say to each other.
fn no_canary_on_pages(mesh: &Mesh, nodes: [&MeshNode; 2]) -> Result<()> {
    let mut texts = vec![(
        "metrics of control".to_owned(),
        mesh.control_page("/metrics")?.body,
    )];
    for node in nodes {
        texts.push((format!("metrics of {}", node.name()), node.metrics_page()?.body));
        for path in ["/config_dump", "/debug/connections"] {
            texts.push((format!("{path} of {}", node.name()), node.admin(path)?.body));
        }
    }
    for log in mesh.lab().logs() {
        let text = fs::read(&log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned())?;
        texts.push((log.display().to_string(), text));
    }
    match texts.iter().find(|(_, text)| text.contains(CANARY)) {
        None => Ok(()),
        Some((name, _)) => bail!("the canary is in {name}"),
    }
}

/// O4: each refused connection has exactly one record at its source, and each that was refused by the rule
/// of the vault one at the destination that names the rule.
fn told(mesh: &Mesh, intrusions: &[Intrusion], forgiven: &[Forgiven]) -> Result<()> {
    // The last reset may have been seen before its record was written.
    std::thread::sleep(RECORD_FOLLOWS);
    let records: Vec<Record> = records(mesh)?.into_iter().filter(Record::is_refusal).collect();
    // An attempt whose process was killed, or that ended just before, may have lost its record.
    let certain = |tried: &Intrusion| {
        let until = tried.started + tried.took;
        forgiven
            .iter()
            .all(|fault| tried.started > fault.until || until + LOST_LINES < fault.from)
    };
    let mut by_rule = 0;
    // One that was reset before its connect returned may have been refused by the rule, too.
    let maybe_by_rule = intrusions.iter().filter(|tried| tried.to.port() == VAULT).count();
    for tried in intrusions.iter().filter(|tried| tried.connected()) {
        let from = tried.from.to_string();
        let told: Vec<_> = records
            .iter()
            .filter(|record| record.is("direction", "outbound") && record.is("src.addr", &from))
            .collect();
        let least = usize::from(certain(tried));
        if told.len() < least || told.len() > 1 {
            bail!(
                "{} records of the refused {from} to {}: {told:?}",
                told.len(),
                tried.to
            );
        }
        if let Some(record) = told.first()
            && record.field("src.identity").is_none()
        {
            bail!("no source identity in {record:?}");
        }
        let vault = tried.to.port() == VAULT;
        by_rule += usize::from(vault && certain(tried));
    }
    let named = records
        .iter()
        .filter(|record| record.is("direction", "inbound") && record.text.contains(VAULT_RULE))
        .count();
    if named < by_rule || named > maybe_by_rule {
        bail!("{named} records name the rule {VAULT_RULE} that has refused {by_rule} to {maybe_by_rule}");
    }
    Ok(())
}

impl Vault {
    fn guard(&mut self, pod: &Pod) -> Result<()> {
        let bytes = self.bytes.clone();
        self.servers
            .push(Server::start(pod.listen(VAULT)?, move |mut socket, _| {
                let bytes = bytes.clone();
                async move {
                    let mut block = [0; 1024];
                    loop {
                        match socket.read(&mut block).await? {
                            0 => return Ok(()),
                            count => bytes.fetch_add(count as u64, Ordering::Relaxed),
                        };
                    }
                }
            })?);
        Ok(())
    }

    fn silent(&self) -> Result<()> {
        let accepted: u64 = self.servers.iter().map(Server::accepted).sum();
        let bytes = self.bytes.load(Ordering::Relaxed);
        match (accepted, bytes) {
            (0, 0) => Ok(()),
            _ => bail!("behind the deny rule, {accepted} connections and {bytes} bytes have arrived"),
        }
    }
}

/// One tenant's pods: a client and a server on each node.
struct Tenant {
    name: &'static str,
    clients: Vec<Pod>,
    servers: Vec<Pod>,
    vip: Addresses,
}

impl Tenant {
    fn settle(mesh: &Mesh, nodes: [&MeshNode; 2], name: &'static str) -> Result<Self> {
        mesh.namespace(name)?;
        for policy in policies(name) {
            mesh.apply_object(&policy)?;
        }
        let vip = mesh.service(name, "server", &[("tcp", SERVICE, ECHO)])?;
        let (mut clients, mut servers) = (Vec::new(), Vec::new());
        for node in nodes {
            let client = PodSpec::new(name, &format!("client-{}", node.name())).service_account("client");
            clients.push(mesh.pod(node, client)?);
            let server = PodSpec::new(name, &format!("server-{}", node.name()))
                .service_account("server")
                .label("app", "server")
                .port("tcp", ECHO);
            servers.push(mesh.pod(node, server)?);
        }
        Ok(Self {
            name,
            clients,
            servers,
            vip,
        })
    }

    /// Nobody calls what is not ready, so the load does not either.
    fn published(&self, nodes: [&MeshNode; 2]) -> Result<()> {
        for pod in self.clients.iter().chain(&self.servers) {
            for node in nodes.iter().filter(|node| node.name() == pod.node().name()) {
                node.wait_tunnelled(pod)?;
            }
        }
        Ok(())
    }

    /// The load of one client pod: every server of its tenant over both families, and the service over one.
    fn client(&self, pod: &Pod, number: usize, other: &Self, patience: Duration) -> Client {
        let direct = self
            .servers
            .iter()
            .flat_map(|server| server.addresses().all())
            .map(|ip| (ip, ECHO));
        let vip: IpAddr = self.vip.all()[number % 2];
        let pairs = direct
            .chain([(vip, SERVICE)])
            .map(|to| Pair {
                name: format!("{}/{}", self.name, pod.spec().name),
                to: to.into(),
            })
            .collect();
        let vaults = self
            .servers
            .iter()
            .flat_map(|server| server.addresses().all())
            .map(|ip| (ip, VAULT).into());
        let others = other
            .servers
            .iter()
            .flat_map(|server| server.addresses().all())
            .map(|ip| (ip, ECHO).into());
        Client {
            pairs,
            forbidden: vaults
                .zip(others)
                .flat_map(|(vault, other)| [vault, other])
                .collect(),
            patience,
        }
    }
}

/// The own namespace comes in, the vault is closed to all; said by rule, so that it holds in every profile.
fn policies(namespace: &str) -> [serde_json::Value; 2] {
    let policy = |name: &str, spec: serde_json::Value| {
        json!({
            "apiVersion": "culvert.dev/v1alpha1", "kind": "AuthorizationPolicy",
            "metadata": { "name": name, "namespace": namespace }, "spec": spec,
        })
    };
    let own =
        json!({ "action": "ALLOW", "rules": [{ "from": [{ "source": { "namespaces": [namespace] } }] }] });
    let vault = json!({
        "action": "DENY",
        "rules": [{ "to": [{ "operation": { "ports": [VAULT.to_string()] } }] }],
    });
    [policy("own", own), policy(VAULT_RULE, vault)]
}

#[cfg(test)]
mod tests;
