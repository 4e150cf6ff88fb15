//! What control has been asked on demand, so that it is asked once and not without end.
//!
//! ```text
//! look-up ──Question──▶ Questions ──subscribe (and unsubscribe the oldest that nothing is)──▶ control
//! ```
//! Invariant: at most [`MAX_QUESTIONS`] are held, whatever a pod dials or resolves. What something is stays
//! subscribed; among what nothing is, the oldest is forgotten and asked again when it is next met.

use culvert_core::{
    ids::{NetworkAddress, NetworkId, ServiceKey},
    snapshot::{Change, Lookup, Snapshot},
};
use std::collections::{HashMap, VecDeque};

/// Most questions held: a tenth of what control allows a node, and a few megabytes.
pub const MAX_QUESTIONS: usize = 20_000;

/// Something that control answers for by name.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Question {
    Address(NetworkAddress),
    Service(ServiceKey),
}

impl Question {
    pub fn resource_name(&self) -> String {
        match self {
            Self::Address(address) => address.resource_name(),
            Self::Service(key) => key.to_string(),
        }
    }

    pub fn is_answered(&self, snapshot: &Snapshot) -> bool {
        match self {
            Self::Address(address) => !matches!(snapshot.lookup(address, ""), Lookup::Unanswered),
            Self::Service(key) => snapshot.service(key).is_some() || snapshot.is_unknown(key),
        }
    }

    /// What the last good state says of it: its kind, and whether nothing is that. The resource's name says
    /// the rest.
    pub fn save(&self, snapshot: &Snapshot) -> Vec<u8> {
        let kind = match self {
            Self::Address(_) => b'a',
            Self::Service(_) => b's',
        };
        vec![kind, u8::from(self.is_unknown(snapshot))]
    }

    /// A saved question, and whether nothing is that.
    pub fn restore(name: &str, saved: &[u8]) -> Option<(Self, bool)> {
        let &[kind, unknown] = saved else { return None };
        let question = match kind {
            b'a' => {
                let (network, ip) = name.rsplit_once('/')?;
                Self::Address(NetworkAddress {
                    network: NetworkId::from(network),
                    ip: ip.parse().ok()?,
                })
            }
            b's' => Self::Service(name.parse().ok()?),
            _ => return None,
        };
        Some((question, unknown != 0))
    }

    fn is_unknown(&self, snapshot: &Snapshot) -> bool {
        match self {
            Self::Address(address) => matches!(snapshot.lookup(address, ""), Lookup::Unknown),
            Self::Service(key) => snapshot.is_unknown(key),
        }
    }

    /// The answer that nothing is that.
    pub fn unknown(&self) -> Change {
        match self {
            Self::Address(address) => Change::Unknown(address.clone()),
            Self::Service(key) => Change::UnknownService(key.clone()),
        }
    }

    /// Takes that answer back.
    pub fn forget(&self) -> Change {
        match self {
            Self::Address(address) => Change::Forget(address.clone()),
            Self::Service(key) => Change::ForgetService(key.clone()),
        }
    }
}

/// A question that is new.
#[derive(Debug, PartialEq, Eq)]
pub struct Asked {
    /// An older one that had to go for it.
    pub forgotten: Option<Question>,
}

/// All questions asked, oldest first.
#[derive(Debug, Default)]
pub struct Questions {
    by_name: HashMap<String, Question>,
    order: VecDeque<Question>,
}

impl Questions {
    /// Takes note of a question; none if it has been asked, or if there is no room and nothing to forget.
    pub fn ask(&mut self, question: &Question, snapshot: &Snapshot) -> Option<Asked> {
        let name = question.resource_name();
        if self.by_name.contains_key(&name) {
            return None;
        }
        let mut forgotten = None;
        if self.order.len() >= MAX_QUESTIONS {
            let oldest = self.order.iter().position(|old| old.is_unknown(snapshot))?;
            forgotten = self.order.remove(oldest);
            if let Some(old) = &forgotten {
                self.by_name.remove(&old.resource_name());
            }
        }
        self.by_name.insert(name, question.clone());
        self.order.push_back(question.clone());
        Some(Asked { forgotten })
    }

    /// The question that was asked by this resource name.
    pub fn named(&self, name: &str) -> Option<&Question> {
        self.by_name.get(name)
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.by_name.keys().map(String::as_str)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn question(number: u32) -> Question {
        Question::Address(NetworkAddress {
            network: NetworkId::from(""),
            ip: std::net::Ipv4Addr::from(number).into(),
        })
    }

    #[test]
    fn t30_a_pod_that_scans_cannot_make_the_node_ask_without_end() {
        let (mut questions, mut snapshot) = (Questions::default(), Snapshot::default());
        for number in 0..MAX_QUESTIONS as u32 {
            assert_eq!(
                questions.ask(&question(number), &snapshot),
                Some(Asked { forgotten: None })
            );
        }
        let further = question(MAX_QUESTIONS as u32);
        assert_eq!(
            questions.ask(&further, &snapshot),
            None,
            "none has been answered yet"
        );
        snapshot.apply(question(7).unknown());
        let asked = questions.ask(&further, &snapshot).unwrap();
        assert_eq!(asked.forgotten, Some(question(7)));
        snapshot.apply(question(7).forget());
        assert!(!question(7).is_answered(&snapshot));
        assert_eq!(questions.names().count(), MAX_QUESTIONS);
    }

    #[test]
    fn a_question_is_asked_once_and_found_by_its_name() {
        let (mut questions, mut snapshot) = (Questions::default(), Snapshot::default());
        let key: ServiceKey = "shop/cart.shop.svc.cluster.local".parse().unwrap();
        let question = Question::Service(key.clone());
        assert!(questions.ask(&question, &snapshot).is_some());
        assert!(questions.ask(&question, &snapshot).is_none());
        assert_eq!(
            questions.named("shop/cart.shop.svc.cluster.local"),
            Some(&question)
        );
        assert!(!question.is_answered(&snapshot));
        snapshot.apply(Change::UnknownService(key));
        assert!(question.is_answered(&snapshot));
    }
}
