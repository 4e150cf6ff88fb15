//! The privileged half of the L4 proxy: it looks after network namespaces so that ztunnel need not.
//!
//! ```text
//! CNI plugin ─▶ watch ─▶ pods ─▶ netns, listeners, capture, guard
//! control ────▶        ◀──┴──▶ serve ◀─▶ ztunnel
//! ```
//! Invariant: it opens no network port, holds no key and sees no traffic. What it puts in place it looks at
//! again, for as long as the pod lives.

#![forbid(unsafe_code)]

mod capture;
mod events;
mod guard;
#[cfg(test)]
mod lab;
mod listeners;
mod marks;
mod netns;
mod orders;
mod pods;
mod privileges;
mod records;
mod serve;
mod watch;

use anyhow::{Context, Result};
use clap::Parser;
use culvert_io::{agent_socket::Listener, control::Control, log};
use std::{
    fs::Permissions,
    os::unix::fs::{PermissionsExt, chown},
    path::{Path, PathBuf},
    time::Duration,
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};

/// Events that wait for the owner; whoever brings more waits with them.
const EVENTS: usize = 256;

/// Programs capture in the pods of a node and hands sockets to ztunnel.
#[derive(Debug, Parser)]
#[command(version)]
struct Options {
    /// Where the sockets for ztunnel and the CNI plugin are.
    #[arg(long, env = "CULVERT_SOCKET_DIR", default_value = "/run/culvert")]
    socket_dir: PathBuf,
    /// What the agent remembers of its pods.
    #[arg(long, env = "CULVERT_RUN_DIR", default_value = "/run/culvert/agent")]
    run_dir: PathBuf,
    /// `https://host:port` of control.
    #[arg(long, env = "CULVERT_CONTROL")]
    control: String,
    /// The trust bundle that control's certificate chains to (PEM).
    #[arg(long, env = "CULVERT_CONTROL_CA")]
    control_ca: PathBuf,
    /// The DNS name in control's certificate.
    #[arg(
        long,
        env = "CULVERT_CONTROL_NAME",
        default_value = "control.culvert-system.svc"
    )]
    control_name: String,
    /// A file with the node's token.
    #[arg(long, env = "CULVERT_TOKEN")]
    token: PathBuf,
    /// The user that ztunnel runs as; nobody else may speak on its socket.
    #[arg(long, env = "CULVERT_ZTUNNEL_UID", default_value_t = 65532)]
    ztunnel_uid: u32,
    /// The name of this node, for the log.
    #[arg(long, env = "CULVERT_NODE")]
    node: String,
    /// Where the container runtime keeps pods' network namespaces.
    #[arg(long, env = "CULVERT_NETNS_DIR", default_value = "/run/netns")]
    netns_dir: PathBuf,
    /// Seconds that open connections of a pod may go on after it has left the mesh.
    #[arg(long, env = "CULVERT_DRAIN_SECONDS", default_value_t = 30)]
    drain_seconds: u64,
    /// Form of the log: `text` or `json`.
    #[arg(long, env = "CULVERT_LOG_FORMAT", default_value = "text")]
    log_format: log::Format,
    /// Log filter, in the syntax of `tracing-subscriber`'s `EnvFilter`.
    #[arg(long, env = "CULVERT_LOG", default_value = "info")]
    log: String,
}

fn main() -> Result<()> {
    let options = Options::parse();
    privileges::close_process().context(
        "giving up privileges; the agent starts as root, with SYS_ADMIN and NET_ADMIN, which it keeps",
    )?;
    let records = records::Records::open(&options.run_dir)
        .with_context(|| format!("run folder {}", options.run_dir.display()))?;
    std::fs::create_dir_all(&options.socket_dir)
        .with_context(|| format!("socket folder {}", options.socket_dir.display()))?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .on_thread_start(|| privileges::keep_two().expect("capabilities can always be given up"))
        .enable_all()
        .build()?;
    // Only this thread can still give a socket to another user; it cannot from the next line but one on.
    let sockets = runtime.block_on(async { bind_both(&options) })?;
    privileges::keep_two().context("giving up capabilities")?;
    // Its thread is started here, with no more privileges than the others have.
    let (_, _flush) = log::start(&options.log, options.log_format)?;
    runtime.block_on(run(options, records, sockets))
}

/// The sockets for ztunnel and for the CNI plugin.
fn bind_both(options: &Options) -> Result<(Listener, Listener)> {
    Ok((
        bind(&options.socket_dir.join("ztunnel.sock"), options.ztunnel_uid)?,
        bind(&options.socket_dir.join("cni.sock"), 0)?,
    ))
}

async fn run(
    options: Options,
    records: records::Records,
    (ztunnel, cni): (Listener, Listener),
) -> Result<()> {
    let (events, queue) = mpsc::channel(EVENTS);
    let sources = serve::Sources::default();
    let config = pods::Config {
        places: netns::Places::new(options.netns_dir, records.clone()),
        drain: Duration::from_secs(options.drain_seconds),
    };
    let pods = pods::Pods::open(config, records, sources.clone())
        .await
        .context("the records of an earlier agent")?;
    let control = Control {
        address: options.control,
        bundle: options.control_ca,
        name: options.control_name,
        token: options.token,
    };
    // A mistake in its address ends the agent at once; what is not there yet does not.
    control.channel()?;
    tracing::info!(node = options.node, "the agent looks after its pods");
    let mut tasks = tokio::task::JoinSet::new();
    tasks.spawn(pods.run(queue));
    tasks.spawn(watch::cni::serve(cni, watch::cni::HOLD, events.clone()));
    tasks.spawn(watch::control::attend(control, events.clone()));
    tasks.spawn(serve::serve(ztunnel, options.ztunnel_uid, sources, events));
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        Some(ended) = tasks.join_next() => {
            ended.context("a part of the agent panicked")?;
            anyhow::bail!("a part of the agent ended");
        }
    }
    // Rules and listeners stay: ztunnel holds its copies, and the next agent takes them back.
    tracing::info!("the agent stops; capture stays as it is");
    Ok(())
}

/// A socket that one user alone can reach.
fn bind(path: &Path, uid: u32) -> Result<Listener> {
    let bound = || -> Result<Listener> {
        let listener = Listener::bind(path)?;
        std::fs::set_permissions(path, Permissions::from_mode(0o600))?;
        chown(path, Some(uid), None)?;
        Ok(listener)
    };
    bound().with_context(|| format!("socket {}", path.display()))
}
