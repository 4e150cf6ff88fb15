//! What a node has is shared out: descriptors, memory, processor time, ports. One that takes all it can get
//! leaves the others theirs.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use culvert_e2e::lab::{Endpoint, Limits, Pod, PodSpec, poll_until};
use culvert_e2e::load::{Attempts, Pace, Streams, all_complete, percentile};
use culvert_e2e::mesh::{MeshNode, Options};
use culvert_e2e::oracles::records::{Record, records};
use culvert_e2e::traffic::{Server, echo_once, send_pattern};

use crate::{Shop, WAIT, full_length};

const PATIENCE: Duration = Duration::from_secs(15);

/// A second tenant, on the same nodes: `teller` calls `vault`, as `web` calls `cart`.
struct Bank {
    teller: Pod,
    vault: Pod,
}

impl Bank {
    fn open(shop: &Shop) -> Self {
        shop.mesh.namespace("bank").unwrap();
        let teller = shop.mesh.pod(&shop.a, PodSpec::new("bank", "teller")).unwrap();
        let vault = shop.mesh.pod(&shop.b, PodSpec::new("bank", "vault")).unwrap();
        shop.a.wait_published(&teller).unwrap();
        shop.b.wait_published(&vault).unwrap();
        Self { teller, vault }
    }

    fn to_vault(&self) -> SocketAddr {
        (self.vault.addresses().v4, 8080).into()
    }
}

fn alive(node: &MeshNode) {
    let ended = node.with_ztunnel(|ztunnel| ztunnel.ended()).unwrap().unwrap();
    assert!(ended.is_none(), "ztunnel of {} has ended: {ended:?}", node.name());
}

/// Processor time that a node's ztunnel has used.
fn used(node: &MeshNode) -> Duration {
    let pid = node.with_ztunnel(|ztunnel| ztunnel.pid()).unwrap();
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit(") ").next().unwrap().split(' ').collect();
    let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    // A tick is a hundredth of a second on every architecture that we build for.
    Duration::from_millis(ticks * 10)
}

/// Connections that work, of `count` that are opened and kept open. The rest are refused: none is left waiting.
fn open(from: &Endpoint, to: SocketAddr, count: usize) -> Vec<TcpStream> {
    let sockets: Vec<TcpStream> = from
        .inside(|| {
            (0..count)
                .filter_map(|_| TcpStream::connect_timeout(&to, WAIT).ok())
                .collect()
        })
        .unwrap();
    let asked = Instant::now();
    sockets
        .into_iter()
        .filter(|socket| {
            socket.set_read_timeout(Some(WAIT)).unwrap();
            assert!(asked.elapsed() < 2 * WAIT, "connections wait for a refusal");
            echo_once(socket, b"there?")
                .inspect_err(|error| {
                    let kind = error.root_cause().downcast_ref().map(std::io::Error::kind);
                    let waits = kind.is_some_and(|kind| kind == std::io::ErrorKind::WouldBlock);
                    assert!(!waits, "a connection is neither served nor refused");
                })
                .is_ok()
        })
        .collect()
}

/// Records of what was refused for one reason.
fn refusals(shop: &Shop, reason: &str) -> Vec<Record> {
    let all = records(&shop.mesh).unwrap();
    all.into_iter()
        .filter(|record| record.is("reason", reason))
        .collect()
}

fn works(from: &Endpoint, to: SocketAddr) -> anyhow::Result<()> {
    let socket = from.connect_within(to, Duration::from_secs(5))?;
    socket.set_read_timeout(Some(Duration::from_secs(5)))?;
    echo_once(&socket, b"works")
}

