//! What the kernel says of this process, and which build it is.

use super::{Declared, Page};
use std::{fs, sync::OnceLock};

crate::read_metrics! { pub DECLARED = {
    /// Build that runs; always 1.
    BUILD: "gauge" = "istio_build" ["component", "tag"],
    /// Processor time of the process, user and system.
    CPU: "counter" = "process_cpu_seconds_total" [],
    /// Memory of the process that is in RAM.
    RESIDENT: "gauge" = "process_resident_memory_bytes" [],
    /// Most memory of the process that was in RAM.
    PEAK: "gauge" = "process_peak_resident_memory_bytes" [],
    /// File descriptors open now.
    OPEN_FDS: "gauge" = "process_open_fds" [],
    /// File descriptors that the process may have open.
    MAX_FDS: "gauge" = "process_max_fds" [],
    /// Threads of the process.
    THREADS: "gauge" = "process_threads" [],
    /// When the process started, in seconds since 1970.
    START: "gauge" = "process_start_time_seconds" [],
} }

/// Shows them; what cannot be read is left out.
pub fn show(page: &mut Page, component: &str) {
    page.family(&BUILD)
        .sample(&[component, env!("CARGO_PKG_VERSION")], 1.0);
    let mut show = |declared: &Declared, value: Option<f64>| {
        if let Some(value) = value {
            page.one(declared, value);
        }
    };
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().next()?.parse::<f64>().ok()
    };
    show(&CPU, cpu_seconds());
    show(&RESIDENT, field("VmRSS:").map(|kib| kib * 1024.0));
    show(&PEAK, field("VmHWM:").map(|kib| kib * 1024.0));
    show(&THREADS, field("Threads:"));
    // The folder that is being read is one of them.
    show(
        &OPEN_FDS,
        fs::read_dir("/proc/self/fd")
            .ok()
            .map(|all| all.count().saturating_sub(1) as f64),
    );
    show(&MAX_FDS, max_fds());
    show(&START, started());
}

fn cpu_seconds() -> Option<f64> {
    // Fields 14 and 15, in ticks, which are hundredths of a second on every Linux (USER_HZ); the name in
    // parentheses may hold anything.
    let stat = fs::read_to_string("/proc/self/stat").ok()?;
    let after = stat.rsplit_once(')')?.1;
    let mut fields = after.split_whitespace().skip(11);
    let user: f64 = fields.next()?.parse().ok()?;
    let system: f64 = fields.next()?.parse().ok()?;
    Some((user + system) / 100.0)
}

fn max_fds() -> Option<f64> {
    let limits = fs::read_to_string("/proc/self/limits").ok()?;
    let line = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max open files"))?;
    line.split_whitespace().next()?.parse().ok()
}

fn started() -> Option<f64> {
    static STARTED: OnceLock<Option<f64>> = OnceLock::new();
    *STARTED.get_or_init(|| {
        let stat = fs::read_to_string("/proc/self/stat").ok()?;
        let ticks: f64 = stat
            .rsplit_once(')')?
            .1
            .split_whitespace()
            .nth(19)?
            .parse()
            .ok()?;
        let system = fs::read_to_string("/proc/stat").ok()?;
        let boot = system.lines().find_map(|line| line.strip_prefix("btime "))?;
        Some(boot.trim().parse::<f64>().ok()? + ticks / 100.0)
    })
}
