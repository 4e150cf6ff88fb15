//! Outbound: a connection captured in a pod leaves the node.
//!
//! ```text
//! app ──TCP──▶ capture ──▶ route ──▶ tunnel ──HBONE──▶ peer ztunnel or waypoint
//!             orig. dst    pure      pooled mTLS
//!                           ▲ Snapshot, published by xds
//! ```
//! Invariant: nothing here waits for the control plane, but for the first answer about an address.

pub mod balance;
pub mod capture;
pub mod route;
pub mod tunnel;
