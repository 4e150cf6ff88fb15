//! A mesh in the lab: real `control`, `ztunnel-agent` and `ztunnel` processes around the lab's pods.
//!
//! ```text
//! host "control":  control  ◀── config folder (`apply`, `delete`)
//! node "a":        ztunnel-agent (root, the node's namespace) ◀── CNI socket (`pod`)
//!                  └─ pod culvert-system/ztunnel-a: ztunnel (uid 65532, no capability)
//! ```
//! Invariant: tests speak to the mesh as a cluster does: objects, CNI calls, pages. Nothing here knows
//! the programs' insides.

mod build;
pub mod cni;
pub mod config;
pub mod pages;

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::lab::{
    Addresses, Endpoint, Lab, Limits, Node, POD_RANGES, Pod, PodSpec, Process, SERVICE_RANGES, Start,
    poll_until,
};
pub use build::{Programs, programs};
use config::{ConfigFolder, ENROL};
use pages::{Metrics, Page};

/// The user that ztunnel runs as.
pub const ZTUNNEL_UID: u32 = 65532;

pub const TRUST_DOMAIN: &str = "cluster.local";
pub const CLUSTER_DOMAIN: &str = "cluster.local";
pub const CONTROL_NAME: &str = "control.culvert-system.svc";
/// Names that nodes can have.
const NODES: [&str; 8] = ["a", "b", "c", "d", "e", "f", "g", "h"];

/// Where the mesh's own pods are.
pub const SYSTEM: &str = "culvert-system";

const CONTROL_PORT: u16 = 15012;
const CONTROL_ADMIN_PORT: u16 = 15014;
const ADMIN_PORT: u16 = 15000;
const METRICS_PORT: u16 = 15020;
const READINESS_PORT: u16 = 15021;

/// How long a part of the mesh may take until it is ready.
const READY_WITHIN: Duration = Duration::from_secs(20);

/// What differs from one mesh to the next.
#[derive(Debug, Clone)]
pub struct Options {
    pub profile: &'static str,
    pub egress: &'static str,
    pub svid_ttl: &'static str,
    /// Further arguments, such as limits and drain times.
    pub control_args: Vec<String>,
    pub agent_args: Vec<String>,
    pub ztunnel_args: Vec<String>,
    /// Limit of open files of each ztunnel.
    pub ztunnel_nofile: Option<u64>,
    /// Limit of memory of each ztunnel, in bytes.
    pub ztunnel_memory: Option<u64>,
    /// Log filter of ztunnel; `CULVERT_LOG` of the test's environment overrides it for all three.
    pub log: &'static str,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            profile: "medium",
            egress: "allow",
            svid_ttl: "1h",
            control_args: Vec::new(),
            agent_args: Vec::new(),
            ztunnel_args: Vec::new(),
            ztunnel_nofile: None,
            ztunnel_memory: None,
            log: "info",
        }
    }
}

/// A lab with a control plane, and nodes that belong to it.
#[derive(Debug)]
pub struct Mesh {
    // First, so that on a failure the logs' last lines are shown while the files are there.
    lab: Lab,
    options: Options,
    config: ConfigFolder,
    control_host: Endpoint,
    /// The resolver that the cluster's pods ask; nothing answers there until a test starts something.
    resolver: Endpoint,
    control: Mutex<Option<Process>>,
    vips: AtomicU16,
}

impl Mesh {
    /// A control plane that is ready, and no node.
    pub fn start(options: Options) -> Result<Self> {
        programs()?;
        let lab = Lab::new()?;
        let control_host = lab.host("control")?;
        let resolver = lab.host("resolver")?;
        lab.resolve_by(&resolver.addresses().all(), CLUSTER_DOMAIN)?;
        let config = ConfigFolder::new(lab.path(CONFIG), lab.path("/run/culvert/control/aside"))?;
        let mesh = Self {
            lab,
            options,
            config,
            control_host,
            resolver,
            control: Mutex::default(),
            vips: AtomicU16::new(0),
        };
        mesh.apply_object(&config::namespace(SYSTEM, &[]))?;
        mesh.write_tokens()?;
        mesh.start_control()?;
        Ok(mesh)
    }

