//! The agent as its neighbours meet it: through its sockets, with a node and a pod of the test's own.

use super::*;
use crate::{
    lab::{FAR_V4, Lab, NODE_V4, POD_V4, POD_V6, ruleset, run},
    orders::octets,
    serve, watch,
};
use culvert_io::agent_socket::{Channel, Listener, VERSION};
use culvert_proto::{
    agent::{FromAgent, FromZtunnel, SocketKind},
    node::CaptureState,
};
use std::{
    net::{TcpListener, TcpStream},
    os::fd::AsFd,
    path::Path,
};
use tokio::task::JoinSet;

const SOON: Duration = Duration::from_secs(3);
const HOLD: Duration = Duration::from_millis(700);
const UID: &str = "0d2f7f2e-0001";

/// Runs a test in the node's namespace, where the agent is.
fn on_node(test: impl AsyncFnOnce(&Lab) + Send) {
    // Shown for tests that fail.
    let _ = tracing_subscriber::fmt().with_test_writer().try_init();
    let setup = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let lab = setup.block_on(Lab::new());
    let run = || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(test(&lab));
    };
    lab.node.enter(run).unwrap();
}

/// A node's folder; the namespaces that agents have mounted in it go with it.
struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        for kept in std::fs::read_dir(self.path().join("run/netns"))
            .into_iter()
            .flatten()
            .flatten()
        {
            let _ = nix::mount::umount2(&kept.path(), nix::mount::MntFlags::MNT_DETACH);
        }
    }
}

/// The agent without its process; dropping it is what SIGKILL is to the real one.
struct Agent<'a> {
    folder: &'a Path,
    events: mpsc::Sender<Event>,
    reports: mpsc::Receiver<NodeReport>,
    _tasks: JoinSet<()>,
}

impl<'a> Agent<'a> {
    async fn start(folder: &'a Path) -> Self {
        Self::start_for(folder, 0).await
    }

    async fn start_for(folder: &'a Path, ztunnel_uid: u32) -> Self {
        let records = Records::open(&folder.join("run")).unwrap();
        let sources = Sources::default();
        let config = Config {
            places: Places::new(folder.join("netns"), records.clone()),
            drain: Duration::from_millis(1500),
        };
        let pods = Pods::open(config, records, sources.clone()).await.unwrap();
        let (events, queue) = mpsc::channel(64);
        let mut tasks = JoinSet::new();
        let cni = Listener::bind(&folder.join("cni.sock")).unwrap();
        let ztunnel = Listener::bind(&folder.join("ztunnel.sock")).unwrap();
        tasks.spawn(pods.run(queue));
        tasks.spawn(watch::cni::serve(cni, HOLD, events.clone()));
        tasks.spawn(serve::serve(ztunnel, ztunnel_uid, sources, events.clone()));
        let (_, reports) = mpsc::channel(1);
        Self {
            folder,
            events,
            reports,
            _tasks: tasks,
        }
    }

    /// Control comes: what it would say first, and a place for its reports.
    async fn control(&mut self) {
        let (sender, reports) = mpsc::channel(1024);
        self.reports = reports;
        self.events.send(Event::ControlFound(sender)).await.unwrap();
        self.order(node_order::Order::Settings(node::NodeSettings {
            resolvers: vec![octets(NODE_V4)],
            mesh_ranges: vec![node::Cidr {
                address: vec![10, 77, 0, 0],
                length: 24,
            }],
            refuse_other_traffic: false,
            enrolment_grace_seconds: 60,
        }))
        .await;
    }

    async fn order(&self, order: node_order::Order) {
        let order = node::NodeOrder { order: Some(order) };
        self.events.send(Event::Order(order)).await.unwrap();
    }

    async fn enrol(&self, enrolled: bool) {
        self.order(node_order::Order::Pod(node::PodOrder {
            uid: UID.to_owned(),
            enrolled,
            spiffe_id: "spiffe://cluster.local/ns/shop/sa/web".to_owned(),
            namespace_apart: !enrolled,
            ..Default::default()
        }))
        .await;
    }

