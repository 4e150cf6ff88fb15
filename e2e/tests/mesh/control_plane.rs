//! The control plane away, restarted, flooded, and at work on a large mesh.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Write};
use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use culvert_e2e::lab::{Endpoint, PodSpec, poll_until};
use culvert_e2e::load::{Attempts, Failure, Pace, Streams, all_complete};
use culvert_e2e::mesh::{Options, config};
use culvert_e2e::traffic::{Server, echo_once};
use serde_json::{Value, json};

use crate::faults::speaks;
use crate::{Shop, WAIT, full_length};

fn call(from: &Endpoint, to: SocketAddr) -> anyhow::Result<()> {
    let socket = from.connect_within(to, Duration::from_secs(3))?;
    socket.set_read_timeout(Some(Duration::from_secs(3)))?;
    echo_once(&socket, b"hello")
}

#[test]
fn f44_f45_control_restarts_and_nobody_notices() {
    let shop = Shop::open();
    let _echo = Server::echo(shop.cart.listen(8080).unwrap()).unwrap();
    let to = SocketAddr::from((shop.vip.v4, 80));
    call(&shop.web, to).unwrap();
    let version = || {
        shop.mesh
            .control_metrics()
            .unwrap()
            .sum("culvert_config_version", &[])
    };
    let streams = Streams::start(&shop.web, to, 20, Pace::BUSY).unwrap();
    let attempts = Attempts::start(&shop.web, to, 100, WAIT).unwrap();
    for _ in 0..2 {
        let before = version();
        shop.mesh.kill_control().unwrap();
        thread::sleep(Duration::from_secs(1));
        shop.mesh.start_control().unwrap();
        assert!(
            version() > before,
            "it never counts backwards: {before}, then {}",
            version()
        );
        // Nodes find it again, and a change reaches them.
        let name = format!("late-{}", before as u64);
        let late = shop.mesh.pod(&shop.b, PodSpec::new("shop", &name)).unwrap();
        let _late = Server::echo(late.listen(8080).unwrap()).unwrap();
        let late = SocketAddr::from((late.addresses().v4, 8080));
        poll_until("a new pod is called", WAIT, || call(&shop.web, late).map(Some)).unwrap();
    }
    all_complete(&attempts.stop().unwrap()).unwrap();
    for end in streams.stop().unwrap() {
        assert!(end.failure.is_none(), "{end:?}");
    }
}

fn restart_control(shop: &Shop) {
    shop.mesh.kill_control().unwrap();
    shop.mesh.start_control().unwrap();
}

#[test]
fn f09_a_pod_joins_and_leaves_step_by_step_and_no_call_is_lost() {
    // Longer than a lost SYN takes to be sent again: what is left after it is reset (settled D7).
    const DRAIN: Duration = Duration::from_secs(2);
    let shop = Shop::open_with(Options {
        agent_args: vec!["--drain-seconds".into(), DRAIN.as_secs().to_string()],
        ..Options::default()
    });
    let spec = PodSpec::new("shop", "legacy").label(config::ENROL, "none");
    let legacy = shop.mesh.pod(&shop.b, spec).unwrap();
    shop.mesh
        .apply("apiVersion: v1\nkind: Namespace\nmetadata: {name: plain}\n")
        .unwrap();
    let outside = shop.mesh.pod(&shop.a, PodSpec::new("plain", "outside")).unwrap();
    let _servers = [&legacy, &outside].map(|pod| Server::echo(pod.listen(8080).unwrap()).unwrap());
    let to = SocketAddr::from((legacy.addresses().v4, 8080));
    // Into the pod and out of it.
    let [away4, away6] = outside.addresses().all().map(|ip| SocketAddr::from((ip, 8080)));
    let calls = [(&shop.web, to), (&legacy, away4), (&legacy, away6)];
    for (from, to) in calls.into_iter().chain([(&outside, to)]) {
        poll_until("everybody is called", WAIT, || call(from, to).map(Some)).unwrap();
    }
    let attempts = calls.map(|(from, to)| Attempts::start(from, to, 100, WAIT).unwrap());
    let enrol = |mode: &str| {
        let mut object = config::pod(&legacy);
        object["metadata"]["labels"][config::ENROL] = mode.into();
        shop.mesh.apply_object(&object).unwrap();
    };
    for turn in 0..if full_length() { 100 } else { 3 } {
        if turn == 1 {
            shop.b.kill_agent().unwrap();
        }
        enrol("ambient");
        if turn == 1 {
            // Control is restarted while nobody captures the pod yet, and goes on from there.
            thread::sleep(Duration::from_millis(200));
            restart_control(&shop);
            for _ in 0..20 {
                call(&shop.web, to).unwrap_or_else(|e| panic!("a pod that is not captured yet: {e:#}"));
                thread::sleep(Duration::from_millis(50));
            }
            shop.b.start_agent().unwrap();
            // And once more when it is captured, and plaintext perhaps not refused yet.
            speaks(&shop.a, &legacy, "HBONE");
            restart_control(&shop);
        }
        poll_until("plaintext is refused", WAIT, || {
            Ok(call(&outside, to).is_err().then_some(()))
        })
        .unwrap();
        call(&shop.web, to).unwrap();
        enrol("none");
        poll_until("plaintext is taken again", WAIT, || call(&outside, to).map(Some)).unwrap();
        if turn % 2 == 0 {
            // Out of it altogether; otherwise it comes back while it still drains.
            thread::sleep(DRAIN + Duration::from_secs(1));
        }
    }
    for ((from, to), attempts) in calls.into_iter().zip(attempts) {
        let all = attempts.stop().unwrap();
        all_complete(&all).unwrap_or_else(|e| panic!("from {} to {to}: {e:#}", from.name()));
    }
}