    /// A mesh of nodes `a` and `b`.
    pub fn two_nodes() -> Result<(Self, MeshNode, MeshNode)> {
        Self::two_nodes_with(Options::default())
    }

    pub fn two_nodes_with(options: Options) -> Result<(Self, MeshNode, MeshNode)> {
        let mesh = Self::start(options)?;
        let (a, b) = (mesh.node("a")?, mesh.node("b")?);
        Ok((mesh, a, b))
    }

    pub fn lab(&self) -> &Lab {
        &self.lab
    }

    pub fn config(&self) -> &ConfigFolder {
        &self.config
    }

    pub fn control_host(&self) -> &Endpoint {
        &self.control_host
    }

    pub fn resolver(&self) -> &Endpoint {
        &self.resolver
    }

    /// A file of the lab as this process sees it.
    pub fn path(&self, inside: &str) -> PathBuf {
        self.lab.path(inside)
    }

    /// Puts objects into the config folder, each document of `yaml` in its file.
    pub fn apply(&self, yaml: &str) -> Result<()> {
        self.config.apply(yaml)
    }

    pub fn apply_object(&self, object: &Value) -> Result<()> {
        self.config.apply_object(object)
    }

    pub fn delete(&self, kind: &str, namespace: &str, name: &str) -> Result<()> {
        self.config.delete(kind, namespace, name)
    }

    /// A namespace whose pods take part in the mesh.
    pub fn namespace(&self, name: &str) -> Result<()> {
        self.apply_object(&config::namespace(name, &[(ENROL, "ambient")]))
    }

    /// A service of the pods with label `app` = `name`; ports as (name, port, target port).
    pub fn service(&self, namespace: &str, name: &str, ports: &[(&str, u16, u16)]) -> Result<Addresses> {
        let vip = self.vip();
        self.apply_object(&config::service(namespace, name, vip, ports))?;
        Ok(vip)
    }

