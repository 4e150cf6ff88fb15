//! What processes and threads have used, as the kernel counts it.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};

/// Ticks of `/proc/PID/stat`: 100 a second on every Linux that there is.
const TICK: Duration = Duration::from_millis(10);

/// CPU time of a process, its ended threads included.
pub fn cpu_of(pid: u32) -> Result<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name, which may hold anything, ends with the last parenthesis; user and system time are the
    // 14th and 15th field.
    let fields = stat.rsplit_once(')').context("no name in stat")?.1;
    let ticks: u32 = fields
        .split_whitespace()
        .skip(11)
        .take(2)
        .map(|field| field.parse::<u32>())
        .sum::<Result<u32, _>>()?;
    Ok(TICK * ticks)
}

/// CPU time of the calling thread.
pub fn cpu_of_this_thread() -> Result<Duration> {
    cpu_in("/proc/thread-self/schedstat")
}

/// CPU time that a thread's `schedstat` shows.
pub fn cpu_in(schedstat: &str) -> Result<Duration> {
    let stat = fs::read_to_string(schedstat)?;
    let nanoseconds = stat.split_whitespace().next().context("an empty schedstat")?;
    Ok(Duration::from_nanos(nanoseconds.parse()?))
}

/// Resident memory of a process, in bytes.
pub fn memory_of(pid: u32) -> Result<u64> {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let kilobytes = rollup
        .lines()
        .find_map(|line| line.strip_prefix("Rss:")?.trim().strip_suffix(" kB"))
        .context("no Rss in smaps_rollup")?;
    Ok(kilobytes.trim().parse::<u64>()? * 1024)
}