#[test]
fn f13_without_its_ca_the_mesh_serves_until_expiry_then_fails_closed_and_recovers() {
    const LIFE: Duration = Duration::from_secs(8);
    let shop = Shop::open_with(Options {
        svid_ttl: "8s",
        ..Options::default()
    });
    let _echo = Server::echo(shop.cart.listen(8080).unwrap()).unwrap();
    let to = SocketAddr::from((shop.vip.v4, 80));
    call(&shop.web, to).unwrap();
    shop.mesh.kill_control().unwrap();
    let killed = Instant::now();
    // Renewed at half of their life, give or take a tenth: three seconds are left at the least.
    let attempts = Attempts::start(&shop.web, to, 50, WAIT).unwrap();
    thread::sleep(Duration::from_secs(3));
    all_complete(&attempts.stop().unwrap()).unwrap();
    thread::sleep((LIFE + Duration::from_secs(1)).saturating_sub(killed.elapsed()));
    let attempts = Attempts::start(&shop.web, to, 10, WAIT).unwrap();
    thread::sleep(Duration::from_secs(1));
    for attempt in attempts.stop().unwrap() {
        match attempt.outcome {
            Err(Failure::Connect(ErrorKind::ConnectionReset) | Failure::Lost(ErrorKind::ConnectionReset)) => {
            }
            other => panic!("an attempt without an SVID is reset, not {other:?}"),
        }
    }
    shop.mesh.start_control().unwrap();
    let back = Instant::now();
    poll_until("calls pass again", WAIT, || call(&shop.web, to).map(Some)).unwrap();
    let recovered = back.elapsed();
    assert!(
        recovered <= LIFE / 2 + Duration::from_secs(1),
        "recovered {recovered:?} after control, where a renewal takes {:?}",
        LIFE / 2
    );
    let log = shop.a.with_ztunnel(|ztunnel| ztunnel.log()).unwrap();
    assert!(log.contains("no SVID issued"), "the reason is told");
}

#[test]
fn f10_svids_of_seconds_are_renewed_under_load() {
    let shop = Shop::open_with(Options {
        svid_ttl: "5s",
        ..Options::default()
    });
    let _echo = Server::echo(shop.cart.listen(8080).unwrap()).unwrap();
    let to = SocketAddr::from((shop.vip.v4, 80));
    call(&shop.web, to).unwrap();
    let attempts = Attempts::start(&shop.web, to, 100, WAIT).unwrap();
    thread::sleep(Duration::from_secs(if full_length() { 600 } else { 12 }));
    all_complete(&attempts.stop().unwrap()).unwrap();
    let issued = shop.mesh.with_control(|control| control.log()).unwrap();
    let renewals = issued.matches("certificate issued").count();
    assert!(renewals >= 8, "{renewals} certificates were issued");
}

