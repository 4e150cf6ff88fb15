//! The privileged half: what it may do, what it keeps for others, and what a pod's owner can ask of it.

use std::fs;
use std::io::{self, Read};
use std::net::{IpAddr, SocketAddr};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use culvert_e2e::lab::{Endpoint, PodSpec, poll_until};
use culvert_e2e::load::{Attempts, all_complete};
use culvert_e2e::mesh::{Options, cni, config};
use culvert_e2e::traffic::{Server, echo_once};

use crate::{Shop, WAIT, full_length};

const CANARY: &[u8] = b"canary-a9e47710d2";

const SHORT: Duration = Duration::from_secs(3);

fn reached(from: &Endpoint, to: SocketAddr) -> Result<()> {
    let socket = from.connect_within(to, SHORT)?;
    socket.set_read_timeout(Some(SHORT))?;
    echo_once(&socket, CANARY)
}

/// What a server in plaintext says that greets with its caller's address.
fn greeting(from: &Endpoint, to: SocketAddr) -> io::Result<String> {
    let mut socket = from.connect_within(to, SHORT)?;
    socket.set_read_timeout(Some(SHORT))?;
    let mut said = [0; 64];
    let length = socket.read(&mut said)?;
    Ok(String::from_utf8_lossy(&said[..length]).trim_end().to_owned())
}

#[test]
fn tr9_the_agent_has_two_capabilities_and_listens_to_no_network() {
    let shop = Shop::open();
    for node in [&shop.a, &shop.b] {
        let pid = node.with_agent(|agent| agent.pid()).unwrap();
        for task in fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
            let status = fs::read_to_string(task.unwrap().path().join("status")).unwrap();
            // SYS_ADMIN and NET_ADMIN.
            for line in [
                "CapPrm:\t0000000000201000",
                "CapEff:\t0000000000201000",
                "CapInh:\t0000000000000000",
                "CapBnd:\t0000000000201000",
                "CapAmb:\t0000000000000000",
                "NoNewPrivs:\t1",
                "Seccomp:\t2",
            ] {
                assert!(status.lines().any(|found| found == line), "{line} in\n{status}");
            }
        }
        for table in ["tcp", "tcp6", "udp", "udp6", "raw", "raw6"] {
            let sockets = fs::read_to_string(format!("/proc/{pid}/net/{table}")).unwrap();
            // Nothing else runs on the lab's nodes; 0A is LISTEN, and 07 a socket that takes datagrams.
            let open = sockets.lines().skip(1).filter(|line| {
                let state = line.split_whitespace().nth(3);
                matches!(state, Some("0A" | "07"))
            });
            assert_eq!(open.count(), 0, "{table} of {}:\n{sockets}", node.name());
        }
    }
}

#[test]
fn d2_an_agent_that_is_killed_gets_everything_back_and_nobody_notices() {
    let shop = Shop::open();
    let server = Server::echo(shop.cart.listen(8080).unwrap()).unwrap();
    let to = SocketAddr::from((shop.vip.v4, 80));
    reached(&shop.web, to).unwrap();
    let attempts = Attempts::start(&shop.web, to, 100, WAIT).unwrap();
    for node in [&shop.a, &shop.b] {
        node.kill_agent().unwrap();
        thread::sleep(Duration::from_secs(1));
        node.start_agent().unwrap();
        thread::sleep(Duration::from_secs(2));
    }
    let late = shop.mesh.pod(&shop.a, PodSpec::new("shop", "late")).unwrap();
    shop.a.wait_published(&late).unwrap();
    reached(&late, to).unwrap();
    all_complete(&attempts.stop().unwrap()).unwrap();
    // Both lost: the rules stay, and so does everybody where he is.
    let links = [shop.web.capture(&[CANARY]), shop.cart.capture(&[CANARY])];
    shop.a.kill_agent().unwrap();
    shop.a.kill_ztunnel().unwrap();
    let heard = server.accepted();
    for ip in shop.vip.all().into_iter().chain(shop.cart.addresses().all()) {
        for port in [80, 8080] {
            let refused = shop.web.connect_within((ip, port), SHORT).unwrap_err();
            assert_eq!(
                refused.kind(),
                io::ErrorKind::ConnectionRefused,
                "{ip} port {port}"
            );
        }
    }
    assert_eq!(server.accepted(), heard);
    shop.a.start_agent().unwrap();
    shop.a.start_ztunnel().unwrap();
    poll_until("the mesh is back", WAIT, || reached(&shop.web, to).map(Some)).unwrap();
    for link in links {
        assert_eq!(link.unwrap().stop().unwrap().sightings(), []);
    }
}