    /// Waits for a report of this state of the pod.
    async fn reported(&mut self, want: CaptureState) -> String {
        let seen = async {
            loop {
                let report = self.reports.recv().await.unwrap().report;
                if let Some(node_report::Report::State(state)) = report
                    && state.capture() == want
                {
                    return state.reason;
                }
            }
        };
        tokio::time::timeout(SOON, seen)
            .await
            .unwrap_or_else(|_| panic!("{want:?} was not reported"))
    }

    /// A CNI call, and what was answered.
    async fn call(&self, request: serde_json::Value, netns: Option<&Netns>) -> serde_json::Value {
        let channel = Channel::connect(&self.folder.join("cni.sock")).unwrap();
        let fds: Vec<_> = netns.into_iter().map(|netns| netns.as_fd()).collect();
        let request = request.to_string();
        channel.send_bytes(request.as_bytes(), &fds).await.unwrap();
        let (answer, _) = channel.recv_bytes().await.unwrap().unwrap();
        serde_json::from_slice(&answer).unwrap()
    }

    async fn add(&self, lab: &Lab) -> serde_json::Value {
        self.call(add(lab), Some(&lab.pod)).await
    }

    /// An enrolled pod.
    async fn with_pod(folder: &'a Path, lab: &Lab) -> Self {
        let mut agent = Self::start(folder).await;
        agent.control().await;
        let (answer, ()) = tokio::join!(agent.add(lab), async {
            tokio::time::sleep(Duration::from_millis(50)).await;
            agent.enrol(true).await;
        });
        assert_eq!(answer["ok"], true, "{answer}");
        agent
    }

    async fn ztunnel(&self) -> Ztunnel {
        Ztunnel::connect(&self.folder.join("ztunnel.sock")).await
    }
}

fn add(lab: &Lab) -> serde_json::Value {
    serde_json::json!({
        "cmd": "ADD", "uid": UID, "namespace": "shop", "name": "web",
        "addresses": [POD_V4, POD_V6], "host_ifindex": lab.host_ifindex(),
    })
}

/// A ztunnel reduced to its socket.
struct Ztunnel(Channel);

impl Ztunnel {
    async fn connect(path: &Path) -> Self {
        let ztunnel = Self(Channel::connect(path).unwrap());
        let hello = agent::ZtunnelHello {
            version: VERSION,
            instance: 1,
        };
        ztunnel.say(from_ztunnel::Message::Hello(hello)).await;
        ztunnel
    }

    async fn say(&self, message: from_ztunnel::Message) {
        let message = FromZtunnel {
            message: Some(message),
        };
        self.0.send(&message, &[]).await.unwrap();
    }

    /// The next message that `pick` wants; others are passed over.
    async fn next<T>(&self, mut pick: impl FnMut(from_agent::Message) -> Option<T>) -> (T, Vec<OwnedFd>) {
        let next = async {
            loop {
                let (message, fds) = self.0.recv::<FromAgent>().await.unwrap().expect("open");
                if let Some(picked) = pick(message.message.unwrap()) {
                    return (picked, fds);
                }
            }
        };
        tokio::time::timeout(SOON, next).await.expect("a message")
    }

    async fn pod(&self) -> (agent::AddPod, Vec<OwnedFd>) {
        self.next(|message| match message {
            from_agent::Message::AddPod(add) => Some(add),
            _ => None,
        })
        .await
    }

    async fn sockets(&self, count: u32, kind: SocketKind) -> Vec<OwnedFd> {
        self.say(from_ztunnel::Message::WantSockets(agent::WantSockets {
            uid: UID.to_owned(),
            v6: false,
            count,
            kind: kind.into(),
        }))
        .await;
        let sockets = self.next(|message| match message {
            from_agent::Message::Sockets(sockets) => Some(sockets),
            _ => None,
        });
        sockets.await.1
    }

