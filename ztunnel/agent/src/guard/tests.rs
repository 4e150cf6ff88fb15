//! The guard on a real link, with whatever a pod may send.

use super::*;
use crate::{
    capture::{Capture, Rules},
    lab::{FAR_V4, HOST_LINK, Lab, NODE_V4, NODE_V6, POD_V4, run},
    marks::Marks,
    netns::Netns,
};
use std::{
    io::{self, Read, Write},
    net::{TcpListener, TcpStream},
    time::Duration,
};

const SOON: Duration = Duration::from_secs(2);
const SHORT: Duration = Duration::from_millis(400);

fn strict() -> GuardRules {
    GuardRules {
        resolvers: vec![],
        mesh_nets: vec!["10.77.0.0/24".parse().unwrap(), "fd77::/64".parse().unwrap()],
        node: vec![NODE_V4, NODE_V6],
        probe_ports: vec![8080],
        inbound_ports: vec![2222],
        outbound_ports: vec![3333],
        outbound_nets: vec![],
        refuse_plaintext: true,
        refuse_other_traffic: false,
    }
}

/// Runs the guard's work where the agent would be: in the node's namespace.
fn on_node<T: Send>(lab: &Lab, work: impl AsyncFnOnce() -> T + Send) -> T {
    let visit = || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(work())
    };
    lab.node.enter(visit).unwrap()
}

async fn lab() -> Lab {
    Lab::new().await
}

fn serve(netns: &Netns, ip: IpAddr, port: u16) -> TcpListener {
    netns.enter(|| TcpListener::bind((ip, port))).unwrap().unwrap()
}

fn dial(netns: &Netns, ip: IpAddr, port: u16) -> io::Result<TcpStream> {
    let stream = netns
        .enter(|| TcpStream::connect_timeout(&(ip, port).into(), SHORT))
        .unwrap()?;
    stream.set_read_timeout(Some(SOON))?;
    Ok(stream)
}

fn arrives(from: &mut TcpStream, to: &mut TcpStream) -> bool {
    to.set_read_timeout(Some(SHORT)).unwrap();
    from.write_all(b"canary").unwrap();
    to.read_exact(&mut [0; 6]).is_ok()
}

#[tokio::test]
async fn tr10_4_only_what_is_allowed_leaves_the_pod() {
    let lab = lab().await;
    let ifindex = lab.host_ifindex();
    let servers: Vec<_> = [80, 15008, 3333, 443]
        .map(|port| serve(&lab.node, IpAddr::from([0; 16]), port))
        .into();
    let cases = [
        (NODE_V4, 80, false),
        (FAR_V4, 80, false),
        (NODE_V6, 80, false),
        (NODE_V4, 15008, true),
        (NODE_V6, 15008, true),
        (NODE_V4, 3333, true),
    ];
    for (ip, port, _) in cases {
        assert!(dial(&lab.pod, ip, port).is_ok(), "without a guard {ip}:{port}");
    }
    on_node(&lab, async || {
        let mut guard = Guard::stand(&Host::new().unwrap(), ifindex, strict())
            .await
            .unwrap();
        for (ip, port, passes) in cases {
            assert_eq!(dial(&lab.pod, ip, port).is_ok(), passes, "{ip}:{port}");
        }
        assert!(guard.dropped().await.unwrap() >= 3);
        for ip in [NODE_V4, NODE_V6] {
            assert!(dial(&lab.pod, ip, 443).is_err());
            guard.declare((ip, 443).into()).await.unwrap();
            guard.declare((ip, 443).into()).await.unwrap();
            assert!(dial(&lab.pod, ip, 443).is_ok(), "declared {ip}");
        }
        let dropped = guard.dropped().await.unwrap();
        guard.replace(strict()).await.unwrap();
        assert!(
            dial(&lab.pod, NODE_V4, 443).is_ok(),
            "declarations outlive other rules"
        );
        assert!(guard.dropped().await.unwrap() >= dropped, "so do counters");
        guard.leave().await.unwrap();
    });
    assert!(dial(&lab.pod, NODE_V4, 80).is_ok());
    drop(servers);
}