    /// Virtual addresses that no service has yet.
    pub fn vip(&self) -> Addresses {
        let number = self.vips.fetch_add(1, Ordering::Relaxed) + 1;
        let [high, low] = number.to_be_bytes();
        Addresses {
            v4: Ipv4Addr::new(10, 96, high, low),
            v6: Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, 0, number),
        }
    }

    /// A new node with an agent and a ztunnel that is ready.
    pub fn node(&self, name: &str) -> Result<MeshNode> {
        ensure!(NODES.contains(&name), "nodes have the names {NODES:?}");
        let node = self.lab.node(name)?;
        let spec = PodSpec::new(SYSTEM, &format!("ztunnel-{name}")).service_account("ztunnel");
        let pod = node.pod(spec)?;
        self.apply_object(&config::pod(&pod))?;
        let node = MeshNode {
            folder: format!("/run/culvert/{name}"),
            control: self.control_url(),
            options: self.options.clone(),
            node,
            pod,
            agent: Mutex::default(),
            ztunnel: Mutex::default(),
        };
        node.prepare(&self.path(ROOT))?;
        node.start_agent()?;
        node.start_ztunnel()?;
        node.wait_ready()?;
        Ok(node)
    }

    /// A pod of `node`, known to control, that starts as a cluster's does: once the agent lets it.
    pub fn pod(&self, node: &MeshNode, spec: PodSpec) -> Result<Pod> {
        let pod = node.node.pod(spec)?;
        self.admit(node, &pod)?;
        Ok(pod)
    }

    /// Tells control and the agent of a pod that the lab has made.
    pub fn admit(&self, node: &MeshNode, pod: &Pod) -> Result<()> {
        self.apply_object(&config::pod(pod))?;
        cni::add(&node.cni_socket(), pod)
    }

    /// Ends a pod as a cluster does: its object, the agent's record, its network.
    pub fn remove(&self, node: &MeshNode, pod: &Pod) -> Result<()> {
        cni::delete(&node.cni_socket(), pod)?;
        self.delete("Pod", &pod.spec().namespace, &pod.spec().name)?;
        pod.unplug()
    }

    /// Starts control, or starts it again after `kill_control`.
    pub fn start_control(&self) -> Result<()> {
        let host = self.control_host.addresses();
        let mut command = Command::new(&programs()?.control);
        command.args([
            "--config-dir",
            CONFIG,
            "--state-dir",
            CONTROL_STATE,
            "--node-tokens",
            TOKENS,
        ]);
        for ip in host.all() {
            command
                .arg("--listen")
                .arg(SocketAddr::new(ip, CONTROL_PORT).to_string());
        }
        command
            .arg("--admin")
            .arg(SocketAddr::new(host.v4.into(), CONTROL_ADMIN_PORT).to_string());
        command.args([
            "--trust-domain",
            TRUST_DOMAIN,
            "--cluster-domain",
            "cluster.local",
        ]);
        command.args(["--profile", self.options.profile, "--egress", self.options.egress]);
        command.args(["--svid-ttl", self.options.svid_ttl]);
        for range in POD_RANGES.iter().chain(&SERVICE_RANGES) {
            command.args(["--mesh-range", range]);
        }
        for ip in self.resolver.addresses().all() {
            command.arg("--resolver").arg(ip.to_string());
        }
        command.args(&self.options.control_args);
        fs::create_dir_all(self.path(CONTROL_STATE))?;
        fs::set_permissions(self.path(CONTROL_STATE), fs::Permissions::from_mode(0o700))?;
        let process = self
            .control_host
            .spawn("control", logged(command, self.options.log))?;
        process.poll_until("control is ready", READY_WITHIN, || {
            let page = self.control_page("/healthz/ready")?;
            Ok((page.status == 200 && self.path(CONTROL_ROOT).is_file()).then_some(()))
        })?;
        self.distribute_root()?;
        *locked(&self.control) = Some(process);
        Ok(())
    }

    /// Gives control's trust bundle to the nodes, as a cluster does with a ConfigMap.
    pub fn distribute_root(&self) -> Result<()> {
        let part = self.path(ROOT).with_extension("part");
        fs::copy(self.path(CONTROL_ROOT), &part)?;
        fs::set_permissions(&part, fs::Permissions::from_mode(0o644))?;
        Ok(fs::rename(part, self.path(ROOT))?)
    }

    /// SIGKILL to control.
    pub fn kill_control(&self) -> Result<()> {
        locked(&self.control)
            .take()
            .context("control does not run")?
            .kill()
    }

    /// Looks at control's process.
    pub fn with_control<T>(&self, look: impl FnOnce(&Process) -> T) -> Result<T> {
        Ok(look(
            locked(&self.control).as_ref().context("control does not run")?,
        ))
    }

    /// A page of control's, as its own host sees it.
    pub fn control_page(&self, path: &str) -> Result<Page> {
        let address = SocketAddr::new(self.control_host.addresses().v4.into(), CONTROL_ADMIN_PORT);
        pages::fetch(&self.control_host, address, path)
    }

    pub fn control_metrics(&self) -> Result<Metrics> {
        let address = SocketAddr::new(self.control_host.addresses().v4.into(), CONTROL_ADMIN_PORT);
        Metrics::scrape(&self.control_host, address)
    }

    /// The trust bundle that the nodes verify control against, as this process sees it.
    pub fn root(&self) -> PathBuf {
        self.path(ROOT)
    }

    pub fn control_url(&self) -> String {
        format!("https://{}:{CONTROL_PORT}", self.control_host.addresses().v4)
    }

    fn write_tokens(&self) -> Result<()> {
        // Control reads its tokens once, so those of all nodes there may be are in the file from the start.
        let tokens: String = NODES
            .iter()
            .map(|node| format!("{}: {node}\n", token(node)))
            .collect();
        let path = self.path(TOKENS);
        let part = path.with_extension("part");
        fs::write(&part, tokens)?;
        fs::set_permissions(&part, fs::Permissions::from_mode(0o600))?;
        Ok(fs::rename(part, path)?)
    }
}