    async fn declare(&self, to: SocketAddr) -> String {
        self.say(from_ztunnel::Message::Declare(agent::Declare {
            id: 7,
            uid: UID.to_owned(),
            address: octets(to.ip()),
            port: to.port().into(),
        }))
        .await;
        let declared = self.next(|message| match message {
            from_agent::Message::Declared(declared) => Some(declared),
            _ => None,
        });
        declared.await.0.error
    }
}

fn dial(netns: &Netns, to: (IpAddr, u16)) -> io::Result<TcpStream> {
    netns
        .enter(|| TcpStream::connect_timeout(&to.into(), Duration::from_millis(500)))
        .unwrap()
}

fn serve_on(netns: &Netns, to: (IpAddr, u16)) -> TcpListener {
    let listener = netns.enter(|| TcpListener::bind(to)).unwrap().unwrap();
    listener.set_nonblocking(true).unwrap();
    listener
}

#[test]
fn a_pod_starts_captured_and_its_sockets_reach_what_was_declared() {
    on_node(async |lab| {
        let folder = Folder::new();
        let mut agent = Agent::with_pod(folder.path(), lab).await;
        agent.reported(CaptureState::Captured).await;
        let ztunnel = agent.ztunnel().await;
        let (pod, fds) = ztunnel.pod().await;
        assert_eq!(
            pod.pod.as_ref().unwrap().spiffe_id,
            "spiffe://cluster.local/ns/shop/sa/web"
        );
        assert_eq!((pod.listeners.len(), fds.len()), (5, 5));
        let outbound = TcpListener::from(fds.into_iter().next().unwrap());
        let _app = dial(&lab.pod, (FAR_V4, 80)).unwrap();
        assert!(outbound.accept().is_ok(), "captured");
        let server = serve_on(&lab.node, (FAR_V4, 80));
        let sockets = ztunnel.sockets(64, SocketKind::Tcp).await;
        assert_eq!(sockets.len(), 64);
        let mut sockets = sockets.into_iter().map(|fd| {
            let socket = socket2::Socket::from(fd);
            socket.set_nonblocking(false).unwrap();
            socket
        });
        let within = Duration::from_millis(400);
        let to = SocketAddr::from((FAR_V4, 80));
        assert!(
            sockets
                .next()
                .unwrap()
                .connect_timeout(&to.into(), within)
                .is_err()
        );
        assert_eq!(ztunnel.declare(to).await, "");
        assert!(
            sockets
                .next()
                .unwrap()
                .connect_timeout(&to.into(), within)
                .is_ok()
        );
        assert!(server.accept().is_ok());
        assert_eq!(ztunnel.sockets(3, SocketKind::Udp).await.len(), 3);
        assert_eq!(ztunnel.sockets(100_000, SocketKind::Tcp).await.len(), 64);
    });
}

#[test]
fn f05_a_pod_is_held_until_control_has_spoken() {
    on_node(async |lab| {
        let folder = Folder::new();
        let mut agent = Agent::start(folder.path()).await;
        let began = Instant::now();
        let answer = agent.add(lab).await;
        assert_eq!(answer["ok"], false);
        assert!(began.elapsed() >= HOLD, "held, not refused at once");
        agent.control().await;
        let (answer, ()) = tokio::join!(agent.add(lab), agent.enrol(false));
        assert_eq!(answer["ok"], true, "not enrolled: {answer}");
        agent.events.send(Event::ControlLost).await.unwrap();
        let mut other = add(lab);
        other["uid"] = "0d2f7f2e-0002".into();
        let answer = agent.call(other.clone(), Some(&lab.pod)).await;
        assert_eq!(
            answer["ok"], true,
            "its namespace is known to take no part: {answer}"
        );
        other["uid"] = "0d2f7f2e-0003".into();
        other["namespace"] = "unknown".into();
        let answer = agent.call(other, Some(&lab.pod)).await;
        assert_eq!(answer["ok"], false, "nothing is known of its namespace");
    });
}

