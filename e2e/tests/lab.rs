//! The lab itself: its network carries what it should, and it leaves nothing behind.
#![expect(clippy::unwrap_used, reason = "a test fails where it stands")]

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use culvert_e2e::lab::{Effect, Lab, PodSpec, poll_until};
use culvert_e2e::traffic::{Server, send_pattern};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const CANARY: &[u8] = b"canary-3f1c9a70d2";
const WAIT: Duration = Duration::from_secs(10);

/// Sends the canary from one end and its reverse back, over a connection that both ends close.
fn exchange(mut client: TcpStream, mut server: TcpStream) {
    for socket in [&client, &server] {
        socket.set_read_timeout(Some(WAIT)).unwrap();
    }
    client.write_all(CANARY).unwrap();
    let mut asked = vec![0; CANARY.len()];
    server.read_exact(&mut asked).unwrap();
    asked.reverse();
    server.write_all(&asked).unwrap();
    drop(server);
    let mut answer = Vec::new();
    client.read_to_end(&mut answer).unwrap();
    answer.reverse();
    assert_eq!(answer, CANARY);
}

#[test]
fn pods_of_two_nodes_reach_each_other_and_the_capture_sees_the_canary() {
    let lab = Lab::new().unwrap();
    let (a, b) = (lab.node("a").unwrap(), lab.node("b").unwrap());
    let web = a.pod(PodSpec::new("shop", "web")).unwrap();
    let cart = b.pod(PodSpec::new("shop", "cart")).unwrap();
    let between = a.capture(&[CANARY, b"canary-that-nobody-sends"]).unwrap();
    let listener = cart.listen(8080).unwrap();
    for ip in cart.addresses().all() {
        let client = web.connect((ip, 8080)).unwrap();
        let (server, peer) = listener.accept().unwrap();
        assert_eq!(
            peer.ip().to_canonical(),
            web.ip_like(ip),
            "no address is translated"
        );
        exchange(client, server);
    }
    let recording = between.stop().unwrap();
    for ip in cart.addresses().all() {
        let flows: Vec<_> = recording.flows_between(web.ip_like(ip), ip).collect();
        let [flow] = flows[..] else {
            panic!("one flow to {ip}, not {flows:?}")
        };
        assert!(flow.opened);
        assert_eq!(flow.server, SocketAddr::from((ip, 8080)));
        assert_eq!(flow.client_head(), CANARY);
        assert_eq!(flow.missed_bytes(), 0);
        flow.server_hello().unwrap_err();
    }
    let seen = recording.sightings();
    assert!(
        seen.iter().all(|sighting| sighting.canary.as_bytes() == CANARY),
        "{seen:?}"
    );
    assert!(
        seen.iter()
            .any(|sighting| sighting.place.starts_with("the stream")),
        "{seen:?}"
    );
}

#[test]
fn every_kind_of_machine_reaches_every_other() {
    let lab = Lab::new().unwrap();
    let (a, b) = (lab.node("a").unwrap(), lab.node("b").unwrap());
    let control = lab.host("control").unwrap();
    let outside = lab.outside("outside").unwrap();
    let web = a.pod(PodSpec::new("shop", "web")).unwrap();
    let near = a.pod(PodSpec::new("shop", "near")).unwrap();
    let far = b.pod(PodSpec::new("shop", "far")).unwrap();
    let all = [&*a, &*b, &control, &outside, &*web, &*near, &*far];
    let listeners = all.map(|endpoint| endpoint.listen(7000).unwrap());
    for from in all {
        for (to, listener) in all.iter().zip(&listeners) {
            for ip in to.addresses().all() {
                let client = from
                    .connect((ip, 7000))
                    .unwrap_or_else(|e| panic!("{} to {} at {ip}: {e}", from.name(), to.name()));
                let (server, peer) = listener.accept().unwrap();
                assert_eq!(peer.ip().to_canonical(), from.ip_like(ip));
                exchange(client, server);
            }
        }
    }
}