#[test]
fn f32_a_pod_that_takes_all_descriptors_leaves_others_theirs() {
    let shop = Shop::open_with(Options {
        ztunnel_nofile: Some(256),
        ..Options::default()
    });
    let bank = Bank::open(&shop);
    let _cart = Server::echo(shop.cart.listen(8080).unwrap()).unwrap();
    let _vault = Server::echo(bank.vault.listen(8080).unwrap()).unwrap();
    let to = SocketAddr::from((shop.cart.addresses().v4, 8080));
    let kept = open(&shop.web, to, 400);
    assert!(
        (20..300).contains(&kept.len()),
        "{} connections at once",
        kept.len()
    );
    for socket in &kept {
        echo_once(socket, b"still").unwrap();
    }
    let refused = |node: &MeshNode| {
        node.metrics()
            .unwrap()
            .sum("culvert_connections_refused_total", &[("reason", "limit")])
    };
    assert!(
        refused(&shop.a) + refused(&shop.b) >= 50.0,
        "what was too much was counted"
    );
    let told = refusals(&shop, "limit");
    assert!(told.len() >= 50, "{} are on record", told.len());
    for record in told {
        let told = ["direction", "src.identity", "dst.identity"].map(|name| record.field(name));
        assert!(
            told.iter()
                .all(|field| field.is_some_and(|value| value != "unknown")),
            "{record:?}"
        );
    }
    // The other tenant does not notice, and nobody spins.
    let before = [used(&shop.a), used(&shop.b)];
    let others = Attempts::start(&bank.teller, bank.to_vault(), 10, PATIENCE).unwrap();
    thread::sleep(Duration::from_secs(3));
    all_complete(&others.stop().unwrap()).unwrap();
    for (node, before) in [&shop.a, &shop.b].into_iter().zip(before) {
        let spent = used(node) - before;
        assert!(
            spent < Duration::from_secs(2),
            "ztunnel of {} spent {spent:?} of 3 s",
            node.name()
        );
        alive(node);
    }
    drop(kept);
    poll_until("there is room again", WAIT, || works(&shop.web, to).map(Some)).unwrap();
}

#[test]
fn tr8_connections_that_wait_are_among_those_that_a_pod_may_have() {
    const MOST: usize = 20;
    let shop = Shop::open_with(Options {
        ztunnel_args: vec!["--max-connections".to_owned(), MOST.to_string()],
        ..Options::default()
    });
    let _cart = Server::echo(shop.cart.listen(8080).unwrap()).unwrap();
    let to = SocketAddr::from((shop.cart.addresses().v4, 8080));
    works(&shop.web, to).unwrap();
    let used = || {
        let page = shop.a.metrics()?;
        anyhow::Ok(page.sum("culvert_quota_used", &[("quota", "connections"), ("pod", "web")]))
    };
    poll_until("nothing is open", WAIT, || Ok((used()? == 0.0).then_some(()))).unwrap();
    // Its peer's ztunnel says nothing for a while: no stream comes up.
    shop.b.with_ztunnel(|ztunnel| ztunnel.pause()).unwrap().unwrap();
    // A refusal may be seen before connect has returned.
    let sockets: Vec<TcpStream> = (0..2 * MOST)
        .filter_map(|_| shop.web.connect_within(to, WAIT).ok())
        .collect();
    let refused = poll_until("the rest is refused", WAIT, || {
        Ok(Some(refusals(&shop, "limit").len()).filter(|count| *count >= MOST))
    });
    let used = used().unwrap();
    shop.b.with_ztunnel(|ztunnel| ztunnel.resume()).unwrap().unwrap();
    assert_eq!((refused.unwrap(), used), (MOST, MOST as f64));
    let carried = sockets.iter().filter(|socket| {
        socket.set_read_timeout(Some(WAIT)).unwrap();
        echo_once(socket, b"there?").is_ok()
    });
    assert_eq!(carried.count(), MOST, "who has waited is carried");
    drop(sockets);
    poll_until("there is room again", WAIT, || works(&shop.web, to).map(Some)).unwrap();
}