#[test]
fn f16_enrolment_fails_loudly_when_the_app_has_the_port() {
    on_node(async |lab| {
        let folder = Folder::new();
        let _app = serve_on(&lab.pod, (IpAddr::from([0; 4]), 15001));
        let mut agent = Agent::start(folder.path()).await;
        agent.control().await;
        let (answer, ()) = tokio::join!(agent.add(lab), async {
            tokio::time::sleep(Duration::from_millis(50)).await;
            agent.enrol(true).await;
        });
        assert_eq!(answer["ok"], false);
        assert!(answer["error"].as_str().unwrap().contains("15001"), "{answer}");
        assert!(agent.reported(CaptureState::Broken).await.contains("15001"));
        assert!(
            dial(&lab.pod, (NODE_V4, 80)).is_err(),
            "its traffic is refused meanwhile"
        );
    });
}

#[test]
fn f07_flushed_rules_are_back_within_two_seconds_and_control_hears_of_it() {
    on_node(async |lab| {
        let folder = Folder::new();
        let mut agent = Agent::with_pod(folder.path(), lab).await;
        agent.reported(CaptureState::Captured).await;
        for (netns, name) in [(&lab.pod, "in the pod"), (&lab.node, "on the host")] {
            let began = Instant::now();
            assert!(run(netns, "nft", &["flush ruleset"]).status.success());
            agent.reported(CaptureState::Broken).await;
            agent.reported(CaptureState::Captured).await;
            assert!(began.elapsed() < Duration::from_secs(2), "{name}");
            assert!(ruleset(netns)["nftables"].as_array().unwrap().len() > 5, "{name}");
        }
    });
}

#[test]
fn f08_a_lost_listener_accepts_again_within_two_seconds() {
    on_node(async |lab| {
        let folder = Folder::new();
        let mut agent = Agent::with_pod(folder.path(), lab).await;
        agent.reported(CaptureState::Captured).await;
        let (_, fds) = agent.ztunnel().await.pod().await;
        let outbound = TcpListener::from(fds.into_iter().next().unwrap());
        let hook = socket2::SockRef::from(&outbound).shutdown(std::net::Shutdown::Both);
        hook.unwrap();
        agent.reported(CaptureState::Broken).await;
        agent.reported(CaptureState::Captured).await;
        let _app = dial(&lab.pod, (FAR_V4, 80)).unwrap();
        assert!(outbound.accept().is_ok());
    });
}

#[test]
fn d2_a_restarted_agent_takes_back_what_ztunnel_held() {
    on_node(async |lab| {
        for path in ["mount", "listener"] {
            let folder = Folder::new();
            let mut agent = Agent::with_pod(folder.path(), lab).await;
            agent.reported(CaptureState::Captured).await;
            let (before, fds) = agent.ztunnel().await.pod().await;
            drop(agent);
            if path == "listener" {
                let own = folder.path().join("run/netns").join(UID);
                let _ = nix::mount::umount2(&own, nix::mount::MntFlags::MNT_DETACH);
                let _ = std::fs::remove_file(own);
            }
            let waiting = dial(&lab.pod, (FAR_V4, 80)).expect("connections wait meanwhile");
            let mut agent = Agent::start(folder.path()).await;
            let ztunnel = agent.ztunnel().await;
            let returned = FromZtunnel {
                message: Some(from_ztunnel::Message::ReturnListeners(agent::ReturnListeners {
                    uid: UID.to_owned(),
                    netns_cookie: before.pod.as_ref().unwrap().netns_cookie,
                    listeners: before.listeners.clone(),
                })),
            };
            let copies: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
            ztunnel.0.send(&returned, &copies).await.unwrap();
            let (after, _) = ztunnel.pod().await;
            assert_eq!(after, before, "{path}");
            agent.control().await;
            agent.enrol(true).await;
            agent.reported(CaptureState::Captured).await;
            assert_eq!(ztunnel.sockets(1, SocketKind::Tcp).await.len(), 1);
            let outbound = TcpListener::from(fds.into_iter().next().unwrap());
            assert!(outbound.accept().is_ok());
            drop(waiting);
            let answer = agent
                .call(serde_json::json!({"cmd": "DEL", "uid": UID}), None)
                .await;
            assert_eq!(answer["ok"], true);
        }
    });
}

