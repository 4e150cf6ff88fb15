//! The evaluator by tables, and against a naive one at random.

use super::*;
use proptest::prelude::*;

fn key(text: &str) -> PolicyKey {
    text.parse().unwrap()
}

fn policy(name: &str, action: Action, matches: Match) -> Policy {
    Policy {
        key: key(&format!("shop/{name}")),
        scope: Scope::Namespace,
        action,
        rules: [Rule {
            clauses: [Clause {
                matches: [matches].into(),
            }]
            .into(),
        }]
        .into(),
        dry_run: false,
        defect: None,
    }
}

fn from_namespace(namespace: &str) -> Match {
    Match {
        namespaces: [StringMatch::Exact(namespace.into())].into(),
        ..Match::default()
    }
}

fn from_principal(want: StringMatch) -> Match {
    Match {
        principals: [want].into(),
        ..Match::default()
    }
}

fn web() -> SpiffeId {
    "spiffe://cluster.local/ns/shop/sa/web".parse().unwrap()
}

fn connection<'a>(identity: Option<&'a SpiffeId>, place: PeerPlace<'a>) -> Connection<'a> {
    Connection {
        identity,
        place,
        source_ip: "10.0.1.5".parse().unwrap(),
        destination_ip: "10.0.2.7".parse().unwrap(),
        destination_port: 8080,
    }
}

const IN_SHOP: PeerPlace<'static> = PeerPlace::Known {
    namespace: "shop",
    service_account: "web",
};

#[test]
fn deny_wins_then_any_allow_then_default() {
    let web = web();
    let allow = |ns: &str| policy("a", Action::Allow, from_namespace(ns));
    let deny = |ns: &str| policy("d", Action::Deny, from_namespace(ns));
    for (case, policies, want) in [
        ("no policy", vec![], Verdict::Allow(None)),
        (
            "allow hits",
            vec![allow("shop")],
            Verdict::Allow(Some(key("shop/a"))),
        ),
        (
            "allow misses",
            vec![allow("bank")],
            Verdict::Deny(Denial::NoneAllows(key("shop/a"))),
        ),
        ("deny misses", vec![deny("bank")], Verdict::Allow(None)),
        (
            "deny wins over allow",
            vec![allow("shop"), deny("shop")],
            Verdict::Deny(Denial::Policy(key("shop/d"))),
        ),
        (
            "one allow of two",
            vec![allow("bank"), allow("shop")],
            Verdict::Allow(Some(key("shop/a"))),
        ),
    ] {
        assert_eq!(
            judge(policies.iter(), &connection(Some(&web), IN_SHOP)).verdict,
            want,
            "{case}"
        );
    }
}

#[test]
fn what_discovery_does_not_say_never_admits() {
    let web = web();
    let unknown = connection(Some(&web), PeerPlace::Unknown);
    for (case, policies, want) in [
        (
            "allow by namespace",
            vec![policy("a", Action::Allow, from_namespace("shop"))],
            false,
        ),
        (
            "deny by namespace",
            vec![policy("d", Action::Deny, from_namespace("bank"))],
            false,
        ),
        (
            "deny of all but a namespace",
            vec![policy(
                "d",
                Action::Deny,
                Match {
                    not_namespaces: from_namespace("shop").namespaces,
                    ..Match::default()
                },
            )],
            false,
        ),
        (
            "allow of all but a namespace",
            vec![policy(
                "a",
                Action::Allow,
                Match {
                    not_namespaces: from_namespace("bank").namespaces,
                    ..Match::default()
                },
            )],
            false,
        ),
        (
            "allow by principal needs no namespace",
            vec![policy(
                "a",
                Action::Allow,
                from_principal(StringMatch::Exact(web.principal().into())),
            )],
            true,
        ),
        (
            "deny by namespace and another port",
            vec![policy(
                "d",
                Action::Deny,
                Match {
                    destination_ports: [1].into(),
                    ..from_namespace("bank")
                },
            )],
            true,
        ),
    ] {
        let admitted = matches!(judge(policies.iter(), &unknown).verdict, Verdict::Allow(_));
        assert_eq!(admitted, want, "{case}");
    }
}

#[test]
fn plaintext_has_no_identity_and_no_namespace() {
    let plain = connection(None, PeerPlace::Outside);
    let strict = Match {
        not_principals: [StringMatch::Presence].into(),
        ..Match::default()
    };
    let web = web();
    let denies_plain = [policy("strict", Action::Deny, strict)];
    assert_eq!(
        judge(denies_plain.iter(), &plain).verdict,
        Verdict::Deny(Denial::Policy(key("shop/strict")))
    );
    assert_eq!(
        judge(denies_plain.iter(), &connection(Some(&web), IN_SHOP)).verdict,
        Verdict::Allow(None)
    );
    let by_account = Match {
        service_accounts: [AccountMatch {
            namespace: "".into(),
            service_account: "".into(),
        }]
        .into(),
        ..Match::default()
    };
    let allows = [policy("a", Action::Allow, by_account)];
    assert_eq!(
        judge(allows.iter(), &plain).verdict,
        Verdict::Deny(Denial::NoneAllows(key("shop/a")))
    );
}