#[test]
fn f33_tr8_a_tenant_at_a_hundred_times_the_load_leaves_the_other_its_service() {
    let shop = Shop::open();
    let bank = Bank::open(&shop);
    let _cart = Server::echo(shop.cart.listen(8080).unwrap()).unwrap();
    let _vault = Server::echo(bank.vault.listen(8080).unwrap()).unwrap();
    let seconds = Duration::from_secs(if full_length() { 60 } else { 5 });
    let steady = || {
        let attempts = Attempts::start(&bank.teller, bank.to_vault(), 5, PATIENCE).unwrap();
        thread::sleep(seconds);
        let done = attempts.stop().unwrap();
        all_complete(&done).unwrap();
        percentile(&done, 99)
    };
    works(&bank.teller, bank.to_vault()).unwrap();
    let alone = steady();
    let to = SocketAddr::from((shop.vip.v4, 80));
    let pace = Pace {
        block: 256 << 10,
        every: Duration::from_millis(1),
        patience: Duration::from_secs(30),
    };
    let bulk = Streams::start(&shop.web, to, 8, pace).unwrap();
    let many = Attempts::start(&shop.web, to, 500, Duration::from_secs(30)).unwrap();
    let beside = steady();
    bulk.stop().unwrap();
    many.stop().unwrap();
    // Twice as long is the requirement; below a second this machine's own noise is most of it.
    let bound = (2 * alone).max(Duration::from_secs(1));
    assert!(beside <= bound, "p99 alone {alone:?}, beside the load {beside:?}");
    eprintln!("p99 of 5 attempts a second: alone {alone:?}, beside 500 a second and bulk {beside:?}");
}

#[test]
fn f34_with_little_memory_it_sheds_and_lives() {
    let shop = Shop::open_with(Options {
        ztunnel_memory: Some(64 << 20),
        ..Options::default()
    });
    let _echo = Server::echo(shop.cart.listen(8080).unwrap()).unwrap();
    let deaf = Server::start(shop.cart.listen(6060).unwrap(), |socket, _| async move {
        let _socket = socket;
        tokio::time::sleep(Duration::from_secs(60)).await;
        Ok(())
    })
    .unwrap();
    // As much as the kernel and both ztunnels take, on connections whose reader does not read: their windows
    // together are more than there is.
    let to = SocketAddr::from((shop.cart.addresses().v4, 6060));
    let senders: Vec<TcpStream> = (0..600)
        .filter_map(|_| shop.web.connect_within(to, Duration::from_secs(5)).ok())
        .collect();
    for mut socket in &senders {
        socket.set_nonblocking(true).unwrap();
        let mut left = 64;
        while left > 0 && socket.write(&[0x5a; 16 << 10]).is_ok() {
            left -= 1;
        }
    }
    for _ in 0..20 {
        for mut socket in &senders {
            let _ = socket.write(&[0x5a; 16 << 10]);
        }
        thread::sleep(Duration::from_millis(100));
    }
    alive(&shop.a);
    alive(&shop.b);
    assert!(deaf.accepted() > 0);
    drop(senders);
    poll_until("honest calls pass", WAIT, || {
        works(&shop.web, (shop.vip.v4, 80).into()).map(Some)
    })
    .unwrap();
    alive(&shop.a);
    alive(&shop.b);
}

#[test]
fn f35_with_a_fifth_of_a_processor_it_is_slow_and_right() {
    let limits = Limits::new(None, Some(0.2)).unwrap();
    let shop = Shop::open();
    for node in [&shop.a, &shop.b] {
        limits
            .take(node.with_ztunnel(|ztunnel| ztunnel.pid()).unwrap())
            .unwrap();
    }
    let _echo = Server::echo(shop.cart.listen(8080).unwrap()).unwrap();
    let _digest = Server::digest(shop.cart.listen(9090).unwrap()).unwrap();
    let attempts = Attempts::start(&shop.web, (shop.vip.v4, 80).into(), 10, Duration::from_secs(30)).unwrap();
    let socket = shop.web.connect((shop.cart.addresses().v4, 9090)).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let sent = send_pattern(&socket, 8 << 20, 35).unwrap();
    let mut arrived = String::new();
    (&socket).read_to_string(&mut arrived).unwrap();
    assert_eq!(arrived, sent);
    all_complete(&attempts.stop().unwrap()).unwrap();
}

