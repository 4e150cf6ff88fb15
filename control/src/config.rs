//! The command line, read once into checked values.

use clap::{Parser, ValueEnum};
use culvert_core::ids::TrustDomain;
use ipnet::IpNet;
use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

/// The control plane: objects become what the proxies need, and identities are signed.
#[derive(Debug, Clone, Parser)]
#[command(name = "control", version, about)]
pub struct Config {
    /// Form of the log: `text` or `json`.
    #[arg(long, env = "CULVERT_LOG_FORMAT", default_value = "text")]
    pub log_format: culvert_io::log::Format,

    /// Log filter, in the syntax of `tracing-subscriber`'s `EnvFilter`; decisions of the CA and calls of the
    /// admin page are target `audit`.
    #[arg(long, env = "CULVERT_LOG", default_value = "info")]
    pub log: String,

    /// Folder of YAML objects; watched.
    #[arg(long, env = "CULVERT_CONFIG_DIR")]
    pub config_dir: PathBuf,

    /// Folder for the CA, the trust bundle (`root.pem`), the version counter and how far pods are on their way into
    /// the mesh; made with mode 0700.
    #[arg(long, env = "CULVERT_STATE_DIR")]
    pub state_dir: PathBuf,

    /// Where nodes connect: discovery, certificates and node orders, over TLS 1.3. May be repeated.
    #[arg(
        long,
        env = "CULVERT_LISTEN",
        value_delimiter = ',',
        default_value = "[::]:15012"
    )]
    pub listen: Vec<SocketAddr>,

    /// Pages over HTTP, read-only: readiness (`/healthz/ready`) and metrics (`/metrics`).
    #[arg(long, env = "CULVERT_ADMIN", default_value = "127.0.0.1:15014")]
    pub admin: SocketAddr,

    /// DNS name in this server's own certificate.
    #[arg(
        long,
        env = "CULVERT_SERVER_NAME",
        default_value = "control.culvert-system.svc"
    )]
    pub server_name: String,

    /// Trust domain of the identities that are issued: `spiffe://TRUST_DOMAIN/ns/NAMESPACE/sa/ACCOUNT`.
    #[arg(long, env = "CULVERT_TRUST_DOMAIN", default_value = "cluster.local")]
    pub trust_domain: TrustDomain,

    /// DNS suffix of Service names.
    #[arg(long, env = "CULVERT_CLUSTER_DOMAIN", default_value = "cluster.local")]
    pub cluster_domain: String,

    /// Namespace of the release; policies in it are for the whole mesh.
    #[arg(long, env = "CULVERT_ROOT_NAMESPACE", default_value = "culvert-system")]
    pub root_namespace: String,

    /// How strict the defaults are.
    #[arg(long, env = "CULVERT_PROFILE", value_enum, default_value_t = Profile::Low)]
    pub profile: Profile,

    /// Longest life of an SVID: `10m` to `24h`, shorter ones down to `5s` for tests of rotation.
    #[arg(long, env = "CULVERT_SVID_TTL", default_value = "1h", value_parser = lifetime)]
    pub svid_ttl: Duration,

    /// PEM chain of the issuing CA, issuer first; without it a root is generated in the state folder.
    #[arg(long, env = "CULVERT_CA_CERT", requires = "ca_key", requires = "ca_root")]
    pub ca_cert: Option<PathBuf>,

    /// PEM key of the issuing CA.
    #[arg(long, env = "CULVERT_CA_KEY")]
    pub ca_key: Option<PathBuf>,

    /// PEM roots; several while they rotate.
    #[arg(long, env = "CULVERT_CA_ROOT")]
    pub ca_root: Option<PathBuf>,

    /// YAML map of join token to node name.
    #[arg(long, env = "CULVERT_NODE_TOKENS")]
    pub node_tokens: PathBuf,

    /// Pod and Service ranges of the mesh. May be repeated.
    #[arg(long, env = "CULVERT_MESH_RANGE", value_delimiter = ',', value_parser = range)]
    pub mesh_range: Vec<IpNet>,

    /// DNS servers of the cluster. May be repeated.
    #[arg(long, env = "CULVERT_RESOLVER", value_delimiter = ',')]
    pub resolver: Vec<IpAddr>,

    /// What happens to destinations that are not known; `allow` in profile low, `registry-only` above.
    #[arg(long, env = "CULVERT_EGRESS", value_enum)]
    pub egress: Option<Egress>,
}

/// How strict the defaults are (settled D20).
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Profile {
    /// Everything is admitted; what `medium` would refuse is counted.
    Low,
    /// No plaintext; callers of the own namespace, others by rule.
    Medium,
    /// Nothing without a rule.
    High,
}

/// What happens to destinations outside the mesh that nobody has declared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Egress {
    /// They are passed through.
    Allow,
    /// Refused, but for each `ExternalService`.
    RegistryOnly,
    /// Refused.
    Deny,
}

fn range(text: &str) -> Result<IpNet, String> {
    text.parse()
        .map_err(|_| format!("{text:?} is no range; write one such as 10.0.0.0/8"))
}

fn lifetime(text: &str) -> Result<Duration, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: u64 = number
        .parse()
        .map_err(|_| format!("{text:?} does not start with a whole number"))?;
    let factor = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        _ => return Err(format!("{text:?} has no unit that is known: write s, m or h")),
    };
    match number.checked_mul(factor) {
        Some(seconds @ 5..=86_400) => Ok(Duration::from_secs(seconds)),
        _ => Err(format!("{text:?} is not between 5s and 24h")),
    }
}
