//! Inbound: a connection from the mesh reaches a pod.
//!
//! ```text
//! peer ──TLS──▶ accept ──CONNECT──▶ admit ──Permit──▶ deliver ──TCP──▶ app
//!             pod's SVID          pure       from the client's address
//! ```
//! Invariant: the dialler takes a [`Permit`](admit::Permit) and nothing else; 200 goes out after policy
//! *and* the application's accept.

pub mod accept;
pub mod admit;
pub mod deliver;
mod pace;
