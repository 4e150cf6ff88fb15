//! What a peer with a valid SVID may ask of a tunnel, and what it may not: the application of a refused
//! request hears nothing, and no packet leaves for what it asked for.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use culvert_e2e::hostile::{Answer, Svid, Tunnel, frames};
use culvert_e2e::lab::{Pod, PodSpec, poll_until};
use culvert_e2e::mesh::config;
use culvert_e2e::traffic::Server;

use crate::{Shop, WAIT};

/// A shop with a pod in it that control takes for a member and that no agent has captured: its packets are
/// its own, and so is its SVID.
pub struct Siege {
    pub hostile: Pod,
    pub svid: Svid,
    pub shop: Shop,
}

impl Siege {
    pub fn lay(shop: Shop) -> Self {
        let hostile = shop.a.node().pod(PodSpec::new("shop", "hostile")).unwrap();
        shop.mesh.apply_object(&config::pod(&hostile)).unwrap();
        let svid = Svid::of(&shop.mesh, &shop.a, &hostile).unwrap();
        Self { hostile, svid, shop }
    }

    /// The tunnel port of `cart`.
    pub fn port(&self) -> SocketAddr {
        (self.shop.cart.addresses().v4, 15008).into()
    }

    pub fn tunnel(&self) -> Tunnel {
        Tunnel::open(&self.hostile, self.port(), &self.svid).unwrap()
    }

    /// What an honest stream asks for.
    pub fn authority(&self) -> String {
        format!("{}:8080", self.shop.cart.addresses().v4)
    }

    /// A tunnel on which a stream is accepted as soon as `cart` knows who calls.
    pub fn admitted(&self) -> Tunnel {
        let authority = self.authority();
        poll_until("the hostile pod is admitted", WAIT, || {
            let mut tunnel = self.tunnel();
            let answer = tunnel.connect(1, &authority);
            Ok((answer == Answer::Status(200)).then_some(tunnel))
        })
        .unwrap()
    }

    /// Lines of the log of `cart`'s ztunnel that hold `text`.
    pub fn logged(&self, text: &str) -> Vec<String> {
        let log = self.shop.b.with_ztunnel(|ztunnel| ztunnel.log()).unwrap();
        log.lines()
            .filter(|line| line.contains(text))
            .map(str::to_owned)
            .collect()
    }
}

/// Connections that a server has accepted, those included that are still in its queue.
fn settled(server: &Server) -> u64 {
    std::thread::sleep(Duration::from_millis(300));
    server.accepted()
}