const CONFIG: &str = "/run/culvert/control/config";
const CONTROL_STATE: &str = "/run/culvert/control/state";
const CONTROL_ROOT: &str = "/run/culvert/control/state/root.pem";
const TOKENS: &str = "/run/culvert/control/tokens.yaml";
/// The trust bundle as the nodes have it.
const ROOT: &str = "/run/culvert/root.pem";

/// The join token of a node; secret from nobody in a lab, but different for each.
pub fn token(node: &str) -> String {
    format!("token-of-node-{node}-0123456789abcdef0123456789abcdef")
}

/// A node that takes part in the mesh.
#[derive(Debug)]
pub struct MeshNode {
    node: Node,
    /// The pod that its ztunnel runs in.
    pod: Pod,
    folder: String,
    control: String,
    options: Options,
    agent: Mutex<Option<Process>>,
    ztunnel: Mutex<Option<Process>>,
}

impl MeshNode {
    pub fn name(&self) -> &str {
        self.node.name()
    }

    /// The lab's node beneath.
    pub fn node(&self) -> &Node {
        &self.node
    }

    /// The pod of its ztunnel.
    pub fn ztunnel_pod(&self) -> &Pod {
        &self.pod
    }

    /// The agent's socket for CNI plugins, as this process sees it.
    pub fn cni_socket(&self) -> PathBuf {
        self.node.path(&format!("{}/socket/cni.sock", self.folder))
    }

    /// The agent's socket for ztunnel, as this process sees it.
    pub fn agent_socket(&self) -> PathBuf {
        self.node.path(&format!("{}/socket/ztunnel.sock", self.folder))
    }

    /// A file below this node's folder, as this process sees it.
    pub fn path(&self, below: &str) -> PathBuf {
        self.node.path(&format!("{}/{below}", self.folder))
    }

