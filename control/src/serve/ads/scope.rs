//! Which policies concern a node: those that its own workloads name, those of their namespaces, and those of
//! the whole mesh.
//!
//! Invariant: a policy is judged on the node of the workload that it is for, so no other node is told of it.

use crate::index::world::{ADDRESS, About, Names, Reach, Resource, World};
use std::collections::BTreeSet;

#[derive(Debug, Default)]
pub struct Scope {
    /// Names of the node's own workloads' resources.
    own: Names,
    named: Names,
    namespaces: Names,
}

impl Scope {
    /// Whether a step's Address resources may change what concerns the node.
    pub fn is_touched(&self, world: &World, changed: &Names, node: &str) -> bool {
        changed.iter().any(|name| {
            self.own.contains(name)
                || world
                    .get(ADDRESS, name)
                    .is_some_and(|resource| match &resource.about {
                        About::Workload { node: of, .. } => &**of == node,
                        About::Config | About::Policy { .. } | About::Service { .. } => false,
                    })
        })
    }

    /// Looks at the node's workloads anew and says which policies came to concern it or ceased to.
    pub fn look(&mut self, world: &World, node: &str) -> Names {
        let mut now = Self {
            own: world.on_node(node).cloned().collect(),
            ..Self::default()
        };
        for resource in now.own.iter().filter_map(|name| world.get(ADDRESS, name)) {
            if let About::Workload {
                namespace, policies, ..
            } = &resource.about
            {
                now.named.extend(policies.iter().cloned());
                now.namespaces.insert(namespace.clone());
            }
        }
        let mut moved: BTreeSet<_> = self.named.symmetric_difference(&now.named).cloned().collect();
        for namespace in self.namespaces.symmetric_difference(&now.namespaces) {
            moved.extend(world.of_namespace(namespace).cloned());
        }
        *self = now;
        moved
    }

    pub fn concerns(&self, policy: &Resource) -> bool {
        match &policy.about {
            About::Policy { namespace, reach } => match reach {
                Reach::Mesh => true,
                Reach::Namespace => self.namespaces.contains(namespace),
                Reach::Workloads => self.named.contains(&policy.name),
            },
            About::Config | About::Workload { .. } | About::Service { .. } => true,
        }
    }
}