#[test]
fn t20_f20_a_connect_leads_to_the_pod_it_came_to_and_nowhere_else() {
    let siege = Siege::lay(Shop::open());
    let shop = &siege.shop;
    let cart = shop.cart.addresses();
    // On every address of the pod, loopback included; and where the forbidden authorities lead.
    let own = Server::echo(shop.cart.listen(8080).unwrap()).unwrap();
    let other = shop.mesh.pod(&shop.b, PodSpec::new("shop", "other")).unwrap();
    let elsewhere = [
        Server::echo(other.listen(8080).unwrap()).unwrap(),
        Server::echo(shop.b.node().listen(8080).unwrap()).unwrap(),
        Server::echo(shop.mesh.control_host().listen(8080).unwrap()).unwrap(),
    ];
    drop(siege.admitted());
    // The pod's node knows its services by name once somebody there has called them: from then on they are
    // asked for by name as well, and only they.
    shop.b.wait_published(&other).unwrap();
    poll_until("the service is asked for by its name", WAIT, || {
        let _ = other.connect_within((shop.vip.v4, 80), WAIT);
        let answer = siege.tunnel().connect(1, "cart.shop.svc.cluster.local:80");
        Ok((answer == Answer::Status(200)).then_some(()))
    })
    .unwrap();
    let heard = settled(&own);
    let tap = shop.cart.capture(&[]).unwrap();
    let node = shop.b.node().addresses();
    let control = shop.mesh.control_host().addresses();
    let mut forbidden: Vec<String> = [
        "127.0.0.1:8080",
        "[::1]:8080",
        "[::ffff:127.0.0.1]:8080",
        "127.1:8080",
        "2130706433:8080",
        "0.0.0.0:8080",
        "[::]:8080",
        "169.254.169.254:80",
        "[fe80::1]:8080",
        "[fe80::1%25eth0]:8080",
        "localhost:8080",
        "other.shop.svc.cluster.local:8080",
        "control.culvert-system.svc:15012",
        "kubernetes.default.svc:443",
        "cart.shop.svc.cluster.local:8080",
        "cart.bank.svc.cluster.local:80",
    ]
    .map(str::to_owned)
    .into();
    for addresses in [other.addresses(), node, control, shop.vip] {
        forbidden.push(format!("{}:8080", addresses.v4));
        forbidden.push(format!("[{}]:8080", addresses.v6));
    }
    // The pod's own address in another family than the one the tunnel came by, and in another spelling.
    forbidden.push(format!("[{}]:8080", cart.v6));
    forbidden.push(format!("[::ffff:{}]:8080", cart.v4));
    for port in [
        "0", "65536", "+8080", "08080x", "", "15001", "15006", "15008", "15053",
    ] {
        forbidden.push(format!("{}:{port}", cart.v4));
    }
    forbidden.push(format!("{}", cart.v4));
    forbidden.push(format!("user@{}:8080", cart.v4));
    forbidden.push(format!("user:secret@{}:8080", cart.v4));
    let mut tunnel = siege.tunnel();
    let mut stream = 1;
    for authority in &forbidden {
        if tunnel.is_over() {
            tunnel = siege.tunnel();
            stream = 1;
        }
        let answer = tunnel.connect(stream, authority);
        assert!(answer.is_refusal(), "{authority}: {answer:?}");
        stream += 2;
    }
    let recording = tap.stop().unwrap();
    let hostile = siege.hostile.addresses().all();
    let strays: Vec<String> = recording
        .flows()
        .filter(|flow| !(hostile.contains(&flow.client.ip()) && flow.server.port() == 15008))
        .map(ToString::to_string)
        .collect();
    assert_eq!(strays, Vec::<String>::new(), "connections on the pod's link");
    assert_eq!(own.accepted(), heard, "the pod's own application has heard of it");
    assert_eq!(elsewhere.map(|server| server.accepted()), [0, 0, 0]);
    // The same tunnel carries what it may.
    let mut tunnel = siege.tunnel();
    assert_eq!(tunnel.connect(1, &siege.authority()), Answer::Status(200));
}

#[test]
fn t21_our_own_ports_answer_nobody_with_more_than_they_are_for() {
    let siege = Siege::lay(Shop::open());
    let shop = &siege.shop;
    let _echo = Server::echo(shop.cart.listen(8080).unwrap()).unwrap();
    let outside = shop.mesh.lab().outside("outside").unwrap();
    let ztunnel = shop.b.ztunnel_pod();
    let cart = shop.cart.addresses();
    let loopback: [IpAddr; 2] = ["127.0.0.1".parse().unwrap(), "::1".parse().unwrap()];
    let before = shop.b.metrics().unwrap().sum("culvert_connections_open", &[]);
    let opened = || {
        [&shop.a, &shop.b].map(|node| {
            let page = node.metrics().unwrap();
            page.sum("istio_tcp_connections_opened_total", &[])
        })
    };
    let opened_before = opened();
    for port in [15000, 15001, 15006, 15008, 15020, 15021, 15053] {
        // From the pod itself, by its own address and by localhost; from a member; from outside.
        for (from, ips) in [
            (&*shop.cart, &loopback[..]),
            (&*shop.cart, &cart.all()[..]),
            (&*shop.web, &cart.all()[..]),
            (&*siege.hostile, &cart.all()[..]),
            (&outside, &cart.all()[..]),
        ] {
            for &ip in ips {
                let heard = ask_for_a_page(from, (ip, port).into());
                assert_eq!(heard, b"", "{} hears from {ip} port {port}", from.name());
            }
        }
    }
    // ztunnel's own pod: readiness and metrics are for everybody, configuration for nobody but its loopback.
    for ip in ztunnel.addresses().all() {
        let admin = siege.hostile.connect_within((ip, 15000), Duration::from_secs(2));
        assert!(admin.is_err(), "the admin port is open at {ip}");
        for port in [15020, 15021] {
            for path in [
                "/config_dump",
                "/debug/connections",
                "/",
                "/metrics/../config_dump",
            ] {
                let page = culvert_e2e::mesh::pages::fetch(&siege.hostile, (ip, port).into(), path).unwrap();
                assert_eq!(page.status, 404, "{path} at port {port}");
            }
        }
    }
    // No call of ours has led to another of ours: none was opened, and nothing is open that was not before.
    assert_eq!(opened(), opened_before, "connections to our own ports");
    poll_until("no connection is left", WAIT, || {
        let open = shop.b.metrics()?.sum("culvert_connections_open", &[]);
        Ok((open <= before).then_some(()))
    })
    .unwrap();
    let mut tunnel = siege.admitted();
    assert_eq!(tunnel.connect(3, &siege.authority()), Answer::Status(200));
}