    fn prepare(&self, root: &Path) -> Result<()> {
        ensure!(root.is_file(), "control has written no trust bundle");
        for folder in ["socket", "run"] {
            fs::create_dir_all(self.path(folder))?;
        }
        // Where ztunnel alone keeps its last good state.
        let state = self.path("state");
        fs::create_dir_all(&state)?;
        fs::set_permissions(&state, fs::Permissions::from_mode(0o700))?;
        chown(&state, Some(ZTUNNEL_UID), Some(ZTUNNEL_UID))?;
        fs::create_dir_all(self.node.path("/run/netns"))?;
        // Readable by the agent (root) and ztunnel, as a projected token is.
        for (file, owner) in [("token", ZTUNNEL_UID), ("agent-token", 0)] {
            let path = self.path(file);
            fs::write(&path, token(self.name()))?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o400))?;
            chown(&path, Some(owner), Some(owner))?;
        }
        Ok(())
    }

    pub fn start_agent(&self) -> Result<()> {
        let inside = |below: &str| format!("{}/{below}", self.folder);
        let mut command = Command::new(&programs()?.agent);
        command.args(["--socket-dir", &inside("socket"), "--run-dir", &inside("run")]);
        command.args([
            "--control",
            &self.control,
            "--control-ca",
            ROOT,
            "--control-name",
            CONTROL_NAME,
        ]);
        command.args(["--token", &inside("agent-token"), "--node", self.name()]);
        command.args([
            "--ztunnel-uid",
            &ZTUNNEL_UID.to_string(),
            "--netns-dir",
            "/run/netns",
        ]);
        command.args(&self.options.agent_args);
        let process = self.node.spawn("agent", logged(command, self.options.log))?;
        process.poll_until("the agent listens", READY_WITHIN, || {
            Ok((self.cni_socket().exists() && self.agent_socket().exists()).then_some(()))
        })?;
        *locked(&self.agent) = Some(process);
        Ok(())
    }

    /// Starts ztunnel and returns without waiting for it to be ready.
    pub fn start_ztunnel(&self) -> Result<()> {
        let process = self.spawn_ztunnel(&[])?;
        *locked(&self.ztunnel) = Some(process);
        Ok(())
    }

    /// Another ztunnel of this node, which the caller keeps; its pages are on ports of its own.
    pub fn successor(&self) -> Result<Process> {
        self.spawn_ztunnel(&[
            "--admin",
            "127.0.0.1:16000",
            "--metrics",
            "[::]:16020",
            "--readiness",
            "[::]:16021",
        ])
    }

    /// Starts ztunnel with a standard output that nobody reads: a pipe that fills and then blocks.
    pub fn start_ztunnel_unread(&self) -> Result<()> {
        let pipe = self.path("unread");
        if !pipe.exists() {
            nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::from_bits_truncate(0o600))?;
        }
        chown(&pipe, Some(ZTUNNEL_UID), Some(ZTUNNEL_UID))?;
        let ztunnel = self.ztunnel_command(&[])?;
        let mut shell = Command::new("/bin/sh");
        // Opened for reading as well, which does not wait for a reader.
        shell.args(["-c", "exec \"$0\" \"$@\" 1<>\"$UNREAD\""]);
        shell.env("UNREAD", format!("{}/unread", self.folder));
        shell.arg(ztunnel.get_program()).args(ztunnel.get_args());
        let start = Start::from(logged(shell, self.options.log)).as_uid(ZTUNNEL_UID);
        *locked(&self.ztunnel) = Some(self.pod.spawn("ztunnel", start)?);
        Ok(())
    }

    fn spawn_ztunnel(&self, pages: &[&str]) -> Result<Process> {
        let command = self.ztunnel_command(pages)?;
        let mut start = Start::from(logged(command, self.options.log)).as_uid(ZTUNNEL_UID);
        start.nofile = self.options.ztunnel_nofile;
        if let Some(bytes) = self.options.ztunnel_memory {
            start.limits = Some(Arc::new(Limits::new(Some(bytes), None)?));
        }
        self.pod.spawn("ztunnel", start)
    }

    fn ztunnel_command(&self, pages: &[&str]) -> Result<Command> {
        let inside = |below: &str| format!("{}/{below}", self.folder);
        let mut command = Command::new(&programs()?.ztunnel);
        command.args(["--agent-socket", &inside("socket/ztunnel.sock")]);
        command.args([
            "--control",
            &self.control,
            "--control-ca",
            ROOT,
            "--control-name",
            CONTROL_NAME,
        ]);
        command.args(["--token", &inside("token"), "--node", self.name()]);
        command.args(["--state-dir", &inside("state")]);
        if pages.is_empty() {
            command.args(["--admin", &format!("127.0.0.1:{ADMIN_PORT}")]);
            command.args(["--metrics", &format!("[::]:{METRICS_PORT}")]);
            command.args(["--readiness", &format!("[::]:{READINESS_PORT}")]);
        } else {
            command.args(pages);
        }
        command.args(&self.options.ztunnel_args);
        Ok(command)
    }

    /// Waits until ztunnel serves.
    pub fn wait_ready(&self) -> Result<()> {
        let guard = locked(&self.ztunnel);
        let process = guard.as_ref().context("ztunnel does not run")?;
        process.poll_until(
            &format!("ztunnel of {} is ready", self.name()),
            READY_WITHIN,
            || {
                let page = self.readiness()?;
                Ok((page.status == 200).then_some(()))
            },
        )
    }

    /// What a readiness probe of ztunnel gets.
    pub fn readiness(&self) -> Result<Page> {
        pages::fetch(&self.pod, self.local(READINESS_PORT), "/healthz/ready")
    }

    /// SIGKILL to ztunnel.
    pub fn kill_ztunnel(&self) -> Result<()> {
        locked(&self.ztunnel)
            .take()
            .context("ztunnel does not run")?
            .kill()
    }

    /// SIGKILL to the agent.
    pub fn kill_agent(&self) -> Result<()> {
        locked(&self.agent)
            .take()
            .context("the agent does not run")?
            .kill()
    }

    /// Takes ztunnel's process out of the node's care, and puts another in its place.
    pub fn replace_ztunnel(&self, successor: Process) -> Option<Process> {
        locked(&self.ztunnel).replace(successor)
    }

    pub fn with_ztunnel<T>(&self, look: impl FnOnce(&Process) -> T) -> Result<T> {
        Ok(look(
            locked(&self.ztunnel).as_ref().context("ztunnel does not run")?,
        ))
    }

    pub fn with_agent<T>(&self, look: impl FnOnce(&Process) -> T) -> Result<T> {
        Ok(look(
            locked(&self.agent).as_ref().context("the agent does not run")?,
        ))
    }

    pub fn metrics(&self) -> Result<Metrics> {
        Metrics::scrape(&self.pod, self.local(METRICS_PORT))
    }

    /// The metrics page as it is.
    pub fn metrics_page(&self) -> Result<Page> {
        pages::fetch(&self.pod, self.local(METRICS_PORT), "/metrics")
    }

    /// Waits until `pod` is ready in this node's view: a cluster's readiness comes after capture, too, and
    /// nobody calls what is not ready.
    pub fn wait_published(&self, pod: &Pod) -> Result<()> {
        self.wait_workload("the pod is published as ready", pod, |one| {
            one["status"] == "Ready"
        })
    }

    /// Waits until a pod that has joined is called through tunnels alone: what was opened before that, in
    /// plaintext, ends when plaintext is refused.
    pub fn wait_tunnelled(&self, pod: &Pod) -> Result<()> {
        self.wait_workload("the pod is published as ready, and for HBONE", pod, |one| {
            one["status"] == "Ready" && one["protocol"] == "HBONE"
        })
    }

    fn wait_workload(&self, what: &str, pod: &Pod, is: impl Fn(&Value) -> bool) -> Result<()> {
        poll_until(what, READY_WITHIN, || {
            let dump: Value = serde_json::from_str(&self.admin("/config_dump")?.body)?;
            let spec = pod.spec();
            let found = dump["workloads"].as_array().is_some_and(|all| {
                let mut named = all
                    .iter()
                    .filter(|one| one["name"] == *spec.name && one["namespace"] == *spec.namespace);
                named.any(&is)
            });
            Ok(found.then_some(()))
        })
    }

    /// A page of ztunnel's admin port, which is on loopback alone.
    pub fn admin(&self, path: &str) -> Result<Page> {
        let loopback = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), ADMIN_PORT);
        pages::fetch(&self.pod, loopback, path)
    }

    /// A call of the admin port with another method than GET, or with one that it refuses.
    pub fn admin_call(&self, method: &str, path: &str) -> Result<Page> {
        let loopback = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), ADMIN_PORT);
        pages::request(&self.pod, loopback, method, path)
    }

    fn local(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.pod.addresses().v4.into(), port)
    }
}

/// The same log filter for all, unless the caller's environment has one.
fn logged(mut command: Command, filter: &str) -> Command {
    command.env(
        "CULVERT_LOG",
        std::env::var("CULVERT_LOG").unwrap_or_else(|_| filter.to_owned()),
    );
    command.env("RUST_BACKTRACE", "1");
    command
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