#[test]
fn t40_another_namespaces_listeners_are_not_taken_back() {
    on_node(async |lab| {
        let folder = Folder::new();
        let mut agent = Agent::with_pod(folder.path(), lab).await;
        agent.reported(CaptureState::Captured).await;
        let (before, fds) = agent.ztunnel().await.pod().await;
        drop((agent, fds));
        // Listeners of the same kinds and ports, of the node's own namespace.
        let foreign = listeners::listen(&lab.node, 7, &[NODE_V4]).unwrap();
        let mut agent = Agent::start(folder.path()).await;
        agent.control().await;
        let ztunnel = agent.ztunnel().await;
        let returned = FromZtunnel {
            message: Some(from_ztunnel::Message::ReturnListeners(agent::ReturnListeners {
                uid: UID.to_owned(),
                netns_cookie: before.pod.as_ref().unwrap().netns_cookie,
                listeners: before.listeners.clone(),
            })),
        };
        let copies: Vec<_> = foreign.iter().map(|kept| kept.socket.as_fd()).collect();
        ztunnel.0.send(&returned, &copies).await.unwrap();
        let (_, fds) = ztunnel.pod().await;
        let cookie = culvert_io::sys::netns_cookie(&fds[0]).unwrap();
        assert_eq!(cookie, lab.pod.cookie().unwrap(), "made anew in the pod");
    });
}

#[test]
fn f09_a_pod_that_leaves_keeps_its_connections_until_they_had_their_time() {
    on_node(async |lab| {
        let folder = Folder::new();
        let mut agent = Agent::with_pod(folder.path(), lab).await;
        agent.reported(CaptureState::Captured).await;
        let ztunnel = agent.ztunnel().await;
        let (_, _fds) = ztunnel.pod().await;
        let server = serve_on(&lab.node, (NODE_V4, 80));
        agent.enrol(false).await;
        agent.reported(CaptureState::Draining).await;
        let _direct = dial(&lab.pod, (NODE_V4, 80)).unwrap();
        assert!(server.accept().is_ok(), "new connections go directly");
        let gone = ztunnel.next(|message| match message {
            from_agent::Message::PodGone(gone) => Some(gone.uid),
            _ => None,
        });
        assert_eq!(gone.await.0, UID);
        agent.reported(CaptureState::NotCaptured).await;
        assert!(ruleset(&lab.pod)["nftables"].as_array().unwrap().len() <= 1);
        drop(_fds);
        agent.enrol(true).await;
        agent.reported(CaptureState::Captured).await;
        assert_eq!(ztunnel.pod().await.1.len(), 5);
    });
}

#[test]
fn f09_what_an_agent_was_taking_out_of_the_mesh_its_successor_takes_out() {
    on_node(async |lab| {
        let folder = Folder::new();
        let mut agent = Agent::with_pod(folder.path(), lab).await;
        agent.reported(CaptureState::Captured).await;
        agent.enrol(false).await;
        agent.reported(CaptureState::Draining).await;
        drop(agent);
        let mut agent = Agent::start(folder.path()).await;
        agent.control().await;
        agent.enrol(false).await;
        agent.reported(CaptureState::Draining).await;
        agent.reported(CaptureState::NotCaptured).await;
        assert!(ruleset(&lab.pod)["nftables"].as_array().unwrap().len() <= 1);
    });
}

