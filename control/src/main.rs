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
mod index;
mod serve;
mod watch;

use anyhow::Context;
use authority::Authority;
use clap::Parser;
use config::Config;
use index::{Settings, World};
use serve::{Shared, Tokens};
use std::{fs, os::unix::fs::DirBuilderExt, path::Path, sync::Arc};
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    sync::{mpsc, watch as cell},
};
use watch::files::{Latest, watch_folder};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let config = Config::parse();
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env("CULVERT_LOG").unwrap_or_else(|_| "info".into()),
        )
        .with_ansi(false)
        .init();
    if !config.state_dir.exists() {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&config.state_dir)?;
    }
    let settings = Settings::from(&config);
    let authority = authority(&config)?;
    let addresses: Vec<_> = config.listen.iter().map(|address| address.ip()).collect();
    let tls = serve::server_config(&authority, &config.server_name, &addresses)?;
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

    let latest = cell::Sender::new(Latest::default());
    let (source, first) = version(&config.state_dir)?;
    let (publish, world) = cell::channel(Arc::new(World {
        number: first,
        ..World::default()
    }));
    let (captures_changed, captures) = mpsc::channel(1);
    let shared = Arc::new(Shared {
        settings: settings.clone(),
        world: world.clone(),
        source,
        tokens: Tokens::read(&config.node_tokens)?,
        authority,
        captures: parking_lot::Mutex::default(),
        captures_changed,
    });
    tokio::spawn(admin::serve(admin, latest.subscribe(), world.clone()));
    let indexing = index_changes(
        latest.subscribe(),
        captures,
        publish,
        shared.clone(),
        config.state_dir.clone(),
    );
    tokio::spawn(indexing);
    let check = move |objects: &watch::objects::Objects| index::check(objects, &settings);
    let watching = watch_folder(config.config_dir.clone(), latest, check);

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

fn authority(config: &Config) -> anyhow::Result<Authority> {
    let read = |path: &Path| fs::read_to_string(path).with_context(|| path.display().to_string());
    let authority = match (&config.ca_cert, &config.ca_key, &config.ca_root) {
        (Some(cert), Some(key), Some(root)) => {
            Authority::from_pem(&read(cert)?, &read(key)?, &read(root)?, config.svid_ttl)?
        }
        _ => {
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

/// Builds and publishes a world after each change of objects or capture states.
async fn index_changes(
    mut latest: cell::Receiver<Latest>,
    mut captures: mpsc::Receiver<()>,
    publish: cell::Sender<Arc<World>>,
    shared: Arc<Shared>,
    state: std::path::PathBuf,
) {
    let mut stored = None;
    loop {
        tokio::select! {
            changed = latest.changed() => if changed.is_err() { return },
            Some(()) = captures.recv() => {}
        }
        let objects = latest.borrow_and_update().objects.clone();
        let states = shared.captures.lock().clone();
        let before = publish.borrow().clone();
        let world = index::build(&objects, &states, &shared.settings, &before);
        if stored.is_none_or(|stored| world.number >= stored + STEP) {
            let text = format!("{}/{}", shared.source, world.number);
            if let Err(error) = authority::write_public(&state.join("version"), &text) {
                tracing::error!(%error, "the version cannot be stored; a restart would count backwards");
                continue;
            }
            stored = Some(world.number);
        }
        tracing::info!(
            version = world.number,
            pods = world.pods.len(),
            "configuration published"
        );
        publish.send_replace(Arc::new(world));
    }
}