#[test]
fn f36_without_ports_the_error_is_told_and_no_connection_is_mixed_up() {
    const PORTS: usize = 20;
    let shop = Shop::open();
    let _echo = Server::echo(shop.cart.listen(8080).unwrap()).unwrap();
    let outside = shop.mesh.lab().outside("outside").unwrap();
    let _far = Server::echo(outside.listen(8080).unwrap()).unwrap();
    let to = SocketAddr::from((shop.cart.addresses().v4, 8080));
    works(&shop.web, to).unwrap();
    let direct = SocketAddr::from((outside.addresses().v4, 8080));
    works(&shop.web, direct).unwrap();
    // Towards the application ztunnel names the ports that it dials from, so that the pod's own range is not its
    // bound. Towards the outside the pod's range is, of which the application's own socket takes one as well.
    for (place, to, works_then) in [
        (&shop.cart, to, 3 * PORTS..=3 * PORTS),
        (&shop.web, direct, PORTS / 4..=PORTS),
    ] {
        place
            .sysctl(
                "ipv4/ip_local_port_range",
                &format!("41000 {}", 41_000 + PORTS - 1),
            )
            .unwrap();
        let sockets: Vec<TcpStream> = (0..3 * PORTS)
            .filter_map(|_| shop.web.connect_within(to, Duration::from_secs(5)).ok())
            .collect();
        let mut works_now = 0;
        for (number, mut socket) in sockets.iter().enumerate() {
            socket.set_read_timeout(Some(WAIT)).unwrap();
            let message = format!("message number {number:8}");
            // What fails is reset at once: the application is not left waiting.
            let mut answer = vec![0; message.len()];
            let heard = socket
                .write_all(message.as_bytes())
                .and_then(|()| socket.read_exact(&mut answer));
            match heard {
                Ok(()) => {
                    assert_eq!(answer, message.as_bytes(), "another connection's bytes");
                    works_now += 1;
                }
                Err(e) => assert!(
                    matches!(
                        e.kind(),
                        std::io::ErrorKind::ConnectionReset | std::io::ErrorKind::BrokenPipe
                    ),
                    "connection {number}: {e}"
                ),
            }
        }
        assert!(works_then.contains(&works_now), "{works_now} of {to} work");
        drop(sockets);
        poll_until("ports are free again", Duration::from_secs(90), || {
            works(&shop.web, to).map(Some)
        })
        .unwrap();
        place.sysctl("ipv4/ip_local_port_range", "32768 60999").unwrap();
    }
}

