//! Discovery: control's resources become snapshots.
//!
//! ```text
//! control ──delta ADS──▶ Client ──decode──▶ Change… ──▶ Snapshot ──ArcSwap──▶ whoever decides
//!            ◀──ACK, NACK, subscribe──┘  └─▶ last good       └──watch──▶ recheck
//! ```
//! One task writes and publishes; everyone else loads. Invariant: a response is applied as one change,
//! policies before what names them, and what control does not name as removed stays.

mod client;
pub mod decode;
mod last_good;
mod questions;
mod response;
mod stats;
pub mod walker;

pub use client::{Discovery, Mode, Settings, start};
pub use stats::{Carried, Stats, Termination};
