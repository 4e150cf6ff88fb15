//! The mesh bench: no mesh and Culvert, alternating in one run, on this machine.
//!
//! ```text
//! stage (lab, mesh, servers) ──▶ loads, in pairs: raw, relay, mesh ──▶ medians ──▶ table, verdict
//! ```
//! Invariant: what is compared with a floor is CPU per unit of work, or memory, which a busy machine
//! changes little; rates stand beside it for the reader. Every figure is the median of its pairs.

#![forbid(unsafe_code)]

mod calibrate;
mod cost;
mod loads;
mod measure;
mod report;
mod scale;
mod serve;
mod stage;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, ValueEnum};

/// Measures what the mesh costs, and says whether the floors hold.
#[derive(Debug, Parser)]
#[command(name = "mesh")]
pub struct Options {
    /// Alternating pairs of the short loads.
    #[arg(long, default_value_t = 5)]
    pairs: usize,
    /// Runs of the long ones: churn, idle, scale.
    #[arg(long, default_value_t = 3)]
    long_pairs: usize,
    /// Seconds that a short load runs.
    #[arg(long, default_value_t = 3)]
    seconds: u64,
    /// Connections of the churn.
    #[arg(long, default_value_t = 60_000)]
    churn: u64,
    /// Connections that are left idle.
    #[arg(long, default_value_t = 5_000)]
    idle: usize,
    /// Workloads that one ztunnel learns.
    #[arg(long, default_value_t = 100_000)]
    workloads: usize,
    /// Only these loads; all of them without.
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Load>,
    /// What `cargo bench` says to every bench.
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Load {
    Bulk,
    KeepAlive,
    Connect,
    Churn,
    Idle,
    Scale,
}

impl Options {
    fn wants(&self, load: Load) -> bool {
        self.only.is_empty() || self.only.contains(&load)
    }
}

fn main() -> ExitCode {
    let options = Options::parse();
    match run(&options) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// Measures all that is wanted; true if every floor holds.
fn run(options: &Options) -> Result<bool> {
    let mut report = report::Report::default();
    if [
        Load::Bulk,
        Load::KeepAlive,
        Load::Connect,
        Load::Churn,
        Load::Idle,
    ]
    .iter()
    .any(|load| options.wants(*load))
    {
        measure::all(options, &mut report)?;
    }
    if options.wants(Load::Scale) {
        scale::measure(options, &mut report)?;
    }
    report.print();
    Ok(report.holds())
}