/// `count` objects in files that control takes, by name of the file.
fn in_files(shop: &Shop, name: &str, objects: impl Iterator<Item = Value>) {
    let all: Vec<String> = objects.map(|object| object.to_string()).collect();
    for (number, part) in all.chunks(2_500).enumerate() {
        let text = part.join("\n---\n");
        shop.mesh
            .config()
            .write(&format!("{name}-{number}.yaml"), &text)
            .unwrap();
    }
}

fn workload(number: u32) -> Value {
    let [_, high, middle, low] = number.to_be_bytes();
    json!({
        "apiVersion": "culvert.dev/v1alpha1", "kind": "Workload",
        "metadata": { "name": format!("w{number}"), "namespace": "shop", "labels": { "app": format!("w{}", number % 500) } },
        "spec": { "addresses": [format!("10.200.{}.{}", high ^ middle, low)], "node": "elsewhere" },
    })
}

fn rule(number: u32, port: u32) -> Value {
    json!({
        "apiVersion": "culvert.dev/v1alpha1", "kind": "AuthorizationPolicy",
        "metadata": { "name": format!("p{number}"), "namespace": "shop" },
        "spec": {
            "selector": { "matchLabels": { "app": format!("w{}", number % 500) } },
            "action": "DENY",
            "rules": [{ "to": [{ "operation": { "ports": [port.to_string()] } }] }],
        },
    })
}

fn gate(port: u16) -> Value {
    json!({
        "apiVersion": "culvert.dev/v1alpha1", "kind": "AuthorizationPolicy",
        "metadata": { "name": "gate", "namespace": "shop" },
        "spec": {
            "selector": { "matchLabels": { "app": "cart" } },
            "action": "DENY",
            "rules": [{ "to": [{ "operation": { "ports": [port.to_string()] } }] }],
        },
    })
}

/// CPU seconds of a process so far.
fn cpu_seconds(pid: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let after = stat.rsplit(')').next().unwrap();
    let ticks: Vec<f64> = after
        .split_whitespace()
        .skip(11)
        .take(2)
        .map(|ticks| ticks.parse().unwrap())
        .collect();
    (ticks[0] + ticks[1]) / 100.0
}

#[test]
fn f47_policies_churn_on_a_large_mesh_and_every_verdict_follows_within_a_second() {
    // Shortened in CI: a fifth of the objects, ten seconds of churn.
    let (workloads, rules, turns) = if full_length() {
        (5_000, 10_000, 60)
    } else {
        (1_000, 2_000, 12)
    };
    let shop = Shop::open();
    let _echo = Server::echo(shop.cart.listen(8080).unwrap()).unwrap();
    let to = SocketAddr::from((shop.cart.addresses().v4, 8080));
    in_files(&shop, "workloads", (0..workloads).map(workload));
    in_files(&shop, "rules", (0..rules).map(|number| rule(number, 1)));
    shop.mesh.apply_object(&gate(7)).unwrap();
    poll_until("the large mesh is known", Duration::from_secs(60), || {
        shop.mesh.apply_object(&gate(8080))?;
        Ok(call(&shop.web, to).is_err().then_some(()))
    })
    .unwrap();
    let pid = shop.mesh.with_control(|control| control.pid()).unwrap();
    let (started, cpu) = (Instant::now(), cpu_seconds(pid));
    let done = std::sync::atomic::AtomicBool::new(false);
    let (slowest, changed) = thread::scope(|scope| {
        let end = crate::AtEnd(&done);
        let churn = scope.spawn(|| {
            let mut number = 0u32;
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                // A hundred a second, on two hundred policies beside the many.
                let mut object = rule(number % 200, 2 + number % 60_000);
                object["metadata"]["name"] = format!("churn{}", number % 200).into();
                shop.mesh.apply_object(&object).unwrap();
                number += 1;
                let due = started + Duration::from_millis(10) * number;
                thread::sleep(due.saturating_duration_since(Instant::now()));
            }
            number
        });
        let mut slowest = Duration::ZERO;
        for turn in 0..turns {
            // The oracle: port 8080 is denied on every second turn, and nothing else changes that.
            let denied = turn % 2 == 1;
            let applied = Instant::now();
            shop.mesh
                .apply_object(&gate(if denied { 8080 } else { 7 }))
                .unwrap();
            poll_until("the verdict follows", WAIT, || {
                Ok((call(&shop.web, to).is_err() == denied).then_some(()))
            })
            .unwrap();
            slowest = slowest.max(applied.elapsed());
            for _ in 0..20 {
                assert_eq!(
                    call(&shop.web, to).is_err(),
                    denied,
                    "a wrong verdict on turn {turn}"
                );
                thread::sleep(Duration::from_millis(20));
            }
        }
        drop(end);
        (slowest, churn.join().unwrap())
    });
    let wall = started.elapsed().as_secs_f64();
    let share = (cpu_seconds(pid) - cpu) / wall;
    eprintln!(
        "f47: {changed} changes in {wall:.1} s, slowest verdict {slowest:?}, control used {share:.2} of a core"
    );
    assert!(
        f64::from(changed) / wall > 50.0,
        "{changed} changes in {wall:.1} s"
    );
    assert!(slowest < Duration::from_secs(1), "a verdict took {slowest:?}");
    assert!(share < 0.8, "control used {share:.2} of a core");
}

