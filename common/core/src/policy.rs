//! L4 authorization: one evaluator for both directions.
//!
//! ```text
//! policies in force ─┐
//! Connection ────────┴▶ judge ──▶ Judgement { verdict, would_deny }
//! ```
//! At the destination the *peer* is the connection's source; for source rules (`direction: Outbound`) it
//! is the destination. Invariant: what is not known never admits. A fact that is missing makes an ALLOW
//! rule miss and a DENY rule match, and a policy that could not be read whole denies.

use crate::ids::{PolicyKey, SpiffeId};
use ipnet::IpNet;
use std::{fmt, net::IpAddr, sync::Arc};

/// What a policy does when it matches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Action {
    Allow,
    Deny,
}

/// Which workloads a policy is in force for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Scope {
    /// Every workload of the mesh.
    Global,
    /// The workloads of the policy's namespace.
    Namespace,
    /// The workloads that name it.
    Workload,
}

/// An authorization policy: it matches when one of its rules does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    pub key: PolicyKey,
    pub scope: Scope,
    pub action: Action,
    pub rules: Box<[Rule]>,
    /// Judged and reported, never enforced.
    pub dry_run: bool,
    /// Why the policy could not be read whole. It then denies, whatever its action.
    pub defect: Option<Box<str>>,
}

/// Matches when all clauses do; without clauses, always.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Rule {
    pub clauses: Box<[Clause]>,
}

/// Matches when one of its matches does. Without matches it always does; matches without any field are
/// skipped, and a clause of only such never matches.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Clause {
    pub matches: Box<[Match]>,
}

/// All fields that are not empty must hold: one of the values of a field, none of a `not_` field.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Match {
    pub namespaces: Box<[StringMatch]>,
    pub not_namespaces: Box<[StringMatch]>,
    pub principals: Box<[StringMatch]>,
    pub not_principals: Box<[StringMatch]>,
    pub source_ips: Box<[IpNet]>,
    pub not_source_ips: Box<[IpNet]>,
    pub destination_ips: Box<[IpNet]>,
    pub not_destination_ips: Box<[IpNet]>,
    pub destination_ports: Box<[u16]>,
    pub not_destination_ports: Box<[u16]>,
    pub service_accounts: Box<[AccountMatch]>,
    pub not_service_accounts: Box<[AccountMatch]>,
}

/// A literal comparison; no character has a meaning of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StringMatch {
    Exact(Arc<str>),
    Prefix(Arc<str>),
    Suffix(Arc<str>),
    /// Any value that is not empty.
    Presence,
}

impl StringMatch {
    fn matches(&self, value: &str) -> bool {
        match self {
            Self::Exact(want) => value == &**want,
            Self::Prefix(want) => value.starts_with(&**want),
            Self::Suffix(want) => value.ends_with(&**want),
            Self::Presence => !value.is_empty(),
        }
    }
}

/// A service account by namespace and name, whatever its trust domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AccountMatch {
    pub namespace: Arc<str>,
    pub service_account: Arc<str>,
}

/// Where the peer belongs, as far as discovery has said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PeerPlace<'a> {
    /// The workload that discovery names for this identity at this address.
    Known {
        namespace: &'a str,
        service_account: &'a str,
    },
    /// Not authenticated: it is in no namespace.
    Outside,
    /// Authenticated, but discovery does not say what holds this identity there.
    Unknown,
}

/// What a policy can see of a connection.
#[derive(Debug, Clone, Copy)]
pub struct Connection<'a> {
    /// The peer's identity, proved by its certificate.
    pub identity: Option<&'a SpiffeId>,
    pub place: PeerPlace<'a>,
    pub source_ip: IpAddr,
    /// After decapsulation: the pod's own address.
    pub destination_ip: IpAddr,
    pub destination_port: u16,
}

/// Why a connection is refused.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Denial {
    /// This DENY policy matched.
    Policy(PolicyKey),
    /// There are ALLOW policies, this one first, and none matched.
    NoneAllows(PolicyKey),
    /// The workload names this policy, and it has not been received.
    Missing(PolicyKey),
    /// This policy could not be read whole.
    Defective(PolicyKey),
}

impl Denial {
    /// The policy to name in a log.
    pub fn policy(&self) -> &PolicyKey {
        match self {
            Self::Policy(key) | Self::NoneAllows(key) | Self::Missing(key) | Self::Defective(key) => key,
        }
    }
}

impl fmt::Display for Denial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Policy(key) => write!(f, "denied by policy {key}"),
            Self::NoneAllows(key) => write!(f, "no ALLOW policy matches, {key} being the first of them"),
            Self::Missing(key) => write!(f, "policy {key} is named but has not been received"),
            Self::Defective(key) => write!(f, "policy {key} could not be read whole and denies"),
        }
    }
}

/// Whether a connection may be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Admitted; by this ALLOW policy, if any was in force.
    Allow(Option<PolicyKey>),
    Deny(Denial),
}

/// A verdict, and what it would be if the dry-run policies were enforced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Judgement {
    pub verdict: Verdict,
    /// Set when the connection is admitted and would not be with the dry-run policies enforced.
    pub would_deny: Option<Denial>,
}

