//! The mesh as values and decisions, without I/O: no runtime, no socket, no clock.
//!
//! ```text
//! ids ◀── mesh (workloads, services) ◀── policy ◀── snapshot ◀── decisions: route, admit, dns, recheck
//!                                                hbone, pool, balance
//! ```
//! Invariant: nothing here waits, and nothing here knows how its input arrived. What time it is and what
//! the network said are arguments.

#![forbid(unsafe_code)]

pub mod hbone;
pub mod ids;
pub mod mesh;
pub mod policy;
pub mod shards;
pub mod snapshot;
