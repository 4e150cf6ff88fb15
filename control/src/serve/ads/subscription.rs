//! One type on one stream: what the node wants, what it was sent, and what of that is in doubt.
//!
//! Invariant: what is not in doubt is as it was last sent.

use super::scope::Scope;
use crate::index::world::{
    ADDRESS, About, INBOUND, Name, Names, OUTBOUND, Reach, Resource, TYPES, Type, World,
};
use culvert_proto::discovery::{DeltaDiscoveryRequest, Resource as Wire};
use std::collections::{HashMap, HashSet};
use tokio::time::Instant;

pub struct Subscription {
    wildcard: bool,
    names: HashSet<Name>,
    sent: HashMap<Name, Sent>,
    /// Names that the node asked for and was told that nothing has.
    absent: HashSet<Name>,
    doubt: Names,
    /// Names asked for of which may be nothing, or nothing any more.
    asked: Names,
    /// Policies that leave or narrow once the workloads have been sent.
    late: Names,
    in_flight: Option<(String, Instant)>,
    listed: bool,
    acknowledged: bool,
}

#[derive(Clone, Copy)]
struct Sent {
    version: u64,
    reach: Reach,
}

impl Subscription {
    /// The first request of a type: nothing named means everything.
    pub fn begin(request: &DeltaDiscoveryRequest) -> Self {
        let held = request.initial_resource_versions.iter();
        let sent = held.map(|(name, version)| {
            let sent = Sent {
                version: u64::from_str_radix(version, 16).unwrap_or_default(),
                // Not known any more; the widest makes it leave late, which does no harm.
                reach: Reach::Mesh,
            };
            (name.as_str().into(), sent)
        });
        Self {
            wildcard: request.resource_names_subscribe.is_empty(),
            names: HashSet::new(),
            sent: sent.collect(),
            absent: HashSet::new(),
            doubt: Names::new(),
            asked: Names::new(),
            late: Names::new(),
            in_flight: None,
            listed: false,
            acknowledged: false,
        }
    }

    pub fn names(&self) -> usize {
        self.names.len()
    }

    pub fn sent_at(&self) -> Option<Instant> {
        self.in_flight.as_ref().map(|(_, at)| *at)
    }

    pub fn in_flight(&mut self, nonce: String) {
        self.in_flight = Some((nonce, Instant::now()));
        self.listed = true;
    }

    pub fn acknowledge(&mut self, nonce: &str) {
        if self.in_flight.as_ref().is_some_and(|(sent, _)| sent == nonce) {
            self.in_flight = None;
            self.acknowledged = true;
        }
    }

    /// Whether the node has yet to acknowledge anything.
    pub fn was_never_settled(&self) -> bool {
        !self.acknowledged
    }

    /// Whether something has to be sent before what depends on it.
    pub fn has_news(&self) -> bool {
        !self.listed || !self.doubt.is_empty() || !self.asked.is_empty()
    }

    /// Whether the node has said that it has everything.
    pub fn is_settled(&self) -> bool {
        self.in_flight.is_none() && !self.has_news()
    }

    pub fn doubt(&mut self, names: &Names) {
        self.doubt.extend(names.iter().cloned());
    }

    /// Aliases that lead elsewhere: of interest where they were asked for.
    pub fn doubt_aliases(&mut self, aliases: &Names) {
        let asked = aliases.iter().filter(|alias| self.names.contains(*alias));
        self.asked.extend(asked.cloned());
    }

    /// Everything that may concern the node or was sent to it.
    pub fn doubt_all(&mut self, world: &World, of: Type) {
        self.doubt
            .extend(world.all(of).map(|resource| resource.name.clone()));
        self.doubt.extend(self.sent.keys().cloned());
        self.asked.extend(self.names.iter().cloned());
    }

    pub fn subscribe(&mut self, world: &World, of: Type, names: Vec<String>) {
        for name in names {
            if name == "*" {
                if !std::mem::replace(&mut self.wildcard, true) {
                    self.doubt_all(world, of);
                }
                continue;
            }
            let name = Name::from(name);
            // Asked again: answered again.
            self.absent.remove(&name);
            self.doubt_named(world, &name);
            self.asked.insert(name.clone());
            self.names.insert(name);
        }
    }