#[test]
fn the_older_ztunnel_drains_once_the_younger_is_ready() {
    on_node(async |lab| {
        let folder = Folder::new();
        let agent = Agent::with_pod(folder.path(), lab).await;
        let old = agent.ztunnel().await;
        old.pod().await;
        old.say(from_ztunnel::Message::Ready(agent::Ready {})).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
        let new = agent.ztunnel().await;
        assert_eq!(new.pod().await.1.len(), 5);
        let introduced = |give| {
            move |message| match message {
                from_agent::Message::Introduce(introduce) => {
                    assert_eq!(introduce.give, give);
                    Some(())
                }
                _ => None,
            }
        };
        assert_eq!(old.next(introduced(true)).await.1.len(), 1);
        new.say(from_ztunnel::Message::Ready(agent::Ready {})).await;
        let drain = old.next(|message| matches!(message, from_agent::Message::Drain(_)).then_some(()));
        drain.await;
    });
}

#[test]
fn t57_strangers_and_garbage_are_sent_away_and_the_agent_lives() {
    on_node(async |lab| {
        let folder = Folder::new();
        let agent = Agent::start_for(folder.path(), 4242).await;
        let stranger = Ztunnel::connect(&folder.path().join("ztunnel.sock")).await;
        assert!(
            !matches!(stranger.0.recv::<FromAgent>().await, Ok(Some(_))),
            "not even root is told anything"
        );
        drop(agent);
        let agent = Agent::with_pod(folder.path(), lab).await;
        for garbage in [&b"\xff\xff\xff\xff"[..], &[0x0a, 0x7f], b"{}"] {
            let peer = Channel::connect(&folder.path().join("ztunnel.sock")).unwrap();
            peer.send_bytes(garbage, &[]).await.unwrap();
            let answer = agent.call(serde_json::json!("garbage"), None).await;
            assert_eq!(answer["ok"], false);
            while let Ok(Some(_)) = peer.recv_bytes().await {}
        }
        let old = Channel::connect(&folder.path().join("ztunnel.sock")).unwrap();
        let hello = agent::ZtunnelHello {
            version: VERSION + 1,
            instance: 1,
        };
        let hello = FromZtunnel {
            message: Some(from_ztunnel::Message::Hello(hello)),
        };
        old.send(&hello, &[]).await.unwrap();
        let sent_away = async { while let Ok(Some(_)) = old.recv_bytes().await {} };
        tokio::time::timeout(Duration::from_secs(10), sent_away)
            .await
            .expect("another version is sent away");
        let file = std::fs::File::open("/dev/null").unwrap();
        let ztunnel = agent.ztunnel().await;
        ztunnel.pod().await;
        for _ in 0..500 {
            let flood = FromZtunnel {
                message: Some(from_ztunnel::Message::Alive(agent::Alive {})),
            };
            ztunnel.0.send(&flood, &vec![file.as_fd(); 60]).await.unwrap();
        }
        assert_eq!(ztunnel.sockets(2, SocketKind::Tcp).await.len(), 2);
        assert_eq!(agent.add(lab).await["ok"], true);
    });
}

#[test]
fn f07_only_a_pod_that_ran_outside_of_the_mesh_has_a_grace() {
    on_node(async |lab| {
        let folder = Folder::new();
        let mut agent = Agent::with_pod(folder.path(), lab).await;
        agent.reported(CaptureState::Captured).await;
        let mesh_is_shut = || {
            let listed = run(&lab.node, "nft", &["list", "ruleset"]);
            let listed = String::from_utf8(listed.stdout).unwrap();
            listed.contains("ip daddr 10.77.0.0/24")
        };
        assert!(mesh_is_shut(), "held at its start: nothing can be open");
        drop(agent);
        let mut agent = Agent::start(folder.path()).await;
        agent.control().await;
        agent.enrol(true).await;
        agent.reported(CaptureState::Captured).await;
        assert!(mesh_is_shut(), "nor after the agent's restart");
        agent.enrol(false).await;
        agent.reported(CaptureState::NotCaptured).await;
        agent.enrol(true).await;
        agent.reported(CaptureState::Captured).await;
        assert!(!mesh_is_shut(), "connections from outside go on for a while");
    });
}