#[tokio::test]
async fn f07_nothing_of_a_captured_connection_leaves_after_the_pods_rules_were_flushed() {
    let lab = lab().await;
    let ifindex = lab.host_ifindex();
    let rules = Rules {
        marks: Marks::random(),
        resolvers: vec![],
        node: vec![],
        probe_ports: vec![],
        exclude_inbound_ports: vec![],
        exclude_outbound_ports: vec![],
        exclude_outbound_nets: vec![],
        refuse_other_traffic: false,
        spare_older: false,
    };
    let kept = crate::listeners::listen(&lab.pod, rules.marks.socket, &[]).unwrap();
    let _capture = Capture::install(&lab.pod, rules).await.unwrap();
    // A connection from before, which the far end would go on reading.
    let server = serve(&lab.node, NODE_V4, 80);
    on_node(&lab, async || {
        let mut open = strict();
        open.mesh_nets.clear();
        let mut guard = Guard::stand(&Host::new().unwrap(), ifindex, open).await.unwrap();
        let _captured = dial(&lab.pod, NODE_V4, 80).unwrap();
        guard.replace(strict()).await.unwrap();
        assert!(run(&lab.pod, "nft", &["flush ruleset"]).status.success());
        // Without its routes, too: as root in the pod may do it.
        let unwalled = run(&lab.pod, "ip", &["rule", "del", "priority", "2"]);
        assert!(unwalled.status.success());
        assert!(dial(&lab.pod, NODE_V4, 80).is_err(), "a new one");
        let before = guard.dropped().await.unwrap();
        let mut captured = _captured;
        let _ = captured.write_all(b"canary");
        std::thread::sleep(SHORT);
        assert!(guard.dropped().await.unwrap() > before, "its segment was dropped");
    });
    server.set_nonblocking(true).unwrap();
    assert!(server.accept().is_err());
    drop(kept);
}

#[tokio::test]
async fn connections_from_before_enrolment_go_on_until_their_grace_is_over() {
    let lab = lab().await;
    let ifindex = lab.host_ifindex();
    let server = serve(&lab.node, NODE_V4, 80);
    let mut app = dial(&lab.pod, NODE_V4, 80).unwrap();
    let mut served = server.accept().unwrap().0;
    on_node(&lab, async || {
        let grace = GuardRules {
            mesh_nets: vec![],
            ..strict()
        };
        let mut guard = Guard::stand(&Host::new().unwrap(), ifindex, grace).await.unwrap();
        assert!(arrives(&mut app, &mut served));
        guard.replace(strict()).await.unwrap();
        assert!(!arrives(&mut app, &mut served));
        guard.leave().await.unwrap();
    });
}

#[tokio::test]
async fn callers_in_plaintext_are_answered_where_it_is_not_refused_and_probes_always() {
    let lab = lab().await;
    let ifindex = lab.host_ifindex();
    let app = serve(&lab.pod, POD_V4, 80);
    let probed = serve(&lab.pod, POD_V4, 8080);
    let excluded = serve(&lab.pod, POD_V4, 2222);
    for (refuse, port, listener, answered) in [
        (true, 80, &app, false),
        (false, 80, &app, true),
        (true, 8080, &probed, true),
        (true, 2222, &excluded, true),
    ] {
        on_node(&lab, async || {
            let rules = GuardRules {
                refuse_plaintext: refuse,
                ..strict()
            };
            let guard = Guard::stand(&Host::new().unwrap(), ifindex, rules).await.unwrap();
            let mut client = TcpStream::connect_timeout(&(POD_V4, port).into(), SOON).unwrap();
            let mut served = listener.accept().unwrap().0;
            assert_eq!(arrives(&mut served, &mut client), answered, "{port}");
            guard.leave().await.unwrap();
        });
    }
    // A refusal is heard at once.
    on_node(&lab, async || {
        let guard = Guard::stand(&Host::new().unwrap(), ifindex, strict())
            .await
            .unwrap();
        let refused = TcpStream::connect_timeout(&(POD_V4, 81).into(), SOON).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
        guard.leave().await.unwrap();
    });
}

#[tokio::test]
async fn a_change_of_the_guard_is_seen_and_repaired() {
    let lab = lab().await;
    let ifindex = lab.host_ifindex();
    on_node(&lab, async || {
        let host = Host::new().unwrap();
        let mut guard = Guard::stand(&host, ifindex, strict()).await.unwrap();
        guard.declare((NODE_V4, 443).into()).await.unwrap();
        assert!(dial(&lab.pod, NODE_V4, 80).is_err());
        assert!(
            guard.is_intact(host.generation().await.unwrap()).await.unwrap(),
            "counters and declarations are no change"
        );
        let table = format!("culvert-{ifindex}");
        for change in [
            "flush ruleset".to_owned(),
            format!("delete table netdev {table}"),
            format!("insert rule netdev {table} from-pod accept"),
        ] {
            assert!(run(&lab.node, "nft", &[&change]).status.success(), "{change}");
            assert!(
                !guard.is_intact(host.generation().await.unwrap()).await.unwrap(),
                "{change}"
            );
            guard.repair().await.unwrap();
            assert!(guard.is_intact(host.generation().await.unwrap()).await.unwrap());
            let listed = run(&lab.node, "nft", &["list", "ruleset"]);
            let listed = String::from_utf8(listed.stdout).unwrap();
            assert!(
                listed.contains(&format!("hook ingress device \"{HOST_LINK}\"")),
                "{listed}"
            );
            assert!(listed.contains("10.77.0.1 . 443"), "{listed}");
        }
        guard.leave().await.unwrap();
    });
}
