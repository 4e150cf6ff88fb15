//! Random worlds sent to patient and impatient nodes: what they hold is right at every step.

use super::*;
use crate::index::{
    Index,
    tests::{ALL, Dice, random_change, settings},
    world::About,
};
use culvert_core::{
    mesh::Workload,
    policy::{Policy, Scope as Reach},
    snapshot::Change,
};
use culvert_io::xds::decode::decode;
use std::collections::{BTreeMap, BTreeSet};

const ASKED: [&str; 3] = ["shop/n0.shop.svc.cluster.local", "/10.0.0.3", "/10.0.0.77"];

fn request(of: Type) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        type_url: TYPES[of].to_owned(),
        ..DeltaDiscoveryRequest::default()
    }
}

fn ack(response: &DeltaDiscoveryResponse) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        type_url: response.type_url.clone(),
        response_nonce: response.nonce.clone(),
        ..DeltaDiscoveryRequest::default()
    }
}

/// A stream of node `a` that has asked for everything that a ztunnel asks for.
fn view() -> View {
    let mut view = View::new("a".into(), "test".into());
    for of in [CONFIG, INBOUND, OUTBOUND] {
        view.take(request(of)).unwrap();
    }
    let mut address = request(ADDRESS);
    address.resource_names_subscribe = std::iter::once("*").chain(ASKED).map(str::to_owned).collect();
    address.resource_names_unsubscribe = vec!["*".to_owned()];
    view.take(address).unwrap();
    view
}

/// What a node holds.
#[derive(Default)]
struct Held([BTreeMap<String, Vec<u8>>; 4]);

impl Held {
    fn take(&mut self, response: &DeltaDiscoveryResponse) {
        let of = TYPES.iter().position(|url| *url == response.type_url).unwrap();
        for resource in &response.resources {
            let bytes = resource.resource.as_ref().unwrap().value.clone();
            self.0[of].insert(resource.name.clone(), bytes);
        }
        for name in &response.removed_resources {
            self.0[of].remove(name);
        }
    }

    fn of(world: &World) -> Self {
        let all = |of| {
            let resources = world.all(of);
            resources
                .map(|one| (one.name.to_string(), one.bytes.to_vec()))
                .collect()
        };
        Self([all(CONFIG), all(INBOUND), all(OUTBOUND), all(ADDRESS)])
    }

    fn workloads(&self) -> Vec<Workload> {
        let decoded = self.0[ADDRESS]
            .values()
            .map(|bytes| decode(TYPES[ADDRESS], bytes).unwrap());
        let workloads = decoded.filter_map(|change| match change {
            Change::Workload(workload) if &*workload.node == "a" => Some(*workload),
            _ => None,
        });
        workloads.collect()
    }

    fn policies(&self, of: Type) -> BTreeMap<String, Policy> {
        let decoded = self.0[of].values().map(|bytes| decode(TYPES[of], bytes).unwrap());
        let policies = decoded.map(|change| match change {
            Change::Policy(policy) | Change::OutboundPolicy(policy) => (policy.key.to_string(), *policy),
            other => panic!("{other:?}"),
        });
        policies.collect()
    }

    /// For each workload of the node, the policies in force; fails if one is named and not there.
    fn in_force(&self) -> BTreeMap<String, BTreeSet<(Type, String)>> {
        let policies = [self.policies(INBOUND), self.policies(OUTBOUND)];
        let of_one = |workload: Workload| {
            let mut all = BTreeSet::new();
            for (of, named) in [
                (INBOUND, &workload.policies),
                (OUTBOUND, &workload.outbound_policies),
            ] {
                let known = &policies[of - INBOUND];
                for key in named {
                    assert!(
                        known.contains_key(&key.to_string()),
                        "{} names {key}, which is missing",
                        workload.uid
                    );
                    all.insert((of, key.to_string()));
                }
                let wide = known.iter().filter(|(_, policy)| match policy.scope {
                    Reach::Global => true,
                    Reach::Namespace => policy.key.namespace() == &*workload.namespace,
                    Reach::Workload => false,
                });
                all.extend(wide.map(|(name, _)| (of, name.clone())));
            }
            (workload.uid.to_string(), all)
        };
        self.workloads().into_iter().map(of_one).collect()
    }
}

