//! Each load on each path, in alternating pairs.

use std::fs;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::calibrate::aes_gcm;
use crate::loads::{self, Done, Until};
use crate::report::{Floor, Report, Row, median};
use crate::stage::{COUNT_PORT, ECHO_PORT, PAGE_PORT, Path, Stage};
use crate::{Load, Options};

/// How long memory may take to come back after connections have closed.
const GIVEN_BACK_WITHIN: Duration = Duration::from_secs(15);

pub fn all(options: &Options, report: &mut Report) -> Result<()> {
    eprintln!("bench: building, and setting the stage");
    let stage = Stage::set()?;
    let time = Duration::from_secs(options.seconds);
    if options.wants(Load::Bulk) {
        let load = |path: Path<'_>| loads::bulk(path.client, path.to(COUNT_PORT), time);
        let pairs = Pairs::run("bulk", options.pairs, &stage, load)?;
        let gigabits = |rate: f64| format!("{:.1} Gbit/s", rate * 8.0 / 1e9);
        report
            .rows
            .push(pairs.row("bulk, 1 stream", gigabits, 1e9, "s/GB", 1.1));
        report.notes.push(pairs.agents_share("bulk"));
    }
    if options.wants(Load::KeepAlive) {
        let load = |path: Path<'_>| loads::keep_alive(path.client, path.to(PAGE_PORT), time);
        let pairs = Pairs::run("HTTP keep-alive", options.pairs, &stage, load)?;
        let name = "HTTP keep-alive, 16 connections";
        report.rows.push(pairs.row(name, thousands, 100e3, "s/100k", 4.0));
        report.notes.push(pairs.agents_share("keep-alive"));
    }
    if options.wants(Load::Connect) {
        let load = |path: Path<'_>| {
            let opened = loads::connections(path.client, path.to(ECHO_PORT), Until::Time(time), &|| ())?;
            anyhow::ensure!(opened.failed == 0, "{} connections failed", opened.failed);
            Ok(opened.done)
        };
        let pairs = Pairs::run("connect", options.pairs, &stage, load)?;
        let name = "connect + 1 B + close, 16 threads";
        report.rows.push(pairs.row(name, thousands, 10e3, "s/10k", 2.5));
        report.notes.push(pairs.agents_share("connect"));
    }
    if options.wants(Load::Churn) {
        churn(options, &stage, report)?;
    }
    if options.wants(Load::Idle) {
        idle(options, &stage, report)?;
    }
    let aes = (0..5).map(|_| aes_gcm()).collect::<Result<Vec<_>>>()?;
    report.notes.push(format!(
        "calibration: AES-256-GCM seals 1 GB in {:.2} s of CPU; the mesh does so, and opens it, once each",
        median(aes)
    ));
    report.notes.push(machine()?);
    Ok(())
}

fn thousands(rate: f64) -> String {
    format!("{:.1}k/s", rate / 1e3)
}

/// Cores and kernel, and nothing else of the machine.
fn machine() -> Result<String> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let version = release.split('-').next().unwrap_or_default().trim();
    Ok(format!(
        "{} cores, Linux {version}",
        thread::available_parallelism()?
    ))
}

/// What was measured, pair by pair.
#[derive(Default)]
struct Pairs {
    raw: Vec<f64>,
    relay: Vec<f64>,
    mesh: Vec<f64>,
    /// Seconds of CPU per unit.
    relay_cpu: Vec<f64>,
    mesh_cpu: Vec<f64>,
    agents_cpu: Vec<f64>,
}

