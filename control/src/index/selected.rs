//! Which policies a workload names.
//!
//! Invariant: a workload that takes part in full names an ALLOW of its own or the profile's default; a policy
//! that only observes takes no default away.

use super::{Settings, labels, labels::Selectors, policies::peer_key};
use crate::{
    config::Profile,
    watch::objects::{
        Action, AuthorizationPolicy, Direction, Key, MtlsMode, Objects, PeerAuthentication, Selector,
    },
};
use std::{collections::BTreeMap, sync::Arc};

/// The label by which a namespace of profile low asks for its defaults to be enforced.
const ENFORCE: &str = "culvert.dev/enforce";

/// A workload, as selectors see it.
#[derive(Clone, Copy)]
pub struct Subject<'s> {
    pub namespace: &'s str,
    pub labels: &'s BTreeMap<String, String>,
    /// It takes part in full: the profile's defaults are its own.
    pub settled: bool,
}

/// Policies and PeerAuthentications, found by the labels that they select.
#[derive(Debug, Default)]
pub struct Selecting {
    pub policies: Selectors<Key>,
    pub peers: Selectors<Key>,
}

/// Names of policies, `namespace/name`.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Selected {
    pub inbound: Vec<String>,
    pub outbound: Vec<String>,
}

/// What of a policy decides which workloads name it or lose a default to it.
#[derive(PartialEq)]
pub struct Signature {
    selector: Option<Selector>,
    direction: Direction,
    admits: bool,
}

pub fn signature(policy: &AuthorizationPolicy) -> Signature {
    Signature {
        selector: policy.spec.selector.clone(),
        direction: policy.spec.direction,
        admits: admits(policy),
    }
}

fn admits(policy: &AuthorizationPolicy) -> bool {
    policy.spec.direction == Direction::Inbound && policy.spec.action == Action::Allow && !policy.spec.dry_run
}

fn reaches(selector: Option<&Selector>, subject: Subject<'_>) -> bool {
    selector.is_none_or(|selector| labels::matches(&selector.match_labels, subject.labels))
}

/// The policies of a workload, in order of their names, defaults last.
pub fn select(
    selecting: &Selecting,
    objects: &Objects,
    settings: &Settings,
    subject: Subject<'_>,
) -> Selected {
    let root = settings.root_namespace.as_str();
    let mut selected = Selected::default();
    let mut has_allow = false;
    for (key, policy) in found(&selecting.policies, &objects.policies, root, subject) {
        let selector = policy.spec.selector.as_ref();
        if !reaches(selector, subject) {
            continue;
        }
        has_allow |= admits(policy);
        if selector.is_some() {
            match policy.spec.direction {
                Direction::Inbound => selected.inbound.push(key.to_string()),
                Direction::Outbound => selected.outbound.push(key.to_string()),
            }
        }
    }
    if !subject.settled {
        return selected;
    }
    let observes = settings.profile == Profile::Low && !enforces(objects, subject.namespace);
    let suffix = if observes { "-dry-run" } else { "" };
    match mtls(selecting, objects, settings, subject) {
        Effective::Default => selected.inbound.push(format!("{root}/profile-strict{suffix}")),
        Effective::Named(name) => selected.inbound.push(name),
        Effective::Permissive => {}
    }
    if !has_allow {
        selected.inbound.push(match settings.profile {
            Profile::High => format!("{root}/profile-nothing"),
            Profile::Low | Profile::Medium => {
                format!("{}/profile-own-namespace{suffix}", subject.namespace)
            }
        });
    }
    selected
}

/// Objects of the workload's namespace and of the root that may select it, in order of their names.
fn found<'o, T>(
    selectors: &'o Selectors<Key>,
    all: &'o BTreeMap<Key, Arc<T>>,
    root: &str,
    subject: Subject<'_>,
) -> impl Iterator<Item = (&'o Key, &'o T)> {
    let mut keys = selectors.candidates(subject.namespace, subject.labels);
    if subject.namespace != root {
        keys.extend(selectors.candidates(root, subject.labels));
    }
    keys.into_iter()
        .filter_map(|key| all.get(key).map(|one| (key, one.as_ref())))
}

fn enforces(objects: &Objects, namespace: &str) -> bool {
    let key = |name: &str| Key {
        namespace: name.to_owned(),
        name: String::new(),
    };
    let object = Key {
        namespace: String::new(),
        name: namespace.to_owned(),
    };
    let labelled = objects.namespaces.get(&object).is_some_and(|one| {
        one.metadata
            .labels
            .get(ENFORCE)
            .is_some_and(|value| value == "true")
    });
    let mut own = objects.policies.range(key(namespace)..);
    labelled || own.next().is_some_and(|(key, _)| key.namespace == namespace)
}

enum Effective {
    Default,
    Permissive,
    Named(String),
}

/// The mTLS mode in force: the workload's own, then the namespace's, then the mesh's, then the profile's.
fn mtls(selecting: &Selecting, objects: &Objects, settings: &Settings, subject: Subject<'_>) -> Effective {
    let root = settings.root_namespace.as_str();
    let candidates: Vec<(&Key, &PeerAuthentication)> =
        found(&selecting.peers, &objects.peer_authentications, root, subject)
            .filter(|(_, one)| reaches(one.spec.selector.as_ref(), subject))
            .collect();
    let first = |with_selector: bool, namespace: &str| {
        candidates
            .iter()
            .find(|(key, one)| one.spec.selector.is_some() == with_selector && key.namespace == namespace)
    };
    let own = first(true, subject.namespace);
    if let Some((key, one)) = own
        && !one.spec.port_level_mtls.is_empty()
    {
        // It has a policy of its own, made of both levels.
        return Effective::Named(peer_key(key).to_string());
    }
    let mode = [own, first(false, subject.namespace), first(false, root)]
        .into_iter()
        .flatten()
        .map(|(_, one)| one.spec.mtls.mode)
        .find(|mode| *mode != MtlsMode::Unset);
    match mode {
        None | Some(MtlsMode::Unset) => Effective::Default,
        Some(MtlsMode::Strict) => Effective::Named(format!("{root}/profile-strict")),
        Some(MtlsMode::Permissive | MtlsMode::Disable) if settings.profile == Profile::High => {
            Effective::Default
        }
        Some(MtlsMode::Permissive | MtlsMode::Disable) => Effective::Permissive,
    }
}
