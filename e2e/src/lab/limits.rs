//! Limits of memory and processor time, by control groups of either version.
//!
//! Invariant: a group is empty and gone when its `Limits` is dropped after its processes. Control groups
//! are folders, which a killed owner leaves behind empty: the next one to make a group sweeps them.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

const ROOT: &str = "/sys/fs/cgroup";
const PREFIX: &str = "culvert-lab.";

/// A group of processes that share limits.
#[derive(Debug)]
pub struct Limits {
    /// Where a process is put: one folder, or one for each controller of version 1.
    folders: Vec<PathBuf>,
}

impl Limits {
    /// At most `memory` bytes, and at most `cpu` processors (0.2: a fifth of one).
    pub fn new(memory: Option<u64>, cpu: Option<f64>) -> Result<Self> {
        sweep();
        if Path::new(ROOT).join("cgroup.controllers").is_file() {
            return Self::unified(memory, cpu);
        }
        let mut limits = Self { folders: Vec::new() };
        if let Some(bytes) = memory {
            let folder = limits.folder("memory")?;
            set(&folder, "memory.limit_in_bytes", &bytes.to_string())?;
        }
        if let Some(cpu) = cpu {
            let folder = limits.folder("cpu")?;
            set(&folder, "cpu.cfs_period_us", &PERIOD_US.to_string())?;
            set(&folder, "cpu.cfs_quota_us", &quota_us(cpu).to_string())?;
        }
        Ok(limits)
    }

    fn unified(memory: Option<u64>, cpu: Option<f64>) -> Result<Self> {
        set(Path::new(ROOT), "cgroup.subtree_control", "+memory +cpu")?;
        let mut limits = Self { folders: Vec::new() };
        let folder = limits.folder("")?;
        if let Some(bytes) = memory {
            set(&folder, "memory.max", &bytes.to_string())?;
        }
        if let Some(cpu) = cpu {
            set(&folder, "cpu.max", &format!("{} {PERIOD_US}", quota_us(cpu)))?;
        }
        Ok(limits)
    }

    /// Puts a process, and those that it will start, under these limits.
    pub fn take(&self, pid: u32) -> Result<()> {
        self.folders
            .iter()
            .try_for_each(|folder| set(folder, "cgroup.procs", &pid.to_string()))
    }

    fn folder(&mut self, controller: &str) -> Result<PathBuf> {
        static SERIAL: AtomicU64 = AtomicU64::new(0);
        let parent = Path::new(ROOT).join(controller);
        ensure!(
            parent.is_dir(),
            "this machine has no control groups at {}",
            parent.display()
        );
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        let folder = parent.join(format!("{PREFIX}{}.{serial}", std::process::id()));
        fs::create_dir(&folder).with_context(|| folder.display().to_string())?;
        self.folders.push(folder.clone());
        Ok(folder)
    }
}

impl Drop for Limits {
    fn drop(&mut self) {
        for folder in &self.folders {
            // A group is busy for a moment after its last process.
            for _ in 0..100 {
                if fs::remove_dir(folder).is_ok() {
                    break;
                }
                thread::sleep(Duration::from_millis(5));
            }
        }
    }
}

const PERIOD_US: u32 = 100_000;

fn quota_us(cpu: f64) -> u32 {
    (cpu * f64::from(PERIOD_US)) as u32
}

fn set(folder: &Path, file: &str, value: &str) -> Result<()> {
    let path = folder.join(file);
    fs::write(&path, value).with_context(|| format!("{value:?} to {}", path.display()))
}

/// Removes groups whose owner is gone.
fn sweep() {
    for parent in ["", "memory", "cpu"].map(|controller| Path::new(ROOT).join(controller)) {
        for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let owner = name
                .to_str()
                .and_then(|name| name.strip_prefix(PREFIX)?.split('.').next());
            if owner.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
                let _ = fs::remove_dir(entry.path());
            }
        }
    }
}