#[test]
fn empty_rules_clauses_and_matches_mean_what_the_wire_says() {
    let web = web();
    let conn = connection(Some(&web), IN_SHOP);
    let with_rules = |action, rules: Vec<Rule>| Policy {
        rules: rules.into(),
        ..policy("p", action, Match::default())
    };
    let only_empty_match = Rule {
        clauses: [Clause {
            matches: [Match::default()].into(),
        }]
        .into(),
    };
    for (case, policy, admitted) in [
        (
            "ALLOW without rules denies all",
            with_rules(Action::Allow, vec![]),
            false,
        ),
        (
            "DENY without rules does nothing",
            with_rules(Action::Deny, vec![]),
            true,
        ),
        (
            "ALLOW rule without clauses matches all",
            with_rules(Action::Allow, vec![Rule::default()]),
            true,
        ),
        (
            "DENY rule without clauses matches all",
            with_rules(Action::Deny, vec![Rule::default()]),
            false,
        ),
        (
            "a clause without matches matches all",
            with_rules(
                Action::Allow,
                vec![Rule {
                    clauses: [Clause::default()].into(),
                }],
            ),
            true,
        ),
        (
            "a clause of only empty matches never matches",
            with_rules(Action::Allow, vec![only_empty_match]),
            false,
        ),
    ] {
        let verdict = judge([&policy].into_iter(), &conn).verdict;
        assert_eq!(matches!(verdict, Verdict::Allow(_)), admitted, "{case}");
    }
}

#[test]
fn a_policy_that_could_not_be_read_whole_denies() {
    let web = web();
    for action in [Action::Allow, Action::Deny] {
        let defective = Policy {
            defect: Some("unknown field 99".into()),
            ..policy("p", action, from_namespace("shop"))
        };
        let verdict = judge([&defective].into_iter(), &connection(Some(&web), IN_SHOP)).verdict;
        assert_eq!(verdict, Verdict::Deny(Denial::Defective(key("shop/p"))));
    }
}

#[test]
fn dry_run_is_reported_and_not_enforced() {
    let web = web();
    let conn = connection(Some(&web), IN_SHOP);
    let dry = |action, matches| Policy {
        dry_run: true,
        ..policy("dry", action, matches)
    };
    for (case, policies, want) in [
        (
            "would be denied",
            vec![dry(Action::Deny, from_namespace("shop"))],
            Some(Denial::Policy(key("shop/dry"))),
        ),
        (
            "would miss the only allow",
            vec![dry(Action::Allow, from_namespace("bank"))],
            Some(Denial::NoneAllows(key("shop/dry"))),
        ),
        (
            "would be allowed",
            vec![dry(Action::Allow, from_namespace("shop"))],
            None,
        ),
    ] {
        let judgement = judge(policies.iter(), &conn);
        assert!(matches!(judgement.verdict, Verdict::Allow(_)), "{case}");
        assert_eq!(judgement.would_deny, want, "{case}");
    }
}

#[test]
fn t33_no_wildcard_meaning_in_ids() {
    let odd: SpiffeId = "spiffe://td/ns/a.b/sa/c_d".parse().unwrap();
    let conn = connection(Some(&odd), IN_SHOP);
    for (want, hits) in [
        (StringMatch::Exact("td/ns/a.b/sa/c_d".into()), true),
        (StringMatch::Exact("td/ns/a?b/sa/c_d".into()), false),
        (StringMatch::Exact("td/ns/.*".into()), false),
        (StringMatch::Exact("td/ns/*".into()), false),
        (StringMatch::Exact("*".into()), false),
        (StringMatch::Prefix("td/ns/a.b/".into()), true),
        (StringMatch::Prefix("td/ns/axb/".into()), false),
        (StringMatch::Suffix("/sa/c_d".into()), true),
    ] {
        let policies = [policy("a", Action::Allow, from_principal(want.clone()))];
        let admitted = matches!(judge(policies.iter(), &conn).verdict, Verdict::Allow(_));
        assert_eq!(admitted, hits, "{want:?}");
    }
}

#[test]
fn t29_a_forged_address_gains_nothing_where_identity_is_asked_for() {
    let mallory: SpiffeId = "spiffe://cluster.local/ns/evil/sa/mallory".parse().unwrap();
    let policies = [policy(
        "a",
        Action::Allow,
        from_principal(StringMatch::Exact(web().principal().into())),
    )];
    let verdict = judge(policies.iter(), &connection(Some(&mallory), IN_SHOP)).verdict;
    assert_eq!(verdict, Verdict::Deny(Denial::NoneAllows(key("shop/a"))));
}

/// The rules of evaluation written down naively, with no unknowns: what `judge` must agree with.
mod oracle {
    use super::*;

