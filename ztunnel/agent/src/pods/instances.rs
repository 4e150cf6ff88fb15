//! The ztunnels that are connected: one serves, and at a hand-over another takes its place.
//!
//! Invariant: an instance is told to drain only once a younger one is ready (settled D2), and one that does
//! not read what it is sent is let go.

use crate::events::Outgoing;
use culvert_proto::agent::{Drain, Introduce, from_agent};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use std::sync::Arc;
use tokio::sync::mpsc;

/// All instances, oldest first.
#[derive(Debug, Default)]
pub struct Instances(Vec<Instance>);

#[derive(Debug)]
struct Instance {
    number: u64,
    outgoing: mpsc::Sender<Outgoing>,
    phase: Phase,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Coming,
    Ready,
    Draining,
}

impl Instances {
    /// Takes a new one in, and introduces it to the one that serves.
    pub fn join(&mut self, number: u64, outgoing: mpsc::Sender<Outgoing>) {
        let serving = self.0.iter().rev().find(|i| i.phase == Phase::Ready);
        let serving = serving.map(|i| i.number);
        self.0.push(Instance {
            number,
            outgoing,
            phase: Phase::Coming,
        });
        if let Some(serving) = serving {
            self.introduce(serving, number);
        }
    }

    /// Gives each of the two one end of a socketpair, over which SVIDs pass.
    fn introduce(&mut self, old: u64, new: u64) {
        let pair = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        );
        let (give, take) = match pair {
            Ok(pair) => pair,
            Err(error) => {
                tracing::warn!(%error, "two ztunnels could not be introduced");
                return;
            }
        };
        for (number, end, give) in [(old, give, true), (new, take, false)] {
            let outgoing = Outgoing {
                message: from_agent::Message::Introduce(Introduce { give }),
                fds: vec![Arc::new(end)],
            };
            self.tell(number, outgoing);
        }
    }

    /// It has a snapshot and accepts from now on: those before it stop accepting.
    pub fn ready(&mut self, number: u64) {
        let Some(place) = self.0.iter().position(|i| i.number == number) else {
            return;
        };
        if self.0[place].phase != Phase::Coming {
            return;
        }
        self.0[place].phase = Phase::Ready;
        let older: Vec<u64> = self.0[..place]
            .iter_mut()
            .filter(|i| i.phase != Phase::Draining)
            .map(|i| {
                i.phase = Phase::Draining;
                i.number
            })
            .collect();
        for number in older {
            self.tell(number, from_agent::Message::Drain(Drain {}).into());
        }
    }

    pub fn leave(&mut self, number: u64) {
        self.0.retain(|i| i.number != number);
    }

    pub fn tell(&mut self, number: u64, outgoing: Outgoing) {
        self.0
            .retain(|i| i.number != number || i.outgoing.try_send(outgoing.clone()).is_ok());
    }

    pub fn tell_all(&mut self, outgoing: Outgoing) {
        self.0.retain(|i| i.outgoing.try_send(outgoing.clone()).is_ok());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(queue: &mut mpsc::Receiver<Outgoing>) -> Vec<&'static str> {
        let mut names = vec![];
        while let Ok(outgoing) = queue.try_recv() {
            names.push(match outgoing.message {
                from_agent::Message::Drain(_) => "drain",
                from_agent::Message::Introduce(Introduce { give: true }) => "give",
                from_agent::Message::Introduce(Introduce { give: false }) => "take",
                _ => "other",
            });
        }
        names
    }

    #[test]
    fn the_older_drains_only_once_the_younger_is_ready() {
        let mut instances = Instances::default();
        let (first, mut to_first) = mpsc::channel(8);
        let (second, mut to_second) = mpsc::channel(8);
        instances.join(1, first);
        instances.ready(1);
        assert!(told(&mut to_first).is_empty());
        instances.join(2, second);
        assert_eq!(told(&mut to_first), ["give"]);
        assert_eq!(told(&mut to_second), ["take"]);
        instances.ready(2);
        instances.ready(2);
        assert_eq!(told(&mut to_first), ["drain"]);
        assert!(told(&mut to_second).is_empty());
    }

    #[test]
    fn one_that_does_not_read_is_let_go() {
        let mut instances = Instances::default();
        let (deaf, _queue) = mpsc::channel(1);
        instances.join(1, deaf);
        for _ in 0..2 {
            instances.tell_all(from_agent::Message::Drain(Drain {}).into());
        }
        assert!(instances.0.is_empty());
    }
}