#[test]
fn d2_a_pods_network_goes_when_the_pod_has_gone() {
    let shop = Shop::open();
    let _echo = Server::echo(shop.cart.listen(8080).unwrap()).unwrap();
    let pod = shop.mesh.pod(&shop.a, PodSpec::new("shop", "brief")).unwrap();
    shop.a.wait_published(&pod).unwrap();
    let to = SocketAddr::from((shop.vip.v4, 80));
    // Tunnels, and sockets in stock, are what could hold it.
    reached(&pod, to).unwrap();
    let link = pod.host_link().to_owned();
    assert!(has_link(&shop, &link));
    cni::delete(&shop.a.cni_socket(), &pod).unwrap();
    let gone = Instant::now();
    shop.mesh.delete("Pod", "shop", "brief").unwrap();
    drop(pod);
    // A link's end goes with the namespace that has the other: nobody holds it any more. ztunnel has two
    // seconds; the kernel takes its own time to take a namespace down.
    while has_link(&shop, &link) {
        assert!(
            gone.elapsed() < Duration::from_secs(4),
            "something holds the namespace"
        );
        thread::sleep(Duration::from_millis(50));
    }
}

fn has_link(shop: &Shop, name: &str) -> bool {
    let found = shop.a.node().inside(|| nix::net::if_::if_nametoindex(name));
    found.unwrap().is_ok()
}

#[test]
fn d9_probes_reach_declared_ports_from_the_pods_own_node_alone() {
    let shop = Shop::open();
    let probed = shop
        .mesh
        .pod(&shop.b, PodSpec::new("shop", "probed").probe(8081))
        .unwrap();
    shop.b.wait_published(&probed).unwrap();
    let declared = Server::greet(probed.listen(8081).unwrap()).unwrap();
    let other = Server::greet(probed.listen(8082).unwrap()).unwrap();
    for ip in probed.addresses().all() {
        let node = shop.b.node();
        let said = greeting(node, (ip, 8081).into()).unwrap_or_else(|e| panic!("a probe of {ip}: {e}"));
        assert_eq!(said, format!("220 {}", node.ip_like(ip)), "untranslated");
        let heard = declared.accepted();
        assert!(
            greeting(node, (ip, 8082).into()).is_err(),
            "{ip}: a port that is not declared"
        );
        assert!(
            greeting(shop.a.node(), (ip, 8081).into()).is_err(),
            "{ip}: another node"
        );
        assert_eq!(declared.accepted(), heard);
        assert_eq!(other.accepted(), 0);
    }
}

