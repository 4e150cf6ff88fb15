//! How far a pod is on its way into the mesh or out of it (settled D11).
//!
//! ```text
//!            captured            every node has had HBONE for a while
//! Out ──▶ Joining ──▶ Both ────────────────────────▶ In
//!  ▲                   │  ▲                           │
//!  └──── Leaving ◀─────┘  └── wanted again ── Opening ◀┘
//!     every node has plain        the own node accepts plaintext
//! ```
//! In `Both`, `Opening` and `Leaving` the pod accepts both protocols. Invariant: whatever a node was last told,
//! the pod takes: HBONE is published only after capture, plaintext is refused only after every node has taken
//! HBONE and what it had sent in plaintext before is through, and capture ends only after every node has taken
//! plaintext.

/// The world's number since which something is published.
type Since = u64;

/// The world of which every node has taken everything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Taken {
    pub now: u64,
    /// The same a while ago: what was routed by an older one has arrived.
    pub settled: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    Out,
    Joining,
    Both { since: Since },
    In,
    Opening { since: Since },
    Leaving { since: Since },
}

/// What its node's agent says of a pod's capture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Capture {
    /// Nothing yet since control started: what was published before stands.
    #[default]
    Unknown,
    None,
    Captured,
    Broken,
}

impl Phase {
    /// The phase of a pod that is met for the first time. What is enrolled from its start is held by the CNI
    /// plugin until it is captured, so nobody ever reaches it in plaintext. (One that was started outside of the
    /// mesh and then put into it, both while control was away, is refused until it is captured.)
    pub fn first(wanted: bool) -> Self {
        if wanted { Self::In } else { Self::Out }
    }

    /// Its name, for the record of a restart; which world it waits for is of one process alone.
    pub fn name(self) -> &'static str {
        match self {
            Self::Out => "out",
            Self::Joining => "joining",
            Self::Both { .. } => "both",
            Self::In => "in",
            Self::Opening { .. } => "opening",
            Self::Leaving { .. } => "leaving",
        }
    }

    /// The phase of that name.
    pub fn named(name: &str) -> Option<Self> {
        let since = 0;
        let all = [
            Self::Out,
            Self::Joining,
            Self::Both { since },
            Self::In,
            Self::Opening { since },
            Self::Leaving { since },
        ];
        all.into_iter().find(|phase| phase.name() == name)
    }

    /// Taken up by another process, whose next world is `next`: whatever waits for nodes waits for that one.
    pub fn resumed(self, next: u64) -> Self {
        match self {
            Self::Out | Self::Joining | Self::In => self,
            Self::Both { .. } => Self::Both { since: next },
            Self::Opening { .. } => Self::Opening { since: next },
            Self::Leaving { .. } => Self::Leaving { since: next },
        }
    }

    /// One step. `next` is the number under which the outcome is published.
    pub fn step(self, wanted: bool, capture: Capture, next: u64, taken: Taken) -> Self {
        let captured = matches!(capture, Capture::Captured | Capture::Broken);
        match (self, wanted) {
            (Self::Out, true) => Self::Joining,
            (Self::Joining, true) if captured => Self::Both { since: next },
            (Self::Both { since }, true) if taken.settled >= since => Self::In,
            (Self::Opening { since }, true) => Self::Both { since },
            (Self::Leaving { .. }, true) => Self::Joining,
            (Self::Joining, false) => Self::Out,
            (Self::In, false) => Self::Opening { since: next },
            (Self::Both { .. }, false) => Self::Leaving { since: next },
            (Self::Opening { since }, false) if taken.now >= since => Self::Leaving { since: next },
            (Self::Leaving { since }, false) if taken.now >= since => Self::Out,
            (same, _) => same,
        }
    }

    /// Whether it waits for nodes.
    pub fn waits(self) -> bool {
        match self {
            Self::Both { .. } | Self::Opening { .. } | Self::Leaving { .. } => true,
            Self::Out | Self::Joining | Self::In => false,
        }
    }

    /// Whether its agent shall capture it.
    pub fn captures(self) -> bool {
        match self {
            Self::Out => false,
            Self::Joining | Self::Both { .. } | Self::In | Self::Opening { .. } | Self::Leaving { .. } => {
                true
            }
        }
    }

    /// Whether others shall reach it by HBONE.
    pub fn speaks_hbone(self) -> bool {
        match self {
            Self::Both { .. } | Self::In | Self::Opening { .. } => true,
            Self::Out | Self::Joining | Self::Leaving { .. } => false,
        }
    }

    /// Whether plaintext is refused, as far as the profile refuses it.
    pub fn refuses_plaintext(self) -> bool {
        self == Self::In
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::tests::at;

    #[test]
    fn enrolment_goes_step_by_step_and_back() {
        use Capture::{Broken, Captured, None};
        use Phase::{Both, In, Joining, Leaving, Opening, Out};
        for (case, from, wanted, capture, taken, to) in [
            ("wanted", Out, true, None, 9, Joining),
            ("not captured yet", Joining, true, None, 9, Joining),
            ("captured", Joining, true, Captured, 9, Both { since: 10 }),
            (
                "broken is published, too",
                Joining,
                true,
                Broken,
                9,
                Both { since: 10 },
            ),
            (
                "a node has not taken it",
                Both { since: 10 },
                true,
                Captured,
                9,
                Both { since: 10 },
            ),
            ("every node has", Both { since: 10 }, true, Captured, 10, In),
            ("unwanted while joining", Joining, false, Captured, 9, Out),
            ("unwanted", In, false, Captured, 9, Opening { since: 10 }),
            (
                "its own node refuses yet",
                Opening { since: 10 },
                false,
                Captured,
                9,
                Opening { since: 10 },
            ),
            (
                "accepts both",
                Opening { since: 9 },
                false,
                Captured,
                9,
                Leaving { since: 10 },
            ),
            (
                "unwanted before it refused",
                Both { since: 9 },
                false,
                Captured,
                8,
                Leaving { since: 10 },
            ),
            (
                "a node would still tunnel",
                Leaving { since: 10 },
                false,
                Captured,
                9,
                Leaving { since: 10 },
            ),
            ("nobody tunnels", Leaving { since: 10 }, false, Captured, 10, Out),
            (
                "wanted again at once",
                Opening { since: 9 },
                true,
                Captured,
                8,
                Both { since: 9 },
            ),
            (
                "wanted again late",
                Leaving { since: 9 },
                true,
                Captured,
                8,
                Joining,
            ),
        ] {
            assert_eq!(from.step(wanted, capture, 10, at(taken)), to, "{case}");
        }
        let just_now = Taken { now: 10, settled: 9 };
        let both = Both { since: 10 };
        assert_eq!(
            both.step(true, Captured, 11, just_now),
            both,
            "plaintext sent before may be under way"
        );
    }

    #[test]
    fn in_every_phase_the_pod_takes_what_it_is_published_as() {
        use Phase::{Both, In, Joining, Leaving, Opening, Out};
        let since = 1;
        for phase in [
            Out,
            Joining,
            Both { since },
            In,
            Opening { since },
            Leaving { since },
        ] {
            assert!(!phase.speaks_hbone() || phase.captures(), "{phase:?}");
            assert!(!phase.refuses_plaintext() || phase.speaks_hbone(), "{phase:?}");
        }
    }
}
