//! The command line, read once into checked values.

use clap::{Parser, ValueEnum};
use culvert_io::log::Format;
use std::{net::SocketAddr, path::PathBuf, time::Duration};

/// The node's L4 proxy: captures pods' connections and carries them by HBONE.
#[derive(Debug, Clone, Parser)]
#[command(name = "ztunnel", version, about)]
pub struct Config {
    /// Socket on which the node's agent hands over listeners and sockets.
    #[arg(
        long,
        env = "CULVERT_AGENT_SOCKET",
        default_value = "/run/culvert/ztunnel.sock"
    )]
    pub agent_socket: PathBuf,

    /// Control plane, `https://host-or-ip:15012`.
    #[arg(long, env = "CULVERT_CONTROL")]
    pub control: String,

    /// PEM bundle that the control plane's certificate is verified against.
    #[arg(long, env = "CULVERT_CONTROL_CA")]
    pub control_ca: PathBuf,

    /// Name in the control plane's certificate.
    #[arg(
        long,
        env = "CULVERT_CONTROL_NAME",
        default_value = "control.culvert-system.svc"
    )]
    pub control_name: String,

    /// File with this node's token, sent with every call.
    #[arg(long, env = "CULVERT_TOKEN")]
    pub token: PathBuf,

    /// Name of this node.
    #[arg(long, env = "CULVERT_NODE")]
    pub node: String,

    /// Folder for the last good state (mode 0700): with it a restart serves while control is away. Without,
    /// none is kept.
    #[arg(long, env = "CULVERT_STATE_DIR")]
    pub state_dir: Option<PathBuf>,

    /// PEM file of certificate revocation lists, watched. While it cannot be read at the start, this ztunnel
    /// is not ready; later the last good lists stay in force. It must hold a list of each issuer, roots and
    /// intermediates of every trust domain: without one, what that issuer has signed is refused.
    #[arg(long, env = "CULVERT_CRL")]
    pub crl: Option<PathBuf>,

    /// Admin pages; loopback only.
    #[arg(long, env = "CULVERT_ADMIN", default_value = "127.0.0.1:15000")]
    pub admin: SocketAddr,

    /// Metrics, read-only.
    #[arg(long, env = "CULVERT_METRICS", default_value = "[::]:15020")]
    pub metrics: SocketAddr,

    /// Readiness, `GET /healthz/ready`.
    #[arg(long, env = "CULVERT_READINESS", default_value = "[::]:15021")]
    pub readiness: SocketAddr,

    /// Threads that carry traffic; 0 is one per core.
    #[arg(long, env = "CULVERT_WORKERS", default_value_t = 0)]
    pub workers: usize,

    /// How long open connections may go on after SIGTERM or when a successor is ready.
    #[arg(long, env = "CULVERT_DRAIN_TIME", default_value = "30s", value_parser = duration)]
    pub drain_time: Duration,

    /// What this node asks control for.
    #[arg(long, env = "CULVERT_DISCOVERY", value_enum, default_value_t = Discovery::OnDemand)]
    pub discovery: Discovery,

    /// Form of the log: `text` or `json`.
    #[arg(long, env = "CULVERT_LOG_FORMAT", default_value = "text")]
    pub log_format: Format,

    /// Log filter, in the syntax of `tracing-subscriber`'s `EnvFilter`. The access log is target `access`:
    /// `access=off` silences it, `access=warn` leaves refusals, `access=debug` adds connections that open.
    #[arg(long, env = "CULVERT_LOG", default_value = "info")]
    pub log: String,

    /// Open connections one workload may have, both directions together.
    #[arg(long, env = "CULVERT_MAX_CONNECTIONS", default_value_t = 20_000)]
    pub max_connections: usize,

    /// Dials and handshakes one workload may have in flight.
    #[arg(long, env = "CULVERT_MAX_PENDING", default_value_t = 512)]
    pub max_pending: usize,

    /// Tunnels that peers may have open to one workload.
    #[arg(long, env = "CULVERT_MAX_TUNNELS", default_value_t = 4096)]
    pub max_tunnels: usize,

    /// Handshakes of peers in flight on this node; shared out between workloads.
    #[arg(long, env = "CULVERT_MAX_HANDSHAKES", default_value_t = 2048)]
    pub max_handshakes: usize,

    /// Bytes that may wait for slow readers on this node, shared out between workloads. Without it, a quarter
    /// of the memory that this process may have, at most 512 MiB.
    #[arg(long, env = "CULVERT_MAX_BUFFERED")]
    pub max_buffered: Option<usize>,
}

impl Config {
    /// What the admin page shows: where the token is, never what it is.
    pub fn shown(&self) -> serde_json::Value {
        serde_json::json!({
            "agentSocket": self.agent_socket,
            "control": self.control,
            "controlCa": self.control_ca,
            "controlName": self.control_name,
            "token": self.token,
            "node": self.node,
            "admin": self.admin,
            "metrics": self.metrics,
            "readiness": self.readiness,
            "workers": self.workers,
            "drainTime": format!("{:?}", self.drain_time),
            "discovery": format!("{:?}", self.discovery),
            "logFormat": format!("{:?}", self.log_format),
            "log": self.log,
            "maxConnections": self.max_connections,
            "maxPending": self.max_pending,
        })
    }
}

/// How much of the mesh a node learns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Discovery {
    /// What its pods talk to, when they first do.
    OnDemand,
    /// Everything.
    Wildcard,
}

/// Reads `500ms`, `30s`, `5m` or `1h`.
fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: u64 = number
        .parse()
        .map_err(|_| format!("{text:?} does not start with a whole number"))?;
    let seconds = |factor: u64| {
        number
            .checked_mul(factor)
            .map(Duration::from_secs)
            .ok_or_else(|| format!("{text:?} is too long"))
    };
    match unit {
        "ms" => Ok(Duration::from_millis(number)),
        "s" => seconds(1),
        "m" => seconds(60),
        "h" => seconds(3600),
        _ => Err(format!("{text:?} has no unit: write ms, s, m or h")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_name_their_unit() {
        assert_eq!(duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(duration("30s"), Ok(Duration::from_secs(30)));
        assert_eq!(duration("1h"), Ok(Duration::from_secs(3600)));
        for bad in [
            "",
            "30",
            "s",
            "-1s",
            "1d",
            "99999999999999999999s",
            "9999999999999999999h",
        ] {
            assert!(duration(bad).is_err(), "{bad:?}");
        }
    }
}
