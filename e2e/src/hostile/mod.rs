//! A peer that follows no rule: TLS with whatever identity it got hold of, then HTTP/2 frames by hand.
//!
//! ```text
//! Svid::issue ──node's token──▶ control's CA
//! Tunnel::open ──TLS──▶ port 15008 ──preface, frames──▶ … ──▶ Answer of each stream
//! Impostor ◀──TLS── whoever dials: frames that it was told to say, and a count of what it hears
//! ```
//! Invariant: nothing here is Culvert's own HTTP/2 or TLS configuration, so that a rule kept by both of
//! our ends shows when only one keeps it. Every wait has a deadline.

pub mod frames;
mod impostor;
mod svid;
mod tunnel;

pub use impostor::Impostor;
pub use svid::Svid;
pub use tunnel::{Answer, Tunnel};
