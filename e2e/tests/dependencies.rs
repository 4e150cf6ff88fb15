//! What `deny.toml` forbids is not in the lock file. `cargo deny check bans licenses sources` says the same
//! and more; this needs nothing installed, so that it runs on every machine.
#![expect(clippy::unwrap_used, reason = "a test fails where it stands")]

use std::path::Path;
use std::process::Command;

use serde_json::Value;

const REGISTRY: &str = "registry+https://github.com/rust-lang/crates.io-index";

/// What cargo says of this workspace as it is built on Linux.
fn cargo(arguments: &[&str]) -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let output = Command::new(env!("CARGO"))
        .args(arguments)
        .arg("--locked")
        .current_dir(root)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// Name, version and licence of every package that is built, tests included.
fn packages() -> Vec<[String; 3]> {
    let tree = cargo(&[
        "tree",
        "--workspace",
        "--prefix",
        "none",
        "--no-dedupe",
        "--format",
        "{p}|{l}",
        "--target",
        "x86_64-unknown-linux-gnu",
    ]);
    let mut packages: Vec<_> = tree
        .lines()
        .filter(|line| !line.is_empty())
        .map(|line| {
            let (package, license) = line.split_once('|').unwrap();
            let mut words = package.split(' ');
            let (name, version) = (words.next().unwrap(), words.next().unwrap());
            [
                name.to_owned(),
                version.trim_start_matches('v').to_owned(),
                license.to_owned(),
            ]
        })
        .collect();
    packages.sort();
    packages.dedup();
    assert!(packages.len() > 100, "{packages:?}");
    packages
}

fn policy() -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../deny.toml")).unwrap()
}

/// The lines of the list called `name`.
fn list<'p>(policy: &'p str, name: &str) -> Vec<&'p str> {
    let start = format!("{name} = [");
    policy
        .lines()
        .skip_while(|line| *line != start)
        .skip(1)
        .take_while(|line| *line != "]")
        .map(str::trim)
        .filter(|line| !line.starts_with('#'))
        .collect()
}

/// The first quoted text of a line.
fn quoted(line: &str) -> &str {
    line.split('"').nth(1).unwrap()
}

/// Whether an SPDX expression can be kept with the licences `allowed`.
fn is_allowed(expression: &str, allowed: &[&str]) -> bool {
    // The older form.
    let expression = expression.replace(" / ", " OR ").replace('/', " OR ");
    let spaced = expression.replace('(', " ( ").replace(')', " ) ");
    let words: Vec<&str> = spaced.split_whitespace().collect();
    let (allows, rest) = any(&words, allowed);
    assert!(rest.is_empty(), "{expression}");
    allows
}

fn any<'w>(words: &'w [&'w str], allowed: &[&str]) -> (bool, &'w [&'w str]) {
    let (mut allows, mut rest) = all(words, allowed);
    while let ["OR", after @ ..] = rest {
        let (right, after) = all(after, allowed);
        (allows, rest) = (allows || right, after);
    }
    (allows, rest)
}

fn all<'w>(words: &'w [&'w str], allowed: &[&str]) -> (bool, &'w [&'w str]) {
    let (mut allows, mut rest) = one(words, allowed);
    while let ["AND", after @ ..] = rest {
        let (right, after) = one(after, allowed);
        (allows, rest) = (allows && right, after);
    }
    (allows, rest)
}

fn one<'w>(words: &'w [&'w str], allowed: &[&str]) -> (bool, &'w [&'w str]) {
    match words {
        ["(", inside @ ..] => match any(inside, allowed) {
            (allows, [")", rest @ ..]) => (allows, rest),
            (_, rest) => panic!("a parenthesis is open: {rest:?}"),
        },
        [license, "WITH", exception, rest @ ..] => {
            (allowed.contains(&&*format!("{license} WITH {exception}")), rest)
        }
        [license, rest @ ..] => (allowed.contains(license), rest),
        [] => panic!("a licence is missing"),
    }
}

#[test]
fn every_licence_is_one_that_is_allowed() {
    let policy = policy();
    let allowed: Vec<&str> = list(&policy, "allow").into_iter().map(quoted).collect();
    assert!(allowed.contains(&"MIT"), "{allowed:?}");
    for (expression, want) in [
        ("GPL-3.0-only", false),
        ("GPL-3.0-only OR MIT", true),
        ("GPL-3.0-only AND MIT", false),
        ("ISC AND (Apache-2.0 OR GPL-3.0-only)", true),
        ("Apache-2.0 WITH LLVM-exception", true),
        ("MIT/Apache-2.0", true),
    ] {
        assert_eq!(is_allowed(expression, &allowed), want, "{expression}");
    }
    for [name, version, license] in packages() {
        assert!(
            is_allowed(&license, &allowed),
            "{name} {version} has licence {license:?}"
        );
    }
}

#[test]
fn every_package_comes_from_the_registry_or_from_here() {
    let metadata: Value = serde_json::from_str(&cargo(&[
        "metadata",
        "--format-version",
        "1",
        "--filter-platform",
        "x86_64-unknown-linux-gnu",
    ]))
    .unwrap();
    for package in metadata["packages"].as_array().unwrap() {
        let source = package["source"].as_str();
        assert!(
            source.is_none_or(|source| source == REGISTRY),
            "{}",
            package["id"]
        );
    }
}

#[test]
fn no_banned_crate_is_built() {
    let policy = policy();
    let bans = list(&policy, "deny");
    assert!(bans.len() > 5, "{bans:?}");
    let number = |version: &str| -> Vec<u64> {
        let plain = version.split(['-', '+']).next().unwrap_or_default();
        plain.split('.').map(|part| part.parse().unwrap()).collect()
    };
    for [name, version, _] in packages() {
        for ban in &bans {
            let banned = match quoted(ban).split_once(":<") {
                Some((banned, below)) => banned == name && number(&version) < number(below),
                None => quoted(ban) == name,
            };
            assert!(!banned, "{name} {version}: {ban}");
        }
    }
}