#[test]
fn f40_a_connection_carries_one_source_and_tunnels_are_never_shared_between_pods() {
    let shop = Shop::open();
    let bank = Bank::open(&shop);
    let phone = shop
        .mesh
        .pod(&shop.a, PodSpec::new("shop", "phone").service_account("web"))
        .unwrap();
    shop.mesh
        .apply(
            "apiVersion: culvert.dev/v1alpha1\nkind: AuthorizationPolicy\n\
             metadata: {name: everybody, namespace: shop}\nspec:\n  selector: {matchLabels: {app: cart}}\n  \
             rules:\n  - from:\n    - source: {namespaces: [shop, bank]}\n",
        )
        .unwrap();
    let _greeting = Server::greet(shop.cart.listen(8080).unwrap()).unwrap();
    let link = shop.a.node().capture(&[]).unwrap();
    // `phone` has the very identity of `web`: still another pod, with an address of its own.
    let sources = [
        (&shop.web, "shop/sa/web"),
        (&phone, "shop/sa/web"),
        (&bank.teller, "bank/sa/teller"),
    ];
    let to = SocketAddr::from((shop.vip.v4, 80));
    let rounds = if full_length() { 400 } else { 40 };
    for (pod, _) in sources {
        poll_until("the policy is in force", WAIT, || greeted(pod, to).map(Some)).unwrap();
    }
    thread::scope(|scope| {
        for (pod, _) in sources {
            scope.spawn(move || {
                for round in 0..rounds {
                    let (name, mut socket) = greeted(pod, to).unwrap();
                    assert_eq!(name, pod.addresses().v4.to_string(), "round {round}");
                    let canary = format!("canary of {} in round {round:6}", pod.name());
                    socket.write_all(canary.as_bytes()).unwrap();
                    let mut heard = vec![0; canary.len()];
                    socket.read_exact(&mut heard).unwrap();
                    assert_eq!(heard, canary.as_bytes(), "{}", pod.name());
                }
            });
        }
    });
    // What is open shows one identity for each source address, and the right one.
    let held: Vec<_> = sources.map(|(pod, _)| greeted(pod, to).unwrap()).into();
    let page: serde_json::Value =
        serde_json::from_str(&shop.b.admin("/debug/connections").unwrap().body).unwrap();
    let mut seen: BTreeMap<IpAddr, BTreeSet<String>> = BTreeMap::new();
    for connection in page["pods"]
        .as_array()
        .unwrap()
        .iter()
        .flat_map(|pod| pod["connections"].as_array().unwrap())
    {
        let source: SocketAddr = connection["src"].as_str().unwrap().parse().unwrap();
        let peer = connection["peer"].as_str().unwrap_or_default().to_owned();
        seen.entry(source.ip()).or_default().insert(peer);
    }
    for (pod, account) in sources {
        let want = BTreeSet::from([format!("spiffe://cluster.local/ns/{account}")]);
        assert_eq!(
            seen.get(&IpAddr::from(pod.addresses().v4)),
            Some(&want),
            "{}",
            pod.name()
        );
    }
    drop(held);
    // Every tunnel is some one pod's, and each pod has its own.
    let recording = link.stop().unwrap();
    let tunnels: BTreeSet<IpAddr> = recording
        .flows_with_payload()
        .filter(|flow| flow.server == SocketAddr::from((shop.cart.addresses().v4, 15008)))
        .map(|flow| flow.client.ip())
        .collect();
    let own = BTreeSet::from(sources.map(|(pod, _)| IpAddr::from(pod.addresses().v4)));
    assert_eq!(tunnels, own);
}

/// A connection to a server that names its client, and the name.
fn greeted(from: &Pod, to: SocketAddr) -> anyhow::Result<(String, TcpStream)> {
    let socket = from.connect_within(to, Duration::from_secs(5))?;
    socket.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut line = String::new();
    BufReader::with_capacity(1, &socket).read_line(&mut line)?;
    anyhow::ensure!(line.ends_with('\n'), "no greeting");
    Ok((line.trim().trim_start_matches("220 ").to_owned(), socket))
}

#[test]
fn t28_a_call_to_the_metadata_address_is_the_pods_own_or_none() {
    let shop = Shop::open();
    let metadata = shop
        .mesh
        .lab()
        .outside_at("metadata", [169, 254, 169, 254].into())
        .unwrap();
    let server = Server::greet(metadata.listen(80).unwrap()).unwrap();
    let to = SocketAddr::from((metadata.addresses().v4, 80));
    let (seen, _socket) = greeted(&shop.web, to).unwrap();
    assert_eq!(seen, shop.web.addresses().v4.to_string(), "the pod's own address");
    shop.mesh
        .apply(
            "apiVersion: culvert.dev/v1alpha1\nkind: AuthorizationPolicy\n\
             metadata: {name: no-metadata, namespace: shop}\nspec:\n  direction: Outbound\n  action: DENY\n  \
             rules:\n  - to: [{operation: {ipBlocks: [169.254.169.254/32]}}]\n",
        )
        .unwrap();
    let heard = poll_until("the rule is in force", WAIT, || {
        let before = server.accepted();
        let refused = greeted(&shop.web, to).is_err();
        Ok((refused && server.accepted() == before).then_some(before))
    })
    .unwrap();
    let start = Instant::now();
    for _ in 0..5 {
        assert!(greeted(&shop.web, to).is_err());
    }
    assert!(start.elapsed() < WAIT, "a refusal does not keep the pod waiting");
    assert_eq!(server.accepted(), heard);
}