#[test]
fn exclusions_leave_the_mesh_and_nothing_else_does() {
    let shop = Shop::open_with(Options {
        egress: "deny",
        ..Options::default()
    });
    let outside = shop.mesh.lab().outside("outside").unwrap();
    let servers = [80, 3306].map(|port| Server::greet(outside.listen(port).unwrap()).unwrap());
    let stranger = shop.mesh.lab().host("stranger").unwrap();
    let _stranger_greets = Server::greet(stranger.listen(80).unwrap()).unwrap();
    let spec = PodSpec::new("shop", "apart")
        .annotation("culvert.dev/exclude-outbound-ports", "3306")
        .annotation("culvert.dev/exclude-outbound-cidrs", "172.31.1.0/24")
        .annotation("culvert.dev/exclude-inbound-ports", "2222");
    let apart = shop.mesh.pod(&shop.a, spec).unwrap();
    shop.a.wait_published(&apart).unwrap();
    let own = Server::greet(apart.listen(2222).unwrap()).unwrap();
    let shut = Server::greet(apart.listen(2223).unwrap()).unwrap();
    // Directly: the far end sees the pod.
    for to in outside.addresses().all().map(|ip| SocketAddr::from((ip, 3306))) {
        let said = greeting(&apart, to).unwrap_or_else(|e| panic!("excluded port {to}: {e}"));
        assert_eq!(said, format!("220 {}", apart.ip_like(to.ip())));
        assert!(
            greeting(&shop.web, to).is_err(),
            "{to} from a pod that excludes nothing"
        );
    }
    let excluded_net = SocketAddr::from((stranger.addresses().v4, 80));
    assert_eq!(
        greeting(&apart, excluded_net).unwrap(),
        format!("220 {}", apart.addresses().v4)
    );
    for ip in outside.addresses().all() {
        assert!(greeting(&apart, (ip, 80).into()).is_err(), "{ip}: not excluded");
    }
    assert_eq!(servers[0].accepted(), 0, "egress is denied but for exclusions");
    for ip in apart.addresses().all() {
        let said = greeting(&stranger, (ip, 2222).into()).unwrap_or_else(|e| panic!("{ip}: {e}"));
        assert_eq!(said, format!("220 {}", stranger.ip_like(ip)));
        assert!(
            greeting(&stranger, (ip, 2223).into()).is_err(),
            "{ip}: a port in the mesh"
        );
    }
    assert_eq!((own.accepted(), shut.accepted()), (2, 0));
}

#[test]
fn d8_connections_from_before_enrolment_have_their_grace() {
    const GRACE: Duration = Duration::from_secs(60);
    let shop = Shop::open();
    shop.mesh
        .apply("apiVersion: v1\nkind: Namespace\nmetadata: {name: plain}\n")
        .unwrap();
    let plain = shop.mesh.pod(&shop.b, PodSpec::new("plain", "plain")).unwrap();
    let _echo = Server::echo(plain.listen(8080).unwrap()).unwrap();
    let outside = shop.mesh.lab().outside("outside").unwrap();
    let _far_echo = Server::echo(outside.listen(8080).unwrap()).unwrap();
    let mover = PodSpec::new("shop", "mover").label(config::ENROL, "none");
    let mover = shop.mesh.pod(&shop.a, mover).unwrap();
    let open = |ip: IpAddr| {
        let socket = mover.connect((ip, 8080)).unwrap();
        socket.set_read_timeout(Some(SHORT)).unwrap();
        echo_once(&socket, CANARY).unwrap();
        socket
    };
    let inside: Vec<_> = plain.addresses().all().map(open).into();
    let far: Vec<_> = outside.addresses().all().map(open).into();
    let mut object = config::pod(&mover);
    object["metadata"]["labels"][config::ENROL] = "ambient".into();
    shop.mesh.apply_object(&object).unwrap();
    let enrolled = Instant::now();
    thread::sleep(Duration::from_secs(2));
    for socket in inside.iter().chain(&far) {
        echo_once(socket, CANARY).unwrap_or_else(|e| panic!("in its grace: {e:#}"));
    }
    ensure_enrolled(&shop, &mover).unwrap();
    if !full_length() {
        return;
    }
    thread::sleep((GRACE + Duration::from_secs(2)).saturating_sub(enrolled.elapsed()));
    for socket in &inside {
        assert!(echo_once(socket, CANARY).is_err(), "into the mesh it is over");
    }
    for socket in &far {
        echo_once(socket, CANARY).unwrap_or_else(|e| panic!("to elsewhere it goes on: {e:#}"));
    }
}

fn ensure_enrolled(shop: &Shop, pod: &culvert_e2e::lab::Pod) -> Result<()> {
    poll_until("the pod is enrolled", WAIT, || {
        let dump: serde_json::Value = serde_json::from_str(&shop.a.admin("/config_dump")?.body)?;
        let all = dump["workloads"].as_array();
        ensure!(all.is_some(), "no workloads are shown");
        let enrolled = all
            .into_iter()
            .flatten()
            .any(|one| one["name"] == pod.spec().name && one["protocol"] == "HBONE");
        Ok(enrolled.then_some(()))
    })
}