/// What `to` says to an HTTP request.
fn ask_for_a_page(from: &culvert_e2e::lab::Endpoint, to: SocketAddr) -> Vec<u8> {
    let mut heard = Vec::new();
    if let Ok(mut socket) = from.connect_within(to, Duration::from_secs(1)) {
        socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
        let _ = socket.write_all(b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n");
        let _ = socket.read_to_end(&mut heard);
    }
    // A TLS alert names no secret: the tunnel's port says that this is no handshake.
    if heard.first() == Some(&0x15) && heard.len() <= 7 {
        heard.clear();
    }
    heard
}

#[test]
fn t22_nothing_reaches_the_application_before_its_stream_is_accepted() {
    let siege = Siege::lay(Shop::open());
    let shop = &siege.shop;
    let listener = shop.cart.listen(8080).unwrap();
    let silent = shop.cart.listen(9090).unwrap();
    drop(siege.admitted());
    listener.accept().unwrap();
    // Early bytes of an accepted stream arrive after the acceptance, and all of them.
    let mut tunnel = siege.tunnel();
    let mut early = frames::connect(1, &siege.authority());
    early.extend(frames::frame(frames::DATA, 0, 1, b"early"));
    assert_eq!(tunnel.ask(1, &early), Answer::Status(200));
    let (mut application, _) = listener.accept().unwrap();
    let mut heard = [0; 5];
    application.set_read_timeout(Some(WAIT)).unwrap();
    application.read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"early");
    // Those of a refused one never do: nobody has even called.
    silent.set_nonblocking(true).unwrap();
    for authority in ["127.0.0.1:9090", "localhost:9090"] {
        let mut refused = frames::connect(3, authority);
        refused.extend(frames::frame(frames::DATA, 0, 3, b"GET / HTTP/1.1\r\n\r\n"));
        let mut tunnel = siege.tunnel();
        assert!(tunnel.ask(3, &refused).is_refusal(), "{authority}");
    }
    let called = silent.accept().map(drop).unwrap_err();
    assert_eq!(called.kind(), ErrorKind::WouldBlock, "the application was called");
    // A policy's refusal is one, too.
    shop.mesh
        .apply(
            "apiVersion: culvert.dev/v1alpha1\nkind: AuthorizationPolicy\n\
             metadata: {name: deny-hostile, namespace: shop}\nspec:\n  action: DENY\n  rules:\n  - from:\n    \
             - source: {serviceAccounts: [hostile]}\n",
        )
        .unwrap();
    let denied = poll_until("the policy is in force", WAIT, || {
        let mut refused = frames::connect(1, &format!("{}:9090", shop.cart.addresses().v4));
        refused.extend(frames::frame(frames::DATA, 0, 1, b"secret"));
        let answer = siege.tunnel().ask(1, &refused);
        // Until then the stream is accepted, and the application hears it.
        while silent.accept().is_ok() {}
        Ok((answer == Answer::Status(401)).then_some(refused))
    })
    .unwrap();
    for _ in 0..20 {
        assert_eq!(siege.tunnel().ask(1, &denied), Answer::Status(401));
    }
    let called = silent.accept().map(drop).unwrap_err();
    assert_eq!(called.kind(), ErrorKind::WouldBlock, "a denied call arrived");
}

