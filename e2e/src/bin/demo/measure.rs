//! Figures of one path: round trips, new connections, throughput.
//!
//! Invariant: both paths are measured by the same code, alternating, so that the machine's mood is shared.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use culvert_e2e::lab::Endpoint;
use culvert_e2e::traffic::echo_once;

const WAIT: Duration = Duration::from_secs(30);

/// How often each path is measured; the paths take turns.
const TURNS: usize = 3;

/// Times of single events, sorted.
#[derive(Default)]
pub struct Times(Vec<Duration>);

impl Times {
    fn add(&mut self, more: Self) {
        self.0.extend(more.0);
        self.0.sort_unstable();
    }

    pub fn percentile(&self, percent: usize) -> Duration {
        let last = self.0.len().saturating_sub(1);
        self.0
            .get((self.0.len() * percent / 100).min(last))
            .copied()
            .unwrap_or_default()
    }
}

/// Times of two paths that take turns.
pub fn by_turns(
    mut one: impl FnMut() -> Result<Times>,
    mut other: impl FnMut() -> Result<Times>,
) -> Result<[Times; 2]> {
    let mut both = [Times::default(), Times::default()];
    for _ in 0..TURNS {
        both[0].add(one()?);
        both[1].add(other()?);
    }
    Ok(both)
}

/// `count` echoes of 64 bytes over one connection.
pub fn round_trips(from: &Endpoint, to: SocketAddr, count: usize) -> Result<Times> {
    let socket = from.connect(to)?;
    socket.set_nodelay(true)?;
    socket.set_read_timeout(Some(WAIT))?;
    timed(count, || echo_once(&socket, &[7; 64]))
}

/// `count` connections, each with one echo.
pub fn connections(from: &Endpoint, to: SocketAddr, count: usize) -> Result<Times> {
    from.inside(|| {
        timed(count, || {
            let socket = std::net::TcpStream::connect_timeout(&to, WAIT)?;
            socket.set_read_timeout(Some(WAIT))?;
            echo_once(&socket, &[7; 64])
        })
    })?
}

/// The middle one of figures of two paths that take turns.
pub fn medians(
    mut one: impl FnMut() -> Result<f64>,
    mut other: impl FnMut() -> Result<f64>,
) -> Result<[f64; 2]> {
    let mut both = [Vec::new(), Vec::new()];
    for _ in 0..TURNS {
        both[0].push(one()?);
        both[1].push(other()?);
    }
    Ok(both.map(|mut figures| {
        figures.sort_unstable_by(f64::total_cmp);
        figures[TURNS / 2]
    }))
}

/// Gigabits a second of one stream, all of which is counted where it arrives. A digest would cost more than
/// the path.
pub fn throughput(from: &Endpoint, to: SocketAddr, bytes: u64) -> Result<f64> {
    let mut socket = from.connect(to)?;
    socket.set_read_timeout(Some(WAIT))?;
    let block = vec![7; 256 << 10];
    let start = Instant::now();
    for _ in 0..bytes / block.len() as u64 {
        socket.write_all(&block)?;
    }
    socket.shutdown(Shutdown::Write)?;
    let mut arrived = String::new();
    socket.read_to_string(&mut arrived)?;
    let took = start.elapsed();
    ensure!(arrived == bytes.to_string(), "{arrived} of {bytes} bytes arrived");
    Ok(bytes as f64 * 8.0 / took.as_secs_f64() / 1e9)
}

fn timed(count: usize, mut event: impl FnMut() -> Result<()>) -> Result<Times> {
    let mut times = Vec::with_capacity(count);
    for _ in 0..count {
        let start = Instant::now();
        event()?;
        times.push(start.elapsed());
    }
    times.sort_unstable();
    Ok(Times(times))
}
