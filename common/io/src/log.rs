//! The log of a program: one record per line, written by a thread of its own.
//!
//! ```text
//! event ──▶ filter (may change at run time) ──▶ one line ──▶ bounded queue ──▶ standard output
//!                                                             └ full: dropped, counted
//! ```
//! Invariant: a record is one line whatever its fields hold, and nobody waits for whoever reads the log.

mod line;

pub use line::Format;

use line::Lines;
use parking_lot::Mutex;
use std::sync::Arc;
use tracing_appender::non_blocking::{ErrorCounter, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::{EnvFilter, Registry, layer::SubscriberExt, reload, util::SubscriberInitExt};

/// Lines that wait for a reader; a few megabytes.
const QUEUED_LINES: usize = 8192;

/// Longest filter that is taken.
const MAX_FILTER: usize = 4096;

/// Why there is no such log.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    #[error("{filter:?} is not a log filter: {why}")]
    Filter { filter: String, why: String },
    #[error("a log filter of {0} bytes is too long; at most {MAX_FILTER} are read")]
    Long(usize),
    #[error("the log was started before")]
    Twice,
}

/// The running log. Clones share it.
#[derive(Clone)]
pub struct Log(Arc<Running>);

struct Running {
    handle: reload::Handle<EnvFilter, Registry>,
    first: String,
    current: Mutex<String>,
    dropped: ErrorCounter,
}

/// Writes out what is queued when it is dropped, for at most a second.
#[must_use = "dropped, it ends the log"]
pub struct Flush {
    _worker: WorkerGuard,
}

/// Starts the process's log on standard output, with a filter in the syntax of `EnvFilter`. The thread that
/// writes is started here: it has the privileges that the caller has now.
pub fn start(filter: &str, format: Format) -> Result<(Log, Flush), LogError> {
    let parsed = parse(filter)?;
    let (writer, worker) = NonBlockingBuilder::default()
        .lossy(true)
        .buffered_lines_limit(QUEUED_LINES)
        .thread_name("log")
        .finish(std::io::stdout());
    let dropped = writer.error_counter();
    let (filtered, handle) = reload::Layer::new(parsed);
    let lines = tracing_subscriber::fmt::layer()
        .event_format(Lines(format))
        .with_ansi(false)
        .with_writer(writer);
    tracing_subscriber::registry()
        .with(filtered)
        .with(lines)
        .try_init()
        .map_err(|_| LogError::Twice)?;
    let log = Log(Arc::new(Running {
        handle,
        first: filter.to_owned(),
        current: Mutex::new(filter.to_owned()),
        dropped,
    }));
    Ok((log, Flush { _worker: worker }))
}

fn parse(filter: &str) -> Result<EnvFilter, LogError> {
    if filter.len() > MAX_FILTER {
        return Err(LogError::Long(filter.len()));
    }
    EnvFilter::try_new(filter).map_err(|error| LogError::Filter {
        filter: filter.to_owned(),
        why: error.to_string(),
    })
}

impl Log {
    /// The filter in force.
    pub fn filter(&self) -> String {
        self.0.current.lock().clone()
    }

    /// Puts another filter in force, at once.
    pub fn set(&self, filter: &str) -> Result<(), LogError> {
        let parsed = parse(filter)?;
        let mut current = self.0.current.lock();
        self.0.handle.reload(parsed).map_err(|_| LogError::Twice)?;
        filter.clone_into(&mut current);
        Ok(())
    }

    /// Puts the filter of the start back.
    pub fn reset(&self) -> Result<(), LogError> {
        self.set(&self.0.first.clone())
    }

    /// Lines that nobody took in time.
    pub fn dropped(&self) -> u64 {
        self.0.dropped.dropped_lines() as u64
    }
}