#[test]
fn t23_what_is_no_connect_of_http_2_is_refused() {
    let siege = Siege::lay(Shop::open());
    let shop = &siege.shop;
    let own = Server::echo(shop.cart.listen(8080).unwrap()).unwrap();
    let authority = siege.authority();
    drop(siege.admitted());
    let heard = settled(&own);
    let authority = authority.as_str();
    let connect = [(":method", "CONNECT"), (":authority", authority)];
    let with = |more: &[(&'static str, &'static str)]| {
        let mut fields = connect.to_vec();
        fields.extend(more);
        frames::headers(1, &fields)
    };
    let get = |method| {
        frames::headers(
            1,
            &[
                (":method", method),
                (":scheme", "https"),
                (":authority", authority),
                (":path", "/"),
            ],
        )
    };
    for (case, request) in [
        ("GET", get("GET")),
        ("POST", get("POST")),
        ("connect in lower case", get("connect")),
        (
            "extended CONNECT",
            with(&[(":protocol", "websocket"), (":scheme", "https"), (":path", "/")]),
        ),
        ("a path", with(&[(":scheme", "https"), (":path", "/")])),
        ("a path alone", with(&[(":path", "/")])),
        ("a scheme alone", with(&[(":scheme", "https")])),
        ("no authority", frames::headers(1, &[(":method", "CONNECT")])),
        (
            "a host in place of an authority",
            frames::headers(1, &[(":method", "CONNECT"), ("host", authority)]),
        ),
        ("two authorities", with(&[(":authority", "127.0.0.1:8080")])),
        ("a connection header", with(&[("connection", "keep-alive")])),
        ("a header in upper case", with(&[("Baggage", "x=y")])),
        ("a newline in a header", with(&[("baggage", "x=y\r\nhost: evil")])),
        (
            "a pseudo-header last",
            with(&[("baggage", "x=y"), (":authority", "127.0.0.1:8080")]),
        ),
        ("no method", frames::headers(1, &[(":authority", authority)])),
        ("nothing", frames::headers(1, &[])),
        ("a response", frames::headers(1, &[(":status", "200")])),
        (
            "a push",
            frames::frame(5, frames::END_HEADERS, 1, &[0, 0, 0, 2, 0x82]),
        ),
        ("data of no stream", frames::frame(frames::DATA, 0, 1, b"x")),
        ("an even stream", frames::connect(2, authority)),
        (
            "a CONNECT that has ended already, with a length",
            with(&[("content-length", "5")]),
        ),
    ] {
        let mut tunnel = siege.tunnel();
        let answer = tunnel.ask(1, &request);
        assert!(
            answer.is_refusal() || case.starts_with("a CONNECT"),
            "{case}: {answer:?}"
        );
    }
    // Trailers end a direction and carry nothing.
    let mut tunnel = siege.tunnel();
    assert_eq!(tunnel.connect(1, authority), Answer::Status(200));
    let trailers = frames::block(&[("baggage", "k8s.pod.name=evil")]);
    let flags = frames::END_HEADERS | frames::END_STREAM;
    tunnel
        .write(&frames::frame(frames::HEADERS, flags, 1, &trailers))
        .unwrap();
    assert_eq!(
        tunnel.connect(3, authority),
        Answer::Status(200),
        "the tunnel goes on"
    );
    let accepted = settled(&own) - heard;
    assert!(
        accepted <= 3,
        "{accepted} connections for two CONNECTs and a length"
    );
    // HTTP/1, inside the same TLS.
    for text in [
        format!("CONNECT {authority} HTTP/1.1\r\nhost: {authority}\r\n\r\n"),
        format!("GET / HTTP/1.1\r\nhost: {authority}\r\n\r\n"),
    ] {
        let mut tunnel =
            Tunnel::shake_hands(&siege.hostile, siege.port(), siege.svid.client().unwrap()).unwrap();
        tunnel.write(text.as_bytes()).unwrap();
        assert!(tunnel.end(WAIT).is_refusal(), "{text}");
        assert!(tunnel.answers().is_empty());
    }
    // TLS without ALPN, with another protocol, without a certificate, and of an older version.
    let altered = |change: &dyn Fn(&mut rustls::ClientConfig)| {
        let mut config = siege.svid.client().unwrap();
        change(&mut config);
        refuses_to_talk(&siege, config)
    };
    altered(&|config| config.alpn_protocols.clear());
    altered(&|config| config.alpn_protocols = vec![b"http/1.1".to_vec()]);
    refuses_to_talk(&siege, Svid::anonymous().unwrap());
    assert_eq!(own.accepted() - heard, accepted);
}

fn refuses_to_talk(siege: &Siege, config: rustls::ClientConfig) {
    let Ok(mut tunnel) = Tunnel::shake_hands(&siege.hostile, siege.port(), config) else {
        return;
    };
    let mut opening = frames::PREFACE.to_vec();
    opening.extend(frames::settings(&[]));
    opening.extend(frames::connect(1, &siege.authority()));
    let answer = tunnel.ask(1, &opening);
    assert!(answer.is_refusal(), "{answer:?}");
}