#[test]
fn f47_no_node_ever_judges_by_a_policy_that_is_missing_or_lacks_one_that_stays() {
    let mut dice = Dice(11);
    let mut index = Index::new(settings(), 0, BTreeMap::new());
    let mut world = index.apply(&[], vec![], ALL).unwrap();
    let (mut view, mut held) = (view(), Held::default());
    view.advance(&world);
    let mut before = Held::of(&world).in_force();
    let (mut sent, mut waiting) = (0, vec![]);
    for round in 0..2_000 {
        let batch: Vec<_> = (0..=dice.roll(2)).map(|_| random_change(&mut dice)).collect();
        if let Some(changed) = index.apply(&batch, vec![], ALL) {
            world = changed;
            view.advance(&world);
        }
        let after = Held::of(&world).in_force();
        // Sometimes ACKs are late, and the next world comes before they do.
        let patient = dice.roll(3) != 0;
        loop {
            while let Some(response) = view.next() {
                sent += 1;
                held.take(&response);
                waiting.push(ack(&response));
                for (workload, now) in held.in_force() {
                    let (Some(before), Some(after)) = (before.get(&workload), after.get(&workload)) else {
                        continue;
                    };
                    let lost: Vec<_> = before
                        .intersection(after)
                        .filter(|one| !now.contains(*one))
                        .collect();
                    assert!(
                        lost.is_empty(),
                        "round {round}: {workload} is without {lost:?} for a while"
                    );
                }
            }
            if waiting.is_empty() || !patient {
                break;
            }
            view.take(waiting.remove(dice.roll(waiting.len() as u64) as usize))
                .unwrap();
        }
        if !patient {
            // What stays over both changes is what must never be missing.
            for (workload, policies) in &mut before {
                match after.get(workload) {
                    Some(after) => policies.retain(|one| after.contains(one)),
                    None => policies.clear(),
                }
            }
            continue;
        }
        assert_eq!(view.taken(), Some(world.number), "round {round}");
        before = after;
        settled_as_expected(&held, &world, round);
    }
    assert!(sent > 1_000, "{sent} responses");
}

/// The node holds exactly what concerns it, looked for the slow way.
fn settled_as_expected(held: &Held, world: &World, round: u32) {
    let asked = |name: &str, aliases: &[std::sync::Arc<str>]| {
        ASKED.contains(&name) || aliases.iter().any(|alias| ASKED.contains(&&**alias))
    };
    let concerns = |one: &&std::sync::Arc<crate::index::world::Resource>| match &one.about {
        About::Workload {
            node,
            services,
            aliases,
            ..
        } => {
            let by_service = services.iter().any(|service| {
                let service = world.get(ADDRESS, service);
                service.is_some_and(|service| asked(&service.name, service.aliases()))
            });
            &**node == "a" || asked(&one.name, aliases) || by_service
        }
        About::Service { aliases, is_range } => *is_range || asked(&one.name, aliases),
        About::Config | About::Policy { .. } => true,
    };
    let want: BTreeMap<String, Vec<u8>> = world
        .all(ADDRESS)
        .filter(concerns)
        .map(|one| (one.name.to_string(), one.bytes.to_vec()))
        .collect();
    assert!(
        held.0[ADDRESS] == want,
        "round {round}: {:?} {:?}",
        held.0[ADDRESS].keys(),
        want.keys()
    );
    let in_force = held.in_force();
    for of in [INBOUND, OUTBOUND] {
        let used: BTreeSet<&String> = in_force
            .values()
            .flatten()
            .filter(|(kind, _)| *kind == of)
            .map(|(_, name)| name)
            .collect();
        for (name, policy) in held.policies(of) {
            let wide = policy.scope == Reach::Global;
            assert!(
                wide || used.contains(&name),
                "round {round}: {name} concerns nobody on the node"
            );
        }
    }
    assert_eq!(in_force, Held::of(world).in_force(), "round {round}");
}