/// A truth that may be unknown (Kleene's three values).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Truth {
    No,
    Unknown,
    Yes,
}

impl From<bool> for Truth {
    fn from(yes: bool) -> Self {
        if yes { Self::Yes } else { Self::No }
    }
}

impl Truth {
    fn not(self) -> Self {
        match self {
            Self::No => Self::Yes,
            Self::Unknown => Self::Unknown,
            Self::Yes => Self::No,
        }
    }

    fn all(truths: impl IntoIterator<Item = Self>) -> Self {
        let mut all = Self::Yes;
        for truth in truths {
            match truth {
                Self::No => return Self::No,
                Self::Unknown => all = Self::Unknown,
                Self::Yes => {}
            }
        }
        all
    }

    fn any(truths: impl IntoIterator<Item = Self>) -> Self {
        Self::all(truths.into_iter().map(Self::not)).not()
    }
}

/// Judges a connection: a matching DENY wins; without any ALLOW in force it is admitted; otherwise one
/// ALLOW must match.
pub fn judge<'p>(
    policies: impl Iterator<Item = &'p Policy> + Clone,
    connection: &Connection<'_>,
) -> Judgement {
    let verdict = verdict(policies.clone().filter(|policy| !policy.dry_run), connection);
    let would_deny = match &verdict {
        Verdict::Allow(_) if policies.clone().any(|policy| policy.dry_run) => {
            match self::verdict(policies, connection) {
                Verdict::Deny(denial) => Some(denial),
                Verdict::Allow(_) => None,
            }
        }
        _ => None,
    };
    Judgement { verdict, would_deny }
}

fn verdict<'p>(policies: impl Iterator<Item = &'p Policy> + Clone, connection: &Connection<'_>) -> Verdict {
    for policy in policies.clone() {
        if policy.defect.is_some() {
            return Verdict::Deny(Denial::Defective(policy.key.clone()));
        }
        if policy.action == Action::Deny && policy.holds(connection) != Truth::No {
            return Verdict::Deny(Denial::Policy(policy.key.clone()));
        }
    }
    let mut allows = policies
        .filter(|policy| policy.action == Action::Allow)
        .peekable();
    let Some(first) = allows.peek().map(|policy| policy.key.clone()) else {
        return Verdict::Allow(None);
    };
    match allows.find(|policy| policy.holds(connection) == Truth::Yes) {
        Some(policy) => Verdict::Allow(Some(policy.key.clone())),
        None => Verdict::Deny(Denial::NoneAllows(first)),
    }
}

impl Policy {
    fn holds(&self, connection: &Connection<'_>) -> Truth {
        Truth::any(self.rules.iter().map(|rule| rule.holds(connection)))
    }
}

impl Rule {
    fn holds(&self, connection: &Connection<'_>) -> Truth {
        Truth::all(self.clauses.iter().map(|clause| clause.holds(connection)))
    }
}

impl Clause {
    fn holds(&self, connection: &Connection<'_>) -> Truth {
        if self.matches.is_empty() {
            return Truth::Yes;
        }
        let matches = self.matches.iter().filter(|one| **one != Match::default());
        Truth::any(matches.map(|one| one.holds(connection)))
    }
}

impl Match {
    fn holds(&self, connection: &Connection<'_>) -> Truth {
        let principal = |want: &StringMatch| {
            Truth::from(connection.identity.is_some_and(|id| want.matches(id.principal())))
        };
        let namespace = |want: &StringMatch| match connection.place {
            PeerPlace::Known { namespace, .. } => Truth::from(want.matches(namespace)),
            PeerPlace::Outside => Truth::from(want.matches("")),
            PeerPlace::Unknown => Truth::Unknown,
        };
        let account = |want: &AccountMatch| match connection.place {
            PeerPlace::Known {
                namespace,
                service_account,
            } => Truth::from(*want.namespace == *namespace && *want.service_account == *service_account),
            PeerPlace::Outside => Truth::No,
            PeerPlace::Unknown => Truth::Unknown,
        };
        let source = |net: &IpNet| Truth::from(net.contains(&connection.source_ip));
        let destination = |net: &IpNet| Truth::from(net.contains(&connection.destination_ip));
        let port = |want: &u16| Truth::from(*want == connection.destination_port);
        Truth::all([
            field(&self.namespaces, &self.not_namespaces, namespace),
            field(&self.principals, &self.not_principals, principal),
            field(&self.source_ips, &self.not_source_ips, source),
            field(&self.destination_ips, &self.not_destination_ips, destination),
            field(&self.destination_ports, &self.not_destination_ports, port),
            field(&self.service_accounts, &self.not_service_accounts, account),
        ])
    }
}

/// One of `wanted`, if there are any, and none of `unwanted`.
fn field<T>(wanted: &[T], unwanted: &[T], holds: impl Fn(&T) -> Truth) -> Truth {
    let one_of = if wanted.is_empty() {
        Truth::Yes
    } else {
        Truth::any(wanted.iter().map(&holds))
    };
    Truth::all([one_of, Truth::any(unwanted.iter().map(&holds)).not()])
}

#[cfg(test)]
mod tests;
