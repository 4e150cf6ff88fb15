//! Marks: by them a pod's rules and routes know whose a packet is.
//!
//! Invariant: a pod's marks are its own and stay the same for as long as it lives; no other process knows them.

use serde::{Deserialize, Serialize};

/// The bit that every mark of ours has, and by which the wall knows what may pass it (see `capture`).
pub const OURS: u32 = 0x8000_0000;

/// The marks of a pod, random: SO_MARK takes no more than NET_RAW, which many containers have, so a mark
/// that can be known is a way round capture (settled D5). Only the rules know these, and who may read
/// them may change them as well.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Marks {
    /// On ztunnel's sockets: exempts them from capture.
    pub socket: u32,
    /// Set by the rules on what may leave the pod as it is.
    pub pass: u32,
    /// Set by the rules on what may not, whatever mark the application has given it.
    pub wall: u32,
}

impl Marks {
    pub fn random() -> Self {
        let mark = || rand::random::<u32>() >> 1 | 2;
        Self {
            socket: mark() | OURS,
            pass: mark() | OURS,
            wall: mark(),
        }
    }
}
