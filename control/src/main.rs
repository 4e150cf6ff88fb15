//! `control`: objects in, what nodes need out.
//!
//! ```text
//! watch (folder) ──Objects──▶ index ──World──▶ serve: ads, ca, nodes
//!                    capture states ◀──────────────────────┘
//! ```
//! Invariant: it is on no connection's path. What it serves is whole, and grows in version with every
//! change.

#![forbid(unsafe_code)]

mod admin;
mod authority;
mod config;
#[cfg(test)]
mod fuzz;
mod index;
mod metrics;
mod record;
mod rotation;
mod serve;
mod watch;

use anyhow::Context;
use arc_swap::ArcSwap;
use authority::Authority;
use clap::Parser;
use config::Config;
use index::{Index, Report, Settings, Taken, World};
use record::Record;
use serve::{
    Certificate, Shared, Tokens,
    acks::{Acks, Settled},
    limits::Limits,
};
use std::{
    fs,
    os::unix::fs::DirBuilderExt,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    sync::{mpsc, watch as cell},
};
use watch::{
    files::{Check, Health, watch_folder},
    objects::Change,
};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let config = Config::parse();
    let (log, _flush) = culvert_io::log::start(&config.log, config.log_format)?;
    if !config.state_dir.exists() {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&config.state_dir)
            .with_context(|| format!("cannot make the state folder {}", config.state_dir.display()))?;
    }
    anyhow::ensure!(
        config.config_dir.is_dir(),
        "there is no folder {}; name the folder of YAML objects with --config-dir",
        config.config_dir.display()
    );
    let settings = Settings::from(&config);
    let authority = authority(&config)?;
    let addresses: Vec<_> = config.listen.iter().map(|address| address.ip()).collect();
    let certificate = Arc::new(Certificate::new(&authority, &config.server_name, &addresses)?);
    let tls = serve::server_config(certificate.clone())?;
    let mut listeners = vec![];
    for address in &config.listen {
        listeners.push(
            TcpListener::bind(address)
                .await
                .with_context(|| format!("cannot listen on {address}"))?,
        );
    }
    let admin = TcpListener::bind(config.admin)
        .await
        .with_context(|| format!("cannot listen on {}", config.admin))?;

    let (source, first) = version(&config.state_dir)?;
    let (record, recorded) = Record::open(&config.state_dir)?;
    let (publish, world) = cell::channel(Arc::new(World::at(first)));
    let (reports, heard) = mpsc::channel(1024);
    let shared = Arc::new(Shared {
        settings: settings.clone(),
        world: world.clone(),
        source,
        tokens: Tokens::read(&config.node_tokens)?,
        authority: ArcSwap::from_pointee(authority),
        limits: Limits::default(),
        acks: Acks::default(),
        record,
        reports,
        metrics: metrics::Metrics::new()?,
    });
    let health = cell::Sender::new(Health::default());
    let pages = admin::Pages {
        health: health.subscribe(),
        shared: shared.clone(),
        log,
    };
    tokio::spawn(admin::serve(admin, pages));
    tokio::spawn(count_mistakes(health.subscribe(), shared.clone()));
    shared.acks.expect(recorded.nodes, Instant::now());
    let (changed, changes) = mpsc::channel(16);
    let indexing = Indexing {
        index: Index::new(settings.clone(), first, recorded.phases),
        changes,
        heard,
        publish,
        shared: shared.clone(),
        state: config.state_dir.clone(),
        stored: None,
    };
    tokio::spawn(indexing.run());
    let check: Check = Arc::new(move |object| index::check(object, &settings));
    let watching = watch_folder(config.config_dir.clone(), check, changed, health);

    let rotating = rotation::Rotation {
        config: config.clone(),
        shared: shared.clone(),
        certificate,
        addresses,
    };
    tokio::spawn(rotating.run());

    // Nothing is served before the folder has been read whole once (settled D18).
    let serving = async {
        let mut ready = world.clone();
        let _ = ready.wait_for(|world| world.number > first).await;
        for listener in listeners {
            let router = serve::router(&shared);
            tokio::spawn(router.serve_with_incoming(serve::incoming(listener, tls.clone())));
        }
        std::future::pending::<()>().await
    };
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        watched = watching => watched.with_context(|| format!("cannot watch {}", config.config_dir.display())),
        () = serving => Ok(()),
        _ = terminate.recv() => Ok(()),
    }
}

/// Counts what the folder was refused for.
async fn count_mistakes(mut health: cell::Receiver<Health>, shared: Arc<Shared>) {
    while health.changed().await.is_ok() {
        if !health.borrow_and_update().mistakes.is_empty() {
            shared.metrics.reloads.with_label_values(&["rejected"]).inc();
        }
    }
}

fn authority(config: &Config) -> anyhow::Result<Authority> {
    let authority = match rotation::files(config) {
        Some(files) => rotation::read(&files, config)?,
        None => {
            anyhow::ensure!(
                config.profile != config::Profile::High,
                "profile high does not start with a generated root; give --ca-cert, --ca-key and --ca-root"
            );
            Authority::generated(&config.state_dir, config.svid_ttl)?
        }
    };
    authority::write_public(&config.state_dir.join("root.pem"), authority.roots())?;
    Ok(authority)
}