    fn text(want: &StringMatch, value: &str) -> bool {
        match want {
            StringMatch::Exact(x) => value == &**x,
            StringMatch::Prefix(x) => value.len() >= x.len() && value[..x.len()] == **x,
            StringMatch::Suffix(x) => value.len() >= x.len() && value[value.len() - x.len()..] == **x,
            StringMatch::Presence => !value.is_empty(),
        }
    }

    fn one(m: &Match, namespace: &str, principal: Option<&str>, port: u16) -> bool {
        let p = |w: &StringMatch| principal.is_some_and(|value| text(w, value));
        (m.namespaces.is_empty() || m.namespaces.iter().any(|w| text(w, namespace)))
            && !m.not_namespaces.iter().any(|w| text(w, namespace))
            && (m.principals.is_empty() || m.principals.iter().any(p))
            && !m.not_principals.iter().any(p)
            && (m.destination_ports.is_empty() || m.destination_ports.contains(&port))
            && !m.not_destination_ports.contains(&port)
    }

    pub fn admits(policies: &[Policy], namespace: &str, principal: Option<&str>, port: u16) -> bool {
        let hits = |policy: &Policy| {
            policy.rules.iter().any(|rule| {
                rule.clauses.iter().all(|clause| {
                    clause.matches.is_empty()
                        || clause
                            .matches
                            .iter()
                            .any(|m| *m != Match::default() && one(m, namespace, principal, port))
                })
            })
        };
        if policies.iter().any(|p| p.action == Action::Deny && hits(p)) {
            return false;
        }
        let mut allows = policies.iter().filter(|p| p.action == Action::Allow).peekable();
        allows.peek().is_none() || allows.any(hits)
    }
}

fn any_text() -> impl Strategy<Value = StringMatch> {
    let word = prop_oneof![Just("a"), Just("b"), Just("td/a"), Just("td/b"), Just("")];
    (0..4u8, word).prop_map(|(kind, word)| match kind {
        0 => StringMatch::Exact(word.into()),
        1 => StringMatch::Prefix(word.into()),
        2 => StringMatch::Suffix(word.into()),
        _ => StringMatch::Presence,
    })
}

fn any_match() -> impl Strategy<Value = Match> {
    let texts = || proptest::collection::vec(any_text(), 0..2);
    let ports = || proptest::collection::vec(80u16..83, 0..2);
    (texts(), texts(), texts(), texts(), ports(), ports()).prop_map(|(a, b, c, d, e, f)| Match {
        namespaces: a.into(),
        not_namespaces: b.into(),
        principals: c.into(),
        not_principals: d.into(),
        destination_ports: e.into(),
        not_destination_ports: f.into(),
        ..Match::default()
    })
}

fn any_policy() -> impl Strategy<Value = Policy> {
    let rules = proptest::collection::vec(
        proptest::collection::vec(proptest::collection::vec(any_match(), 0..3), 0..3),
        0..3,
    );
    (any::<bool>(), rules).prop_map(|(deny, rules)| Policy {
        rules: rules
            .into_iter()
            .map(|clauses| Rule {
                clauses: clauses
                    .into_iter()
                    .map(|matches| Clause {
                        matches: matches.into(),
                    })
                    .collect(),
            })
            .collect(),
        ..policy(
            "p",
            if deny { Action::Deny } else { Action::Allow },
            Match::default(),
        )
    })
}

proptest! {
    #[test]
    fn the_evaluator_agrees_with_the_naive_oracle(
        policies in proptest::collection::vec(any_policy(), 0..4),
        who in proptest::option::of(prop_oneof![Just("a"), Just("b")]),
        port in 80u16..83,
    ) {
        let id: Option<SpiffeId> = who.map(|who| format!("spiffe://td/{who}").parse().unwrap());
        let place = match who {
            Some(namespace) => PeerPlace::Known { namespace, service_account: "x" },
            None => PeerPlace::Outside,
        };
        let conn = Connection { destination_port: port, ..connection(id.as_ref(), place) };
        let admitted = matches!(judge(policies.iter(), &conn).verdict, Verdict::Allow(_));
        let want = oracle::admits(&policies, who.unwrap_or(""), id.as_ref().map(|id| id.principal()), port);
        prop_assert_eq!(admitted, want);
    }

    #[test]
    fn an_unknown_place_admits_only_what_every_place_would(
        policies in proptest::collection::vec(any_policy(), 0..4),
    ) {
        let id: SpiffeId = "spiffe://td/a".parse().unwrap();
        let unknown = judge(policies.iter(), &connection(Some(&id), PeerPlace::Unknown)).verdict;
        if matches!(unknown, Verdict::Allow(_)) {
            for namespace in ["", "a", "b", "td/a", "other"] {
                let place = PeerPlace::Known { namespace, service_account: "x" };
                let known = judge(policies.iter(), &connection(Some(&id), place)).verdict;
                prop_assert!(matches!(known, Verdict::Allow(_)), "{}", namespace);
            }
        }
    }
}