#[test]
fn a_node_that_never_answers_is_sent_one_response_of_a_type() {
    let mut index = Index::new(settings(), 0, BTreeMap::new());
    let mut world = index.apply(&[], vec![], ALL).unwrap();
    let mut view = view();
    view.advance(&world);
    let mut dice = Dice(3);
    let mut responses = 0;
    for _ in 0..500 {
        while view.next().is_some() {
            responses += 1;
        }
        if let Some(changed) = index.apply(&[random_change(&mut dice)], vec![], ALL) {
            world = changed;
            view.advance(&world);
        }
    }
    assert!(responses <= 4, "{responses} responses");
    assert_eq!(view.taken(), Some(0), "nothing has been taken");
    assert!(view.sent_at().is_some());
}

#[test]
fn what_nothing_has_is_answered_once_and_again_when_asked_again() {
    let mut index = Index::new(settings(), 0, BTreeMap::new());
    let world = index.apply(&[], vec![], ALL).unwrap();
    let mut view = view();
    view.advance(&world);
    let mut removed = vec![];
    let mut drain = |view: &mut View| {
        removed.clear();
        while let Some(response) = view.next() {
            removed.extend(response.removed_resources.clone());
            view.take(ack(&response)).unwrap();
        }
        removed.sort();
        removed.clone()
    };
    let mut asked = ASKED.map(str::to_owned);
    asked.sort();
    assert_eq!(drain(&mut view), asked);
    assert_eq!(drain(&mut view), [""; 0]);
    let mut again = request(ADDRESS);
    again.resource_names_subscribe = vec!["/10.0.0.77".into()];
    view.take(again).unwrap();
    assert_eq!(drain(&mut view), ["/10.0.0.77"]);
    assert!(
        view.take(DeltaDiscoveryRequest::default()).is_err(),
        "a type that is not served"
    );
}

#[test]
fn f45_after_a_reconnect_only_what_changed_is_sent() {
    let mut dice = Dice(5);
    let mut index = Index::new(settings(), 0, BTreeMap::new());
    let changes: Vec<_> = (0..200).map(|_| random_change(&mut dice)).collect();
    let world = index.apply(&changes, vec![], ALL).unwrap();
    let (mut first, mut held) = (view(), BTreeMap::<String, BTreeMap<String, String>>::new());
    first.advance(&world);
    while let Some(response) = first.next() {
        let of_type = held.entry(response.type_url.clone()).or_default();
        of_type.extend(
            response
                .resources
                .iter()
                .map(|one| (one.name.clone(), one.version.clone())),
        );
        first.take(ack(&response)).unwrap();
    }
    // Control has restarted: the same objects, a new process.
    let restarted = Index::new(settings(), 5_000, BTreeMap::new())
        .apply(&changes, vec![], ALL)
        .unwrap();
    let mut second = View::new("a".into(), "test".into());
    second.advance(&restarted);
    let mut gone = 0;
    for of in [CONFIG, INBOUND, OUTBOUND, ADDRESS] {
        let mut request = request(of);
        request.initial_resource_versions = held[TYPES[of]].clone().into_iter().collect();
        if of == OUTBOUND {
            // Something that is no more.
            request
                .initial_resource_versions
                .insert("shop/old".into(), "0".into());
        }
        if of == ADDRESS {
            request.resource_names_subscribe = std::iter::once("*").chain(ASKED).map(str::to_owned).collect();
            request.resource_names_unsubscribe = vec!["*".to_owned()];
        }
        second.take(request).unwrap();
    }
    while let Some(response) = second.next() {
        assert_eq!(
            response.resources.len(),
            0,
            "{}: {:?}",
            response.type_url,
            response.resources
        );
        gone += response
            .removed_resources
            .iter()
            .filter(|name| *name == "shop/old")
            .count();
        second.take(ack(&response)).unwrap();
    }
    assert_eq!(gone, 1, "what is no more is named as removed");
}
