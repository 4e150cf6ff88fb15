//! What ztunnel may not do, before it does anything.
//!
//! Invariant: the process that terminates TLS and parses what peers send has no capability, no way to gain
//! one, and leaves no core (TR-9).

use nix::sys::{
    prctl,
    resource::{Resource, setrlimit},
};

/// Why ztunnel does not start.
#[derive(Debug, thiserror::Error)]
pub enum PrivilegeError {
    #[error("ztunnel does not run as root: start it as another user (uid 65532 in the chart)")]
    Root,
    #[error("ztunnel does not run with capabilities (CapEff {0}): drop ALL")]
    Capabilities(String),
    #[error("cannot read or set a limit of this process: {0}")]
    System(String),
}

/// Refuses privileges that it was given and gives up those that it could still gain.
pub fn give_up() -> Result<(), PrivilegeError> {
    if nix::unistd::geteuid().is_root() || nix::unistd::getuid().is_root() {
        return Err(PrivilegeError::Root);
    }
    let system = |error: &dyn std::fmt::Display| PrivilegeError::System(error.to_string());
    let status = std::fs::read_to_string("/proc/self/status").map_err(|e| system(&e))?;
    for set in ["CapEff:", "CapPrm:", "CapAmb:"] {
        let value = status
            .lines()
            .find_map(|line| line.strip_prefix(set))
            .unwrap_or_default()
            .trim();
        if !value.trim_start_matches('0').is_empty() {
            return Err(PrivilegeError::Capabilities(value.to_owned()));
        }
    }
    prctl::set_no_new_privs().map_err(|e| system(&e))?;
    prctl::set_dumpable(false).map_err(|e| system(&e))?;
    setrlimit(Resource::RLIMIT_CORE, 0, 0).map_err(|e| system(&e))
}