impl Pairs {
    fn run(name: &str, count: usize, stage: &Stage, load: impl Fn(Path<'_>) -> Result<Done>) -> Result<Self> {
        let mut pairs = Self::default();
        for pair in 1..=count {
            pairs.raw.push(load(stage.raw())?.rate());
            let before = stage.relay_cpu()?;
            let done = load(stage.relay())?;
            pairs.relay.push(done.rate());
            pairs.relay_cpu.push(per_unit(stage.relay_cpu()? - before, done));
            let (before, agents) = (stage.cpu()?, stage.agents_cpu()?);
            let done = load(stage.mesh())?;
            pairs.mesh.push(done.rate());
            let (cpu, agents) = (stage.cpu()? - before, stage.agents_cpu()? - agents);
            pairs.mesh_cpu.push(per_unit(cpu, done));
            pairs.agents_cpu.push(agents.as_secs_f64() / cpu.as_secs_f64());
            eprintln!(
                "bench: {name}, pair {pair} of {count}: {:.3e} raw, {:.3e} relayed, {:.3e} meshed a second, {:.3e} s of CPU each",
                pairs.raw[pair - 1],
                pairs.relay[pair - 1],
                pairs.mesh[pair - 1],
                pairs.mesh_cpu[pair - 1]
            );
        }
        Ok(pairs)
    }

    fn row(
        self: &Pairs,
        load: &str,
        rate: impl Fn(f64) -> String,
        per: f64,
        unit: &'static str,
        floor: f64,
    ) -> Row {
        let relay_cpu = median(self.relay_cpu.clone()) * per;
        let measured = median(self.mesh_cpu.clone()) * per;
        Row {
            load: load.to_owned(),
            raw: rate(median(self.raw.clone())),
            relay: format!("{}, {relay_cpu:.2} {unit}", rate(median(self.relay.clone()))),
            mesh: rate(median(self.mesh.clone())),
            measured,
            floor: Floor::AtMost(floor),
            unit,
        }
    }

    fn agents_share(&self, load: &str) -> String {
        let share = median(self.agents_cpu.clone()) * 100.0;
        format!("{load}: {share:.0} % of that CPU is the agents'")
    }
}

fn per_unit(cpu: Duration, done: Done) -> f64 {
    cpu.as_secs_f64() / done.units
}

fn churn(options: &Options, stage: &Stage, report: &mut Report) -> Result<()> {
    let (mut ratios, mut cpu_ratios, mut raw, mut first, mut last) = (vec![], vec![], vec![], vec![], vec![]);
    let mut failed = 0;
    for run in 1..=options.long_pairs {
        for (path, is_mesh) in [(stage.raw(), false), (stage.mesh(), true)] {
            let cpu = Mutex::new(vec![stage.cpu()?]);
            let note = || {
                if let Ok(now) = stage.cpu() {
                    cpu.lock().expect("nobody panics here").push(now);
                }
            };
            let until = Until::Count(options.churn);
            let opened = loads::connections(path.client, path.to(ECHO_PORT), until, &note)?;
            let fifth = options.churn as f64 / 5.0;
            if !is_mesh {
                raw.push(opened.done.rate());
                continue;
            }
            failed += opened.failed;
            let [one, .., four, five] = opened.fifths[..] else {
                // Connections failed: the last fifth never came.
                ratios.push(0.0);
                continue;
            };
            let (start, end) = (fifth / one.as_secs_f64(), fifth / (five - four).as_secs_f64());
            ratios.push(end / start);
            first.push(start);
            last.push(end);
            let cpu = cpu.into_inner().unwrap_or_default();
            if let [zero, one, .., four, five] = cpu[..] {
                cpu_ratios.push((one - zero).as_secs_f64() / (five - four).as_secs_f64());
            }
            eprintln!(
                "bench: churn, run {run} of {}: {start:.0}/s in the first fifth, {end:.0}/s in the last",
                options.long_pairs
            );
        }
    }
    if failed > 0 {
        report.notes.push(format!("churn: {failed} connections FAILED"));
        ratios.push(0.0);
    }
    report.notes.push(format!(
        "churn: CPU per connection of the first fifth is {:.2} of the last one's",
        median(cpu_ratios)
    ));
    report.rows.push(Row {
        load: format!("churn, {}k connections", options.churn / 1000),
        raw: thousands(median(raw)),
        relay: "–".to_owned(),
        mesh: format!("{} → {}", thousands(median(first)), thousands(median(last))),
        measured: median(ratios),
        floor: Floor::AtLeast(0.9),
        unit: "last : first fifth",
    });
    Ok(())
}

fn idle(options: &Options, stage: &Stage, report: &mut Report) -> Result<()> {
    let path = stage.mesh();
    let (mut each, mut back) = (vec![], vec![]);
    for run in 1..=options.long_pairs {
        let before = settled(stage)?;
        let open = loads::idle(path.client, path.to(ECHO_PORT), options.idle)?;
        thread::sleep(Duration::from_secs(2));
        let during = stage.memory()?;
        drop(open);
        let start = Instant::now();
        let grown = during.saturating_sub(before);
        let mut after = stage.memory()?;
        // What stays is compared with what was there before: all of it is given back when nothing stays.
        while after > before + grown / 10 && start.elapsed() < GIVEN_BACK_WITHIN {
            thread::sleep(Duration::from_millis(250));
            after = stage.memory()?;
        }
        let count = options.idle as f64;
        each.push(grown as f64 / count / 1e3);
        back.push(1.0 - after.saturating_sub(before) as f64 / grown as f64);
        eprintln!(
            "bench: idle, run {run} of {}: {:.0} kB before, {:.0} kB with, {:.0} kB after {:.1} s",
            options.long_pairs,
            before as f64 / 1e3,
            during as f64 / 1e3,
            after as f64 / 1e3,
            start.elapsed().as_secs_f64()
        );
    }
    report.rows.push(Row {
        load: format!("idle, {} connections, both sides", options.idle),
        raw: "–".to_owned(),
        relay: "–".to_owned(),
        mesh: format!("{:.1} kB each", median(each.clone())),
        measured: median(each),
        floor: Floor::AtMost(8.0),
        unit: "kB each",
    });
    report.rows.push(Row {
        load: "idle, memory given back after close".to_owned(),
        raw: "–".to_owned(),
        relay: "–".to_owned(),
        mesh: "–".to_owned(),
        measured: median(back),
        floor: Floor::AtLeast(0.8),
        unit: "of it",
    });
    Ok(())
}

/// The mesh's memory once what other loads left has gone.
fn settled(stage: &Stage) -> Result<u64> {
    let mut last = stage.memory()?;
    for _ in 0..10 {
        thread::sleep(Duration::from_secs(1));
        let now = stage.memory()?;
        if now.abs_diff(last) < 64 << 10 {
            return Ok(now);
        }
        last = now;
    }
    Ok(last)
}
