//! `ztunnel`: the L4 proxy of a node.
//!
//! ```text
//! agent ─sockets─▶ node_protocol ─▶ pods ─┬▶ outbound: capture → route → tunnel ──▶ peer
//! control ─xds, ca─▶ snapshot, SVIDs ─────┤
//!                                         ├▶ inbound: accept → admit → deliver ──▶ app
//!                                         └▶ passthrough, recheck, trust
//! ```
//! Invariant: no privilege, no namespace, no Kubernetes API. What it may not know, it refuses.

#![forbid(unsafe_code)]

mod accept;
mod access;
mod admin;
mod config;
mod connections;
mod context;
mod dns;
#[cfg(test)]
mod fixtures;
mod inbound;
mod means;
mod metrics;
mod node_protocol;
mod outbound;
mod passthrough;
mod pods;
mod privilege;
mod recheck;
mod revocation;
mod room;
mod seccomp;
mod sockets;
mod trust;
mod workers;

use anyhow::Context as _;
use clap::Parser;
use config::{Config, Discovery};
use context::{Context, Limits};
use culvert_core::ids::PodUid;
use culvert_io::{budget::Buffers, control::Control, identity::Identities, log, xds};
use std::{collections::HashMap, sync::Arc, time::Duration};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
};

/// The system's allocator maps and unmaps blocks of this program's sizes over and over, and keeps what a
/// burst of connections has taken.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> anyhow::Result<()> {
    let config = Config::parse();
    privilege::give_up()?;
    let means = means::Means::of_this_process()?;
    // Before any other thread exists, so that none is without it.
    seccomp::confine()?;
    let (log, _flush) = log::start(&config.log, config.log_format)?;
    anyhow::ensure!(
        config.admin.ip().is_loopback(),
        "--admin {} is not a loopback address",
        config.admin
    );
    let workers = workers::Workers::start(config.workers).context("cannot start workers")?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(run(config, means, workers, log))
}

async fn run(
    config: Config,
    means: means::Means,
    workers: workers::Workers,
    log: log::Log,
) -> anyhow::Result<()> {
    let control = Control {
        address: config.control.clone(),
        bundle: config.control_ca.clone(),
        name: config.control_name.clone(),
        token: config.token.clone(),
    };
    let mode = match config.discovery {
        Discovery::OnDemand => xds::Mode::OnDemand,
        Discovery::Wildcard => xds::Mode::Wildcard,
    };
    let settings = xds::Settings {
        control: control.clone(),
        node: config.node.clone(),
        mode,
        state: config.state_dir.clone(),
    };
    let (discovery, client) = xds::start(settings)?;
    let (sender, outgoing, declarations) = node_protocol::requests();
    let identities = Identities::new(&control)?;
    let metrics = metrics::Metrics::new()?;
    if let Some(path) = config.crl.clone() {
        identities.await_lists();
        tokio::spawn(revocation::watch(
            path,
            identities.clone(),
            metrics.lists_failing.clone(),
        ));
    }
    let context = Arc::new(Context {
        discovery,
        identities,
        pods: pods::Pods::default(),
        workers,
        metrics,
        agent: context::AgentReport::default(),
        log,
        settings: config.shown(),
        declarations,
        limits: Limits {
            connections: config.max_connections,
            pending: config.max_pending,
            tunnels: config.max_tunnels,
            batch: means.batch(),
        },
        failing: outbound::balance::Failing::default(),
        handshakes: room::Room::<PodUid>::new(config.max_handshakes),
        descriptors: room::Room::new(means.connections()),
        buffers: Buffers::new(config.max_buffered.unwrap_or_else(|| means.buffers())),
        drain: watch::Sender::new(false),
    });
    for (address, pages) in [
        (config.admin, admin::Pages::Admin),
        (config.metrics, admin::Pages::Metrics),
        (config.readiness, admin::Pages::Readiness),
    ] {
        let listener = admin::bind(address)
            .await
            .with_context(|| format!("cannot listen on {address}"))?;
        tokio::spawn(admin::serve(listener, pages, context.clone()));
    }
    let node = node_protocol::Node {
        path: config.agent_socket.clone(),
        context: context.clone(),
        outgoing,
        sender,
        held: HashMap::new(),
    };
    tokio::spawn(workers::keep_house());
    tokio::spawn(client);
    tokio::spawn(node.run());
    let looking = context.clone();
    tokio::spawn(async move { looking.workers.look().await });
    tokio::spawn(recheck::run(context.clone()));
    tokio::spawn(outbound::tunnel::sweep(context.clone()));
    tokio::spawn(forget_idle_series(context.clone()));
    tokio::spawn(trust::run(context.clone()));
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        _ = terminate.recv() => {
            context.drain.send_replace(true);
        }
        () = context.draining() => {}
    }
    drain(&context, config.drain_time).await;
    Ok(())
}

async fn forget_idle_series(context: Arc<Context>) {
    loop {
        tokio::time::sleep(Duration::from_secs(60)).await;
        context.metrics.sweep(std::time::Instant::now());
    }
}

/// Lets open connections end by themselves, for a while.
async fn drain(context: &Context, patience: Duration) {
    let open = || {
        context
            .pods
            .all()
            .iter()
            .map(|pod| pod.connections.count())
            .sum::<usize>()
    };
    tracing::info!(open = open(), ?patience, "draining");
    let emptied = async {
        while open() > 0 {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    if tokio::time::timeout(patience, emptied).await.is_err() {
        tracing::warn!(open = open(), "drain time is over; resetting what is open");
        context
            .pods
            .all()
            .iter()
            .for_each(|pod| pod.connections.cut_all("drain"));
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}