    pub fn unsubscribe(&mut self, world: &World, of: Type, names: Vec<String>) {
        for name in names {
            if name == "*" {
                if std::mem::take(&mut self.wildcard) {
                    self.doubt_all(world, of);
                }
                continue;
            }
            self.names.remove(name.as_str());
            self.absent.remove(name.as_str());
            self.asked.remove(name.as_str());
            self.doubt_named(world, &name.into());
        }
    }

    /// What a name stands for: a resource, those that it is an alias of, and the endpoints of services among
    /// them.
    fn doubt_named(&mut self, world: &World, name: &Name) {
        for name in world.aliased(name).chain([name]) {
            self.doubt.insert(name.clone());
            self.doubt.extend(world.endpoints(name).cloned());
        }
    }

    /// What to send now, if anything; takes note of it as sent. Of policies `late` alone lets what narrows go.
    pub fn next(
        &mut self,
        world: &World,
        of: Type,
        node: &str,
        scope: Option<&Scope>,
        late: bool,
    ) -> Option<(Vec<Wire>, Vec<String>)> {
        if self.in_flight.is_some() {
            return None;
        }
        if late {
            self.doubt.append(&mut self.late);
        }
        let (mut resources, mut removed) = (vec![], vec![]);
        while let Some(name) = self.doubt.pop_first() {
            let now = world
                .get(of, &name)
                .filter(|resource| self.concerns(world, of, resource, node, scope));
            let before = self.sent.get(&name).copied();
            if waits(of, before, now.map(AsRef::as_ref)) && !late {
                self.late.insert(name);
                continue;
            }
            if before.is_some() != now.is_some() && of == ADDRESS {
                // A service that comes or goes takes its endpoints with it.
                self.doubt.extend(world.endpoints(&name).cloned());
            }
            match now {
                Some(now) if before.is_none_or(|sent| sent.version != now.version) => {
                    self.note(&name, now);
                    resources.push(encode(of, now));
                }
                Some(_) => {}
                None => {
                    if self.sent.remove(&name).is_some() {
                        removed.push(name.to_string());
                    }
                }
            }
        }
        for name in std::mem::take(&mut self.asked) {
            let known = world.get(of, &name).is_some() || world.aliased(&name).next().is_some();
            if known {
                self.absent.remove(&name);
            } else if self.absent.insert(name.clone()) {
                removed.push(name.to_string());
            }
        }
        let first = !self.listed && !late;
        (first || !resources.is_empty() || !removed.is_empty()).then_some((resources, removed))
    }

    fn note(&mut self, name: &Name, now: &Resource) {
        let sent = Sent {
            version: now.version,
            reach: reach(now),
        };
        self.sent.insert(name.clone(), sent);
    }

    fn concerns(
        &self,
        world: &World,
        of: Type,
        resource: &Resource,
        node: &str,
        scope: Option<&Scope>,
    ) -> bool {
        if let Some(scope) = scope {
            return (self.wildcard && scope.concerns(resource)) || self.names.contains(&resource.name);
        }
        if self.wildcard || of != ADDRESS {
            return true;
        }
        let asked = |resource: &Resource| {
            let mut aliases = resource.aliases().iter();
            self.names.contains(&resource.name) || aliases.any(|alias| self.names.contains(alias))
        };
        asked(resource)
            || match &resource.about {
                About::Workload {
                    node: of, services, ..
                } => {
                    &**of == node
                        || services
                            .iter()
                            .any(|service| world.get(ADDRESS, service).is_some_and(|one| asked(one)))
                }
                About::Service { is_range, .. } => *is_range,
                About::Config | About::Policy { .. } => true,
            }
    }
}

/// Whether a policy leaves or narrows: whom it was for must have been told of what takes its place.
fn waits(of: Type, before: Option<Sent>, now: Option<&Resource>) -> bool {
    let policy = of == INBOUND || of == OUTBOUND;
    policy && before.is_some_and(|before| now.is_none_or(|now| reach(now) < before.reach))
}

fn reach(resource: &Resource) -> Reach {
    match &resource.about {
        About::Policy { reach, .. } => *reach,
        About::Config | About::Workload { .. } | About::Service { .. } => Reach::Mesh,
    }
}

fn encode(of: Type, resource: &Resource) -> Wire {
    Wire {
        version: format!("{:016x}", resource.version),
        resource: Some(prost_types::Any {
            type_url: TYPES[of].to_owned(),
            value: resource.bytes.to_vec(),
        }),
        name: resource.name.to_string(),
        aliases: resource.aliases().iter().map(ToString::to_string).collect(),
        ..Wire::default()
    }
}