/// The name of this source of configuration and the highest version it may have served, kept in the state
/// folder so that a restart never counts backwards.
fn version(state: &Path) -> anyhow::Result<(String, u64)> {
    let file = state.join("version");
    match fs::read_to_string(&file) {
        Ok(text) => {
            let (uid, number) = text
                .trim()
                .rsplit_once('/')
                .context("the version file is damaged; remove it")?;
            // Versions are stored in steps: after a restart the next one is above all that were served.
            Ok((
                uid.to_owned(),
                number
                    .parse::<u64>()
                    .context("the version file is damaged; remove it")?
                    + STEP,
            ))
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let mut bytes = [0; 8];
            let random = rustls::crypto::aws_lc_rs::default_provider().secure_random;
            random
                .fill(&mut bytes)
                .map_err(|_| anyhow::anyhow!("no random numbers"))?;
            Ok((format!("{:016x}", u64::from_be_bytes(bytes)), 0))
        }
        Err(error) => Err(error).with_context(|| file.display().to_string()),
    }
}

/// Versions between two writes of the counter.
const STEP: u64 = 1000;

/// How often those who wait for nodes are looked at: whether what nodes have taken has settled, and whether one
/// that is gone is waited for in vain.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// Between two tries to store what a restart must not forget.
const STORE_AGAIN: Duration = Duration::from_secs(1);

/// Tries until it is stored. Meanwhile nothing new is published, and what has been is served on: a restart that
/// did not know of it would take a newer state for an older one.
async fn stored(what: &str, mut store: impl FnMut() -> anyhow::Result<()>) {
    while let Err(error) = store() {
        tracing::error!(%error, "{what} cannot be stored; nothing new is published until it can");
        tokio::time::sleep(STORE_AGAIN).await;
    }
}

/// Takes what is new from folder and nodes, and publishes the world that follows.
struct Indexing {
    index: Index,
    changes: mpsc::Receiver<Vec<Change>>,
    heard: mpsc::Receiver<Report>,
    publish: cell::Sender<Arc<World>>,
    shared: Arc<Shared>,
    state: std::path::PathBuf,
    /// The version counter's last stored value.
    stored: Option<u64>,
}

impl Indexing {
    async fn run(mut self) {
        // Agents may report before the folder has been read, but nothing follows from that yet.
        let Some(mut changes) = self.changes.recv().await else {
            return;
        };
        let mut lowest = self.shared.acks.lowest();
        let mut settling = Settled::default();
        let mut reports = vec![];
        loop {
            while let Ok(more) = self.changes.try_recv() {
                changes.extend(more);
            }
            if !changes.is_empty() {
                let reloads = &self.shared.metrics.reloads;
                reloads.with_label_values(&["applied"]).inc();
            }
            while let Ok(report) = self.heard.try_recv() {
                reports.push(report);
            }
            let now = *lowest.borrow_and_update();
            let settled = settling.advance(now, Instant::now());
            let taken = Taken { now, settled };
            let mut world = self.index.apply(&changes, std::mem::take(&mut reports), taken);
            self.write_down().await;
            while let Some(new) = world {
                if !self.publish(new).await {
                    return;
                }
                let waits = self.index.waits();
                world = if waits {
                    self.index.apply(&[], vec![], taken)
                } else {
                    None
                };
                self.write_down().await;
            }
            changes = vec![];
            tokio::select! {
                more = self.changes.recv() => match more {
                    Some(more) => changes = more,
                    None => return,
                },
                Some(report) = self.heard.recv() => reports.push(report),
                Ok(()) = lowest.changed(), if self.index.waits() => {}
                () = tokio::time::sleep(LOOK_EVERY), if self.index.waits() => self.give_up(),
            }
        }
    }

    /// Pods' phases outlive this process, before anything that follows from them is published.
    async fn write_down(&mut self) {
        let (moved, record) = (self.index.moved(), &self.shared.record);
        let store = || Ok(record.phases(&moved, || self.index.phases())?);
        stored("how far pods are on their way", store).await;
    }

    /// Nodes that are gone for too long hold nobody up.
    fn give_up(&self) {
        for node in self.shared.acks.give_up(Instant::now()) {
            tracing::warn!(node, "it is gone, and not waited for any more");
            if let Err(error) = self.shared.record.node_left(&node) {
                tracing::warn!(node, %error, "a restart will wait for this node once more");
            }
        }
    }

    /// Publishes, and keeps the stored counter ahead of what a restart must not count below.
    async fn publish(&mut self, world: Arc<World>) -> bool {
        if self.stored.is_none_or(|stored| world.number >= stored + STEP) {
            let text = format!("{}/{}", self.shared.source, world.number);
            let file = self.state.join("version");
            stored("the version", || authority::write_public(&file, &text)).await;
            self.stored = Some(world.number);
        }
        tracing::debug!(
            version = world.number,
            pods = world.pod_count(),
            "configuration published"
        );
        self.shared.metrics.publish();
        self.publish.send(world).is_ok()
    }
}
