//! The programs under test, built by cargo in the profile of the caller.
//!
//! Invariant: what is tested is what the checkout says now; paths come from cargo's own messages.

use std::collections::HashMap;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use anyhow::{Context, Result, anyhow, ensure};

/// Paths of the three programs of the mesh.
#[derive(Debug, Clone)]
pub struct Programs {
    pub control: PathBuf,
    pub agent: PathBuf,
    pub ztunnel: PathBuf,
}

/// A folder that holds the three programs already, instead of a build: a release that somebody made.
const PREBUILT: &str = "CULVERT_E2E_PROGRAMS";

/// Builds the programs, once for this process.
pub fn programs() -> Result<&'static Programs> {
    static BUILT: OnceLock<Result<Programs, String>> = OnceLock::new();
    let built = BUILT.get_or_init(|| build().map_err(|error| format!("{error:#}")));
    built.as_ref().map_err(|error| anyhow!("{error}"))
}

fn build() -> Result<Programs> {
    if let Some(folder) = std::env::var_os(PREBUILT) {
        let folder = PathBuf::from(folder);
        let [control, agent, ztunnel] = ["control", "ztunnel-agent", "ztunnel"].map(|name| folder.join(name));
        return Ok(Programs {
            control,
            agent,
            ztunnel,
        });
    }
    let _lock = crate::prerequisites::lock("build")?;
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
        .args([
            "build",
            "--quiet",
            "--message-format=json-render-diagnostics",
            "-p",
            "culvert-control",
            "-p",
            "culvert-ztunnel",
            "-p",
            "culvert-ztunnel-agent",
        ]);
    if !cfg!(debug_assertions) {
        cargo.arg("--release");
    }
    let output = cargo
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .context("cannot run cargo")?;
    ensure!(output.status.success(), "cargo build: {}", output.status);
    let mut found = executables(&output.stdout);
    let mut take = |name: &str| {
        found
            .remove(name)
            .with_context(|| format!("cargo built no program {name}"))
    };
    Ok(Programs {
        control: take("control")?,
        agent: take("ztunnel-agent")?,
        ztunnel: take("ztunnel")?,
    })
}

/// Programs by name, from cargo's messages: one JSON object a line.
fn executables(messages: &[u8]) -> HashMap<String, PathBuf> {
    messages
        .split(|&byte| byte == b'\n')
        .filter_map(|line| serde_json::from_slice::<serde_json::Value>(line).ok())
        .filter(|message| message["reason"] == "compiler-artifact")
        .filter_map(|message| {
            let path = PathBuf::from(message["executable"].as_str()?);
            Some((message["target"]["name"].as_str()?.to_owned(), path))
        })
        .collect()
}
