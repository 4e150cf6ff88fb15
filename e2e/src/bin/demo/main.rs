//! The demo: a mesh of two nodes and two tenants on this machine, and what it does, in about a minute.
//!
//! ```text
//! stage (lab, mesh, pods, real servers) ──▶ scenes, one after the other ──▶ table, exit code
//! ```
//! Invariant: a scene shows what it measured, and a scene that does not show what it should fails the demo.

#![forbid(unsafe_code)]

mod measure;
mod scenes;
mod stage;

use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;
use clap::Parser;
use comfy_table::{ContentArrangement, Table, presets};
use stage::Stage;

/// Brings up a mesh on this machine and shows what it does.
#[derive(Debug, Parser)]
#[command(name = "demo", version)]
struct Options {
    /// Leaves the mesh running at the end, until Ctrl-C, and prints how to look around in it.
    #[arg(long)]
    keep: bool,
}

/// One line of the result: what was looked at, and what was seen.
struct Row {
    what: String,
    seen: String,
}

fn row(what: impl Into<String>, seen: impl Into<String>) -> Row {
    Row {
        what: what.into(),
        seen: seen.into(),
    }
}

type Scene = fn(&Stage) -> Result<Vec<Row>>;

const SCENES: [(&str, Scene); 8] = [
    ("What is captured", scenes::captured),
    ("Who talks to whom", scenes::identities),
    ("What crosses the link between the nodes", scenes::link),
    ("A call that is allowed, and one that is not", scenes::refusal),
    ("A policy that cuts an open connection", scenes::cut),
    ("ztunnel killed under load", scenes::kill),
    ("Latency against no mesh", scenes::latency),
    ("Throughput against no mesh", scenes::throughput),
];

fn main() -> ExitCode {
    let options = Options::parse();
    match run(&options) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(failed) => {
            eprintln!(
                "demo: {failed} of {} scenes did not show what they should",
                SCENES.len()
            );
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Plays every scene; returns how many failed.
fn run(options: &Options) -> Result<usize> {
    let start = Instant::now();
    let progress = |what: &str| eprintln!("{:>5.1} s  {what}", start.elapsed().as_secs_f64());
    let stage = Stage::set(&progress)?;
    let mut table = Table::new();
    table
        .load_style(presets::UTF8_BORDERS_ONLY)
        .set_content_arrangement(ContentArrangement::Dynamic);
    table.set_header(["", "scene", "seen"]);
    let mut failed = 0;
    for (number, (title, scene)) in (1..).zip(SCENES) {
        progress(&format!("scene {number} of {}: {title}", SCENES.len()));
        let (mark, rows) = match scene(&stage) {
            Ok(rows) => ("ok", rows),
            Err(error) => {
                failed += 1;
                ("FAILED", vec![row("", format!("{error:#}"))])
            }
        };
        if number > 1 {
            table.add_row(["", "", ""]);
        }
        table.add_row([mark, title, ""]);
        for Row { what, seen } in rows {
            table.add_row(["", &format!("  {what}"), &seen]);
        }
    }
    println!("{table}");
    progress("done");
    if options.keep {
        stage.tour();
        println!("The mesh runs until Ctrl-C.");
        loop {
            std::thread::park();
        }
    }
    Ok(failed)
}
