//! The programs under test, built by cargo in the profile of the caller.
//!
//! Invariant: what is tested is what the checkout says now; paths come from cargo's own messages.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
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
            "--message-format=json-render-diagnostics",
            "-p",
            "culvert-control",
            "-p",
            "culvert-ztunnel",
            "-p",
            "culvert-ztunnel-agent",
        ]);
    // A release build takes minutes: cargo shows where it is.
    cargo.arg(if cfg!(debug_assertions) {
        "--quiet"
    } else {
        "--release"
    });
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
    let reachable = reachable_folder()?;
    let mut reach = |name: &str| reach(&take(name)?, &reachable.join(name));
    Ok(Programs {
        control: reach("control")?,
        agent: reach("ztunnel-agent")?,
        ztunnel: reach("ztunnel")?,
    })
}

const REACHABLE: &str = "culvert-programs-";

/// A folder that every user may enter, for this process alone; folders of processes that are gone go.
///
/// A build below somebody's home is not for ztunnel's user to start.
fn reachable_folder() -> Result<PathBuf> {
    let temporary = std::env::temp_dir();
    for entry in fs::read_dir(&temporary)?.flatten() {
        let name = entry.file_name();
        let owner = name.to_str().and_then(|name| name.strip_prefix(REACHABLE));
        if owner.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
    let folder = temporary.join(format!("{REACHABLE}{}", std::process::id()));
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir(&folder).with_context(|| folder.display().to_string())?;
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o755))?;
    Ok(folder)
}

/// Puts a program there: by another link to the same file, or a copy on another file system.
fn reach(program: &Path, there: &Path) -> Result<PathBuf> {
    if fs::hard_link(program, there).is_err() {
        fs::copy(program, there).with_context(|| there.display().to_string())?;
    }
    Ok(there.to_owned())
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