#[test]
fn programs_run_inside_a_pod_and_end_with_their_deadline() {
    let lab = Lab::new().unwrap();
    let web = lab.node("a").unwrap().pod(PodSpec::new("shop", "web")).unwrap();
    let links = web
        .shell("cut -d: -f1 -s /proc/net/dev | tr -d ' ' | sort | tr -d '\\n'")
        .unwrap();
    assert_eq!(links, "eth0lo");
    let mut sleep = Command::new("sleep");
    sleep.arg("600");
    let error = web.run_within(sleep, Duration::from_millis(100)).unwrap_err();
    assert!(error.to_string().contains("still ran after"), "{error:#}");
}

#[test]
fn an_unprivileged_process_has_no_capability_in_any_set() {
    use culvert_e2e::lab::Start;
    let lab = Lab::new().unwrap();
    let web = lab.node("a").unwrap().pod(PodSpec::new("shop", "web")).unwrap();
    let mut sleep = Command::new("sleep");
    sleep.arg("600");
    let process = web
        .spawn("sleep", Start::from(sleep).as_uid(65532).nofile(256))
        .unwrap();
    poll_until("the program runs", WAIT, || {
        Ok((process.status_field("Name")? == "sleep").then_some(()))
    })
    .unwrap();
    for (field, want) in [
        ("CapInh", "0000000000000000"),
        ("CapPrm", "0000000000000000"),
        ("CapEff", "0000000000000000"),
        ("CapBnd", "0000000000000000"),
        ("CapAmb", "0000000000000000"),
        ("Uid", "65532\t65532\t65532\t65532"),
        ("Gid", "65532\t65532\t65532\t65532"),
        ("Groups", ""),
    ] {
        assert_eq!(process.status_field(field).unwrap(), want, "{field}");
    }
    let limits = fs::read_to_string(format!("/proc/{}/limits", process.pid())).unwrap();
    let files = limits
        .lines()
        .find(|line| line.starts_with("Max open files"))
        .unwrap();
    assert_eq!(files.split_whitespace().nth(3), Some("256"));
}

const VICTIM: &str = "CULVERT_E2E_LAB_VICTIM";

/// Run by `a_killed_lab_leaves_nothing_behind` in a process of its own; a test like the others otherwise.
#[test]
fn a_lab_with_processes_stands_until_it_is_told_to_go() {
    let lab = Lab::new().unwrap();
    let web = lab.node("a").unwrap().pod(PodSpec::new("shop", "web")).unwrap();
    let mut daemon = Command::new("/bin/sh");
    // A child of its own, in a session of its own, that ignores what it can.
    daemon.args(["-c", "trap '' TERM HUP INT; setsid sleep 600 & sleep 600"]);
    let process = web.spawn("daemon", daemon).unwrap();
    if std::env::var_os(VICTIM).is_some() {
        println!(
            "\nLAB {} {} {}",
            lab.first_pid(),
            process.pid(),
            web.netns().inode().unwrap()
        );
        thread::sleep(Duration::from_secs(120));
    }
}

#[test]
fn a_killed_lab_leaves_nothing_behind() {
    // SIGINT is what Ctrl-C sends; nothing handles it.
    for signal in [Signal::SIGKILL, Signal::SIGINT] {
        end_a_lab_by(signal);
    }
}

