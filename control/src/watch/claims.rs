//! What an object holds for itself alone: its name, an address, a range.
//!
//! Invariant: the folder is good only while no claim has two holders.

use super::{mistake::Mistake, objects::ObjectId};
use ipnet::IpNet;
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt,
    net::IpAddr,
    path::{Path, PathBuf},
};

/// Something that one object alone may hold.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Claim {
    Object(ObjectId),
    Address(IpAddr),
    PodUid(String),
    /// A declared range; within a namespace ranges must not overlap, or a connection would have two owners.
    Range {
        namespace: String,
        net: IpNet,
    },
    /// A name that declared destinations of one namespace answer to.
    Host {
        namespace: String,
        host: String,
    },
}

impl fmt::Display for Claim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Object(id) => write!(f, "the name {id}"),
            Self::Address(ip) => write!(f, "address {ip}"),
            Self::PodUid(uid) => write!(f, "metadata.uid {uid:?}"),
            Self::Range { net, .. } => write!(f, "range {net}"),
            Self::Host { host, .. } => write!(f, "host {host:?}"),
        }
    }
}

#[derive(Debug, Clone)]
struct Holder {
    file: PathBuf,
    line: usize,
    id: ObjectId,
}

/// Who holds what.
#[derive(Debug, Default)]
pub struct Claims {
    holders: HashMap<Claim, Vec<Holder>>,
    contested: BTreeSet<Claim>,
    ranges: BTreeMap<(String, IpNet), ()>,
}

impl Claims {
    pub fn take(&mut self, file: &Path, line: usize, id: &ObjectId, claims: &[Claim]) {
        for claim in claims {
            let holders = self.holders.entry(claim.clone()).or_default();
            holders.push(Holder {
                file: file.to_owned(),
                line,
                id: id.clone(),
            });
            if holders.len() > 1 {
                self.contested.insert(claim.clone());
            }
            if let Claim::Range { namespace, net } = claim {
                self.ranges.insert((namespace.clone(), *net), ());
            }
        }
    }

    pub fn leave(&mut self, file: &Path, line: usize, claims: &[Claim]) {
        for claim in claims {
            let Some(holders) = self.holders.get_mut(claim) else {
                continue;
            };
            holders.retain(|holder| holder.file != file || holder.line != line);
            if holders.len() < 2 {
                self.contested.remove(claim);
            }
            if holders.is_empty() {
                self.holders.remove(claim);
                if let Claim::Range { namespace, net } = claim {
                    self.ranges.remove(&(namespace.clone(), *net));
                }
            }
        }
    }

    /// The one holder of a claim: its file and line.
    pub fn holder(&self, claim: &Claim) -> Option<(&Path, usize)> {
        let holder = self.holders.get(claim)?.first()?;
        Some((&holder.file, holder.line))
    }

    /// Every contested claim, as a mistake of its later holder.
    pub fn contested(&self) -> impl Iterator<Item = Mistake> {
        let twice = self.contested.iter().filter_map(|claim| {
            let mut holders = self.holders.get(claim)?.clone();
            holders.sort_by(|a, b| (&a.file, a.line).cmp(&(&b.file, b.line)));
            let [first, .., last] = holders.as_slice() else {
                return None;
            };
            // Two objects of one name contest everything; that they have one name says it all.
            let names_one = matches!(claim, Claim::Object(_)) || first.id != last.id;
            names_one.then(|| conflict(first, last, &claim.to_string()))
        });
        let overlaps = self.ranges.keys().zip(self.ranges.keys().skip(1));
        let overlaps = overlaps
            .filter(|((one, wide), (other, narrow))| one == other && wide.contains(narrow))
            .filter_map(|(wide, narrow)| {
                let holder = |(namespace, net): &(String, IpNet)| {
                    let claim = Claim::Range {
                        namespace: namespace.clone(),
                        net: *net,
                    };
                    self.holders.get(&claim)?.first()
                };
                let what = format!("the addresses of range {} (inside {})", narrow.1, wide.1);
                Some(conflict(holder(wide)?, holder(narrow)?, &what))
            });
        twice.chain(overlaps)
    }
}

fn conflict(first: &Holder, last: &Holder, what: &str) -> Mistake {
    let (file, line) = (first.file.display(), first.line);
    let who = if first.id == last.id {
        format!("{} is defined twice", last.id)
    } else {
        format!("{} and {} both hold {what}", last.id, first.id)
    };
    Mistake {
        file: last.file.clone(),
        line: last.line,
        what: format!("{who}; the other one is at {file}:{line}: change or remove one of them"),
    }
}