#[test]
fn t52_control_outlives_a_flood_from_outside() {
    let shop = Shop::open();
    let _echo = Server::echo(shop.cart.listen(8080).unwrap()).unwrap();
    let stranger = shop.mesh.lab().host("stranger").unwrap();
    let control = SocketAddr::from((shop.mesh.control_host().addresses().v4, 15012));
    let pid = shop.mesh.with_control(|control| control.pid()).unwrap();
    let resident = || -> u64 {
        let text = shop.mesh.with_control(|control| control.status_field("VmRSS"));
        let text = text.unwrap().unwrap();
        text.trim_end_matches("kB").trim().parse().unwrap()
    };
    let before = resident();
    let flood = stranger
        .spawn_inside("flood", move || {
            let mut held = Vec::new();
            let mut outcomes = BTreeMap::<&str, usize>::new();
            for number in 0..10_000 {
                let within = Duration::from_millis(500);
                let Ok(mut socket) = std::net::TcpStream::connect_timeout(&control, within) else {
                    *outcomes.entry("not connected").or_default() += 1;
                    continue;
                };
                let garbage: &[u8] = match number % 4 {
                    0 => b"",
                    1 => b"GET / HTTP/1.1\r\n\r\n",
                    2 => &[0x16, 0x03, 0x01, 0xff, 0xff],
                    _ => &[0xff; 2000],
                };
                let _ = socket.write_all(garbage);
                *outcomes.entry("connected").or_default() += 1;
                held.push(socket);
            }
            Ok((held, outcomes))
        })
        .unwrap();
    let (held, outcomes) = flood.join().unwrap().unwrap();
    assert!(
        outcomes.get("connected").is_some_and(|n| *n > 9_000),
        "{outcomes:?}"
    );
    let grown = resident().saturating_sub(before);
    assert!(grown < 64 << 10, "{grown} KiB for strangers");
    eprintln!("{outcomes:?} of 10000 connections; control has grown by {grown} KiB");
    // While they stand, a node's own calls are served.
    let name = PodSpec::new("shop", "late");
    let late = shop.mesh.pod(&shop.b, name).unwrap();
    let _late = Server::echo(late.listen(8080).unwrap()).unwrap();
    let to = SocketAddr::from((late.addresses().v4, 8080));
    poll_until("a new pod is called", WAIT, || call(&shop.web, to).map(Some)).unwrap();
    shop.b.kill_ztunnel().unwrap();
    shop.b.start_ztunnel().unwrap();
    shop.b.wait_ready().unwrap();
    assert_eq!(shop.mesh.with_control(|control| control.pid()).unwrap(), pid);
    assert!(
        shop.mesh
            .with_control(|control| control.ended().unwrap().is_none())
            .unwrap()
    );
    drop(held);
}