#[test]
fn t57_f65_what_is_said_again_or_out_of_place_changes_nothing() {
    on_node(async |lab| {
        let folder = Folder::new();
        let mut agent = Agent::with_pod(folder.path(), lab).await;
        agent.reported(CaptureState::Captured).await;
        let ztunnel = agent.ztunnel().await;
        let (pod, fds) = ztunnel.pod().await;
        let returned = |uid: &str| FromZtunnel {
            message: Some(from_ztunnel::Message::ReturnListeners(agent::ReturnListeners {
                uid: uid.to_owned(),
                netns_cookie: pod.pod.as_ref().unwrap().netns_cookie,
                listeners: pod.listeners.clone(),
            })),
        };
        let foreign = listeners::listen(&lab.node, 7, &[NODE_V4]).unwrap();
        let theirs: Vec<_> = foreign.iter().map(|kept| kept.socket.as_fd()).collect();
        let ours: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
        for _ in 0..50 {
            for fds in [&ours, &theirs] {
                ztunnel.0.send(&returned(UID), fds).await.unwrap();
            }
            let hello = agent::ZtunnelHello {
                version: VERSION,
                instance: 1,
            };
            ztunnel.say(from_ztunnel::Message::Hello(hello)).await;
            ztunnel.say(from_ztunnel::Message::Ready(agent::Ready {})).await;
            for uid in [UID, "0d2f7f2e-9999", "../../etc/passwd", ""] {
                let closed = agent::PodClosed { uid: uid.to_owned() };
                ztunnel.say(from_ztunnel::Message::PodClosed(closed)).await;
            }
        }
        for uid in ["0d2f7f2e-9999", "../../etc/passwd"] {
            ztunnel.0.send(&returned(uid), &ours).await.unwrap();
            let gone = ztunnel.next(|message| match message {
                from_agent::Message::PodGone(gone) => Some(gone.uid),
                _ => None,
            });
            assert_eq!(gone.await.0, uid);
            let wanted = agent::WantSockets {
                uid: uid.to_owned(),
                count: 64,
                ..Default::default()
            };
            ztunnel.say(from_ztunnel::Message::WantSockets(wanted)).await;
            let sockets = ztunnel.next(|message| match message {
                from_agent::Message::Sockets(sockets) => Some(sockets.uid),
                _ => None,
            });
            assert!(sockets.await.1.is_empty(), "{uid}");
        }
        for (uid, address, port) in [
            ("0d2f7f2e-9999", vec![10, 0, 0, 1], 80),
            (UID, vec![10, 0, 0], 80),
            (UID, vec![0; 17], 80),
            (UID, vec![10, 0, 0, 1], 70_000),
        ] {
            ztunnel
                .say(from_ztunnel::Message::Declare(agent::Declare {
                    id: 9,
                    uid: uid.to_owned(),
                    address,
                    port,
                }))
                .await;
            let declared = ztunnel.next(|message| match message {
                from_agent::Message::Declared(declared) => Some(declared.error),
                _ => None,
            });
            assert_ne!(declared.await.0, "", "{uid} {port}");
        }
        assert_eq!(ztunnel.sockets(2, SocketKind::Tcp).await.len(), 2);
        let outbound = TcpListener::from(fds.into_iter().next().unwrap());
        let _app = dial(&lab.pod, (FAR_V4, 80)).unwrap();
        assert!(outbound.accept().is_ok(), "captured as before");
        let (_, fds) = agent.ztunnel().await.pod().await;
        for fd in &fds {
            let cookie = culvert_io::sys::netns_cookie(fd).unwrap();
            assert_eq!(cookie, lab.pod.cookie().unwrap(), "none is another namespace's");
        }
    });
}
