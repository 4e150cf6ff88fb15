//! The shell that both proxies share: sockets, TLS, tunnels, discovery, identity, telemetry.
//!
//! Invariant: it reads, asks `culvert-core`, and carries out the answer; it holds no policy of its own.
//! `sys` is the only module of the project with `unsafe` code.

pub mod agent_socket;
pub mod budget;
pub mod control;
pub mod copy;
pub mod hbone;
pub mod identity;
pub mod log;
pub mod metrics;
pub mod sys;
pub mod tls;
pub mod xds;