#[test]
fn t24_f22_t29_what_a_peer_says_of_itself_changes_neither_verdict_nor_identity() {
    let siege = Siege::lay(Shop::open());
    let shop = &siege.shop;
    let own = Server::greet(shop.cart.listen(8080).unwrap()).unwrap();
    drop(siege.admitted());
    let authority = siege.authority();
    let forged: Vec<(&str, String)> =
        vec![
        ("forwarded", format!("for=\"{}:4711\"", shop.web.addresses().v4)),
        ("forwarded", format!("for={};by=evil;proto=https", shop.web.addresses().v4)),
        ("forwarded", "for=unknown, for=10.0.0.1;host=\"bank\"".to_owned()),
        ("x-forwarded-for", shop.web.addresses().v4.to_string()),
        ("x-forwarded-network", "elsewhere".to_owned()),
        ("x-forwarded-client-cert", "URI=spiffe://cluster.local/ns/shop/sa/web".to_owned()),
        ("x-istio-source", "web".to_owned()),
        ("culvert-source", "spiffe://cluster.local/ns/shop/sa/web".to_owned()),
        (
            "baggage",
            "k8s.namespace.name=forged-namespace,k8s.deployment.name=forged-workload,service.name=forged,\
             cloud.account.id=forged"
                .to_owned(),
        ),
        ("traceparent", "00-00000000000000000000000000000000-0000000000000000-00".to_owned()),
        ("source-principal", "spiffe://cluster.local/ns/shop/sa/web".to_owned()),
    ];
    let mut fields = vec![(":method", "CONNECT"), (":authority", authority.as_str())];
    fields.extend(forged.iter().map(|(name, value)| (*name, value.as_str())));
    let request = frames::headers(1, &fields);
    let mut tunnel = siege.tunnel();
    assert_eq!(tunnel.ask(1, &request), Answer::Status(200));
    // The application sees who really called.
    tunnel.pump(WAIT, |tunnel| tunnel.data(1).ends_with(b"\r\n"));
    let greeting = format!("220 {}\r\n", siege.hostile.addresses().v4);
    assert_eq!(tunnel.data(1), greeting.as_bytes());
    drop(tunnel);
    // With that caller denied, the same words gain nothing, though `web`, whom they name, is allowed.
    shop.mesh
        .apply(
            "apiVersion: culvert.dev/v1alpha1\nkind: AuthorizationPolicy\n\
             metadata: {name: web-alone, namespace: shop}\nspec:\n  selector: {matchLabels: {app: cart}}\n  \
             rules:\n  - from:\n    - source: {serviceAccounts: [web]}\n",
        )
        .unwrap();
    let heard = poll_until("the policy is in force", WAIT, || {
        let answer = siege.tunnel().ask(1, &request);
        Ok((answer == Answer::Status(401)).then(|| settled(&own)))
    })
    .unwrap();
    for _ in 0..10 {
        assert_eq!(siege.tunnel().ask(1, &request), Answer::Status(401));
    }
    assert_eq!(own.accepted(), heard);
    // A stolen SVID of the allowed caller, from an address that is not its own, is not that caller either.
    let stolen = Svid::of(&shop.mesh, &shop.a, &shop.web).unwrap();
    let stranger = shop.mesh.lab().host("stranger").unwrap();
    for from in [&*siege.hostile, &stranger] {
        let mut tunnel = Tunnel::open(from, siege.port(), &stolen).unwrap();
        let answer = tunnel.ask(1, &request);
        assert_eq!(answer, Answer::Status(401), "from {}", from.name());
    }
    assert_eq!(own.accepted(), heard);
    // The log names the certificate's identity, and nothing of what was said.
    let id = "spiffe://cluster.local/ns/shop/sa/hostile";
    let lines = poll_until("the calls are logged", WAIT, || {
        let lines = siege.logged(id);
        Ok((lines.len() >= 12).then_some(lines))
    })
    .unwrap();
    for line in lines {
        assert!(
            !line.contains("sa/web") && !line.contains("forged") && !line.contains("evil"),
            "{line}"
        );
    }
    let metrics = shop.b.metrics().unwrap();
    for sample in metrics.samples() {
        let forged = sample.labels.iter().any(|(_, value)| value.contains("forged"));
        assert!(!forged, "{sample:?}");
    }
}
