//! Figures of one path: round trips, new connections, throughput.
//!
//! Invariant: both paths are measured by the same code, alternating, so that the machine's mood is shared.

use std::io::Read;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use culvert_e2e::lab::Endpoint;
use culvert_e2e::traffic::{echo_once, send_pattern};

const WAIT: Duration = Duration::from_secs(30);

/// Times of single events, sorted.
pub struct Times(Vec<Duration>);

impl Times {
    pub fn percentile(&self, percent: usize) -> Duration {
        let last = self.0.len().saturating_sub(1);
        self.0
            .get((self.0.len() * percent / 100).min(last))
            .copied()
            .unwrap_or_default()
    }
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

/// Gigabits a second of one stream, whose digest is checked.
pub fn throughput(from: &Endpoint, to: SocketAddr, bytes: u64) -> Result<f64> {
    let socket = from.connect(to)?;
    socket.set_read_timeout(Some(WAIT))?;
    let start = Instant::now();
    let sent = send_pattern(&socket, bytes, 3)?;
    let mut arrived = String::new();
    (&socket).read_to_string(&mut arrived)?;
    let took = start.elapsed();
    ensure!(arrived == sent, "the digest of {bytes} bytes differs");
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