fn end_a_lab_by(signal: Signal) {
    // A shell that starts this in the background has it ignore SIGINT.
    let mut owner = Command::new("env")
        .arg("--default-signal=INT")
        .arg(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "a_lab_with_processes_stands_until_it_is_told_to_go",
            "--nocapture",
        ])
        .env(VICTIM, "1")
        .stdout(Stdio::piped())
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let stdout = owner.stdout.take().unwrap();
    let line = std::io::BufRead::lines(std::io::BufReader::new(stdout))
        .map_while(Result::ok)
        .find_map(|line| Some(line.strip_prefix("LAB ")?.to_owned()))
        .expect("the lab says what it is made of");
    let words: Vec<u64> = line.split(' ').map(|word| word.parse().unwrap()).collect();
    let [first, _, netns] = words[..] else {
        panic!("{line}")
    };
    let pid_ns = fs::read_link(format!("/proc/{first}/ns/pid")).unwrap();
    let net_ns = format!("net:[{netns}]");
    let inside = |kind: &str, name: &str| -> Vec<String> {
        fs::read_dir("/proc")
            .unwrap()
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|process| {
                let link = fs::read_link(process.join("ns").join(kind));
                let held = fs::read_dir(process.join("fd")).is_ok_and(|files| {
                    files
                        .flatten()
                        .any(|file| fs::read_link(file.path()).is_ok_and(|to| to == *name))
                });
                held || link.is_ok_and(|to| to == *name)
            })
            .map(|process| fs::read_to_string(process.join("cmdline")).unwrap_or_default())
            .collect()
    };
    let pid_ns = pid_ns.to_str().unwrap().to_owned();
    poll_until("both sleeps run", WAIT, || {
        Ok((inside("pid", &pid_ns).len() >= 4).then_some(()))
    })
    .unwrap();
    assert!(!inside("net", &net_ns).is_empty());
    kill(Pid::from_raw(owner.id().try_into().unwrap()), signal).unwrap();
    owner.wait().unwrap();
    poll_until("nothing is left", WAIT, || {
        let left = [inside("pid", &pid_ns), inside("net", &net_ns)].concat();
        if left.is_empty() {
            Ok(Some(()))
        } else {
            anyhow::bail!("{left:?}")
        }
    })
    .unwrap();
}

#[test]
fn a_partition_loses_everything_between_two_machines_and_heals() {
    let lab = Lab::new().unwrap();
    let (a, b) = (lab.node("a").unwrap(), lab.node("b").unwrap());
    let control = lab.host("control").unwrap();
    let web = a.pod(PodSpec::new("shop", "web")).unwrap();
    let cart = b.pod(PodSpec::new("shop", "cart")).unwrap();
    let _echo = Server::echo(cart.listen(80).unwrap()).unwrap();
    let _control = Server::echo(control.listen(80).unwrap()).unwrap();
    let short = Duration::from_millis(300);
    for ip in cart.addresses().all() {
        lab.partition(&a, &b).unwrap();
        assert_eq!(
            web.connect_within((ip, 80), short).unwrap_err().kind(),
            ErrorKind::TimedOut
        );
        web.connect((control.ip_like(ip), 80))
            .expect("others are not concerned");
        lab.heal().unwrap();
        web.connect((ip, 80)).expect("it heals");
        lab.disturb(&b, &a, 1000, Effect::Lost).unwrap();
        assert_eq!(
            web.connect_within((ip, 80), short).unwrap_err().kind(),
            ErrorKind::TimedOut,
            "one way"
        );
        lab.heal().unwrap();
        lab.disturb(&a, &b, 1000, Effect::Reset).unwrap();
        let refused = web.connect((ip, 80)).unwrap_err();
        assert_eq!(
            refused.kind(),
            ErrorKind::ConnectionRefused,
            "a reset answers a SYN"
        );
        lab.heal().unwrap();
    }
}

#[test]
fn a_lossy_or_narrow_link_still_carries_every_byte() {
    let lab = Lab::new().unwrap();
    let (a, b) = (lab.node("a").unwrap(), lab.node("b").unwrap());
    let _digest = Server::digest(b.listen(80).unwrap()).unwrap();
    let transfer = |bytes: u64| {
        let socket = a.connect((b.addresses().v6, 80)).unwrap();
        socket.set_read_timeout(Some(WAIT)).unwrap();
        let start = std::time::Instant::now();
        let sent = send_pattern(&socket, bytes, 7).unwrap();
        let mut arrived = String::new();
        (&socket).read_to_string(&mut arrived).unwrap();
        assert_eq!(arrived, sent);
        start.elapsed()
    };
    let free = transfer(1 << 20);
    lab.limit_rate(&b, Some(8_000_000)).unwrap();
    let narrow = transfer(1 << 20);
    assert!(
        narrow > Duration::from_millis(600),
        "a second's worth at 1 MB/s took {narrow:?}"
    );
    lab.limit_rate(&b, None).unwrap();
    for machine in [&a, &b] {
        machine.set_mtu(1280).unwrap();
    }
    lab.disturb(&a, &b, 50, Effect::Lost).unwrap();
    let lossy = transfer(1 << 20);
    assert!(free < narrow, "free {free:?}, narrow {narrow:?}, lossy {lossy:?}");
}

#[test]
fn a_pod_resolves_as_in_its_cluster() {
    let lab = Lab::new().unwrap();
    lab.resolve_by(&["172.31.1.1".parse().unwrap()], "cluster.local")
        .unwrap();
    let web = lab.node("a").unwrap().pod(PodSpec::new("shop", "web")).unwrap();
    let seen = web.shell("cat /etc/resolv.conf").unwrap();
    let want = "search shop.svc.cluster.local svc.cluster.local cluster.local\noptions ndots:5\n\
                nameserver 172.31.1.1\n";
    assert_eq!(seen, want);
}

#[test]
fn limits_hold_a_process_and_are_gone_after_it() {
    use culvert_e2e::lab::{Limits, Start};
    use std::sync::Arc;
    let lab = Lab::new().unwrap();
    let web = lab.node("a").unwrap().pod(PodSpec::new("shop", "web")).unwrap();
    let limits = Arc::new(Limits::new(Some(64 << 20), Some(0.2)).unwrap());
    let mut busy = Command::new("/bin/sh");
    busy.args(["-c", "while :; do :; done"]);
    let process = web.spawn("busy", Start::from(busy).limits(&limits)).unwrap();
    let stat = || -> u64 {
        let stat = fs::read_to_string(format!("/proc/{}/stat", process.pid())).unwrap();
        stat.rsplit(") ")
            .next()
            .unwrap()
            .split(' ')
            .nth(11)
            .unwrap()
            .parse()
            .unwrap()
    };
    thread::sleep(Duration::from_millis(300));
    let before = stat();
    thread::sleep(Duration::from_secs(1));
    let ticks = stat() - before;
    assert!(ticks <= 40, "a fifth of a processor, not {ticks} hundredths");
    let groups = fs::read_to_string(format!("/proc/{}/cgroup", process.pid())).unwrap();
    let own = format!("culvert-lab.{}.", std::process::id());
    assert!(groups.contains(&own), "{groups}");
    drop((process, limits));
    for folder in ["/sys/fs/cgroup", "/sys/fs/cgroup/memory", "/sys/fs/cgroup/cpu"] {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            assert!(
                !entry.file_name().to_string_lossy().starts_with(&own),
                "{entry:?} is left"
            );
        }
    }
}

#[test]
fn steady_load_accounts_for_everything() {
    use culvert_e2e::load::{Attempts, Failure, Pace, Streams, all_complete};
    let lab = Lab::new().unwrap();
    let node = lab.node("a").unwrap();
    let web = node.pod(PodSpec::new("shop", "web")).unwrap();
    let cart = node.pod(PodSpec::new("shop", "cart")).unwrap();
    let to = SocketAddr::from((cart.addresses().v6, 80));
    let refused = Attempts::start(&web, to, 100, WAIT).unwrap();
    thread::sleep(Duration::from_millis(300));
    for attempt in refused.stop().unwrap() {
        assert_eq!(
            attempt.outcome.unwrap_err(),
            Failure::Connect(ErrorKind::ConnectionRefused)
        );
    }
    let echo = Server::echo(cart.listen(80).unwrap()).unwrap();
    let attempts = Attempts::start(&web, to, 200, WAIT).unwrap();
    let streams = Streams::start(&web, to, 5, Pace::BUSY).unwrap();
    thread::sleep(Duration::from_secs(1));
    let done = attempts.stop().unwrap();
    all_complete(&done).unwrap();
    assert!(
        (150..=250).contains(&done.len()),
        "{} attempts in about a second",
        done.len()
    );
    drop(echo);
    thread::sleep(Duration::from_millis(200));
    let ends = streams.stop().unwrap();
    assert_eq!(ends.len(), 5);
    for end in ends {
        assert!(end.blocks >= 10, "{end:?}");
        assert!(matches!(end.failure, Some((_, Failure::Lost(_)))), "{end:?}");
    }
}
