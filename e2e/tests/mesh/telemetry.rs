//! What operators see: records, metrics and pages; and that nobody else sees more than is documented.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::Result;
use culvert_e2e::lab::{Endpoint, PodSpec, poll_until};
use culvert_e2e::load::{Attempts, all_complete};
use culvert_e2e::mesh::{MeshNode, Options, pages};
use culvert_e2e::traffic::{Server, echo_once};
use serde_json::Value;

use crate::{Shop, WAIT, full_length};

/// The access records of a node's ztunnel, which logs JSON; every line must be a record.
fn records(node: &MeshNode) -> Vec<Value> {
    let log = node.with_ztunnel(|ztunnel| ztunnel.log()).unwrap();
    let lines = log.lines().filter(|line| line.contains("\"target\":\"access\""));
    lines
        .map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}")))
        .collect()
}

/// Waits for exactly one record with these fields, and returns it.
fn one_record(node: &MeshNode, fields: &[(&str, &str)]) -> Value {
    let matching = || -> Vec<Value> {
        let all = records(node).into_iter();
        all.filter(|record| fields.iter().all(|(name, value)| record[name] == *value))
            .collect()
    };
    poll_until(&format!("a record {fields:?}"), WAIT, || {
        Ok((!matching().is_empty()).then_some(()))
    })
    .unwrap();
    // One that came too often would come now.
    std::thread::sleep(Duration::from_millis(300));
    let mut found = matching();
    assert_eq!(found.len(), 1, "{fields:?}: {found:#?}");
    found.remove(0)
}

fn call(from: &Endpoint, to: SocketAddr) -> Result<()> {
    let socket = from.connect(to)?;
    socket.set_read_timeout(Some(WAIT))?;
    echo_once(&socket, b"seven b")
}

const DENY: &str = "apiVersion: culvert.dev/v1alpha1\nkind: AuthorizationPolicy\n\
    metadata: {name: no-phone, namespace: shop}\nspec:\n  selector: {matchLabels: {app: cart}}\n  action: DENY\n  \
    rules:\n  - from:\n    - source: {serviceAccounts: [phone]}\n";

const NO_BANK: &str = "apiVersion: culvert.dev/v1alpha1\nkind: AuthorizationPolicy\n\
    metadata: {name: no-bank, namespace: shop}\nspec:\n  direction: Outbound\n  action: DENY\n  \
    rules:\n  - to:\n    - operation: {namespaces: [bank]}\n";

fn identity(namespace: &str, account: &str) -> String {
    format!("spiffe://cluster.local/ns/{namespace}/sa/{account}")
}

#[test]
fn o4_every_connection_and_every_refusal_leaves_its_record_at_both_ends() {
    let shop = Shop::open_with(Options {
        ztunnel_args: ["--log-format", "json"].map(str::to_owned).to_vec(),
        log: "info,access=debug",
        ..Options::default()
    });
    let phone = shop
        .mesh
        .pod(&shop.a, PodSpec::new("shop", "phone").service_account("phone"))
        .unwrap();
    shop.mesh.namespace("bank").unwrap();
    let vault = shop.mesh.pod(&shop.b, PodSpec::new("bank", "vault")).unwrap();
    shop.a.wait_published(&phone).unwrap();
    shop.b.wait_published(&vault).unwrap();
    let _echo = Server::echo(shop.cart.listen(8080).unwrap()).unwrap();
    let to = SocketAddr::from((shop.vip.v4, 80));
    poll_until("calls pass", WAIT, || call(&shop.web, to).map(Some)).unwrap();
    call(&shop.web, to).unwrap();

    // The last call, from both ends: one trace, the same people.
    let last = |node: &MeshNode, message: &str| {
        let mut all = records(node).into_iter();
        all.rfind(|record| record["message"] == message)
    };
    let completed = poll_until("both ends have closed", WAIT, || {
        let ends = last(&shop.a, "connection complete").zip(last(&shop.b, "connection complete"));
        Ok(ends.filter(|(source, destination)| source["trace_id"] == destination["trace_id"]))
    });
    let (at_source, at_destination) = completed.unwrap();
    let trace = at_source["trace_id"].as_str().unwrap().to_owned();
    assert_eq!(trace.len(), 32);
    for (node, record, direction, addr) in [
        (
            &shop.a,
            &at_source,
            "outbound",
            format!("{}:15008", shop.cart.addresses().v4),
        ),
        (
            &shop.b,
            &at_destination,
            "inbound",
            format!("{}:15008", shop.cart.addresses().v4),
        ),
    ] {
        let cart = format!("{}:8080", shop.cart.addresses().v4);
        let web = identity("shop", &shop.web.spec().service_account);
        let served = identity("shop", &shop.cart.spec().service_account);
        for (name, want) in [
            ("level", "INFO"),
            ("src.workload", "web"),
            ("src.namespace", "shop"),
            ("src.identity", &*web),
            ("dst.addr", &*addr),
            ("dst.hbone_addr", &*cart),
            ("dst.service", "cart.shop.svc.cluster.local"),
            ("dst.workload", "cart"),
            ("dst.namespace", "shop"),
            ("dst.identity", &*served),
            ("direction", direction),
            ("trace_id", &*trace),
        ] {
            assert_eq!(record[name], want, "{name} of {record:#}");
        }
        // Both see seven bytes go and come, whichever end they look from.
        assert_eq!(
            (&record["bytes_sent"], &record["bytes_recv"]),
            (&7.into(), &7.into())
        );
        assert!(record["duration"].as_str().unwrap().ends_with("ms"), "{record:#}");
        assert!(
            record["src.addr"]
                .as_str()
                .unwrap()
                .starts_with(&format!("{}:", shop.web.addresses().v4))
        );
        assert!(
            record.get("error").is_none() && record.get("reason").is_none(),
            "{record:#}"
        );
        let opened = records(node)
            .into_iter()
            .filter(|one| one["trace_id"] == *trace && one["message"] == "connection opened")
            .count();
        assert_eq!(opened, 1);
    }

    // Refused at the destination: there with the rule's name, at the source as what the peer said.
    shop.mesh.apply(DENY).unwrap();
    let denied = [("message", "connection failed"), ("reason", "denied")];
    let refused_by_peer = [("message", "connection failed"), ("reason", "refused_by_peer")];
    poll_until("the rule is in force", WAIT, || {
        let _ = call(&phone, to);
        // Its record comes before the next attempt does.
        std::thread::sleep(Duration::from_millis(300));
        Ok(records(&shop.b)
            .iter()
            // One that was open when the rule came was cut, which is another record.
            .any(|record| record["reason"] == "denied" && record["message"] == "connection failed")
            .then_some(()))
    })
    .unwrap();
    let there = one_record(&shop.b, &denied);
    let here = one_record(&shop.a, &refused_by_peer);
    for record in [&there, &here] {
        assert_eq!(record["level"], "WARN");
        assert_eq!(record["src.identity"], identity("shop", "phone"));
        assert_eq!(
            record["dst.identity"],
            identity("shop", &shop.cart.spec().service_account)
        );
        assert_eq!(record["dst.workload"], "cart");
        assert_eq!(record["trace_id"], there["trace_id"]);
    }
    assert_eq!(there["policy"], "shop/no-phone", "{there:#}");

    // Refused by the source's own rule: there alone, and who it would have been.
    shop.mesh.apply(NO_BANK).unwrap();
    let to_vault = SocketAddr::from((vault.addresses().v4, 8080));
    poll_until("the source's rule is in force", WAIT, || {
        let _ = call(&shop.web, to_vault);
        std::thread::sleep(Duration::from_millis(300));
        let at_source =
            |record: &Value| record["policy"] == "shop/no-bank" && record["message"] == "connection failed";
        Ok(records(&shop.a).iter().any(at_source).then_some(()))
    })
    .unwrap();
    let own_rule = [("message", "connection failed"), ("policy", "shop/no-bank")];
    let record = one_record(&shop.a, &own_rule);
    for (name, want) in [
        ("reason", "denied"),
        ("direction", "outbound"),
        (
            "src.identity",
            &*identity("shop", &shop.web.spec().service_account),
        ),
        ("dst.identity", &*identity("bank", &vault.spec().service_account)),
        ("dst.namespace", "bank"),
    ] {
        assert_eq!(record[name], want, "{name} of {record:#}");
    }

    // Plaintext from outside: one record, nobody's identity, the default's name.
    let stranger = shop.mesh.lab().host("stranger").unwrap();
    let plain = SocketAddr::from((shop.cart.addresses().v4, 8080));
    let _ = call(&stranger, plain);
    let source = format!("{}:", stranger.addresses().v4);
    let refused = |record: &Value| {
        record["message"] == "connection failed"
            && record["src.addr"]
                .as_str()
                .is_some_and(|addr| addr.starts_with(&source))
    };
    poll_until("the stranger's record", WAIT, || {
        Ok(records(&shop.b).iter().any(refused).then_some(()))
    })
    .unwrap();
    let record = records(&shop.b).into_iter().find(refused).unwrap();
    assert_eq!(record["src.identity"], "unknown", "{record:#}");
    assert_eq!(
        record["dst.identity"],
        identity("shop", &shop.cart.spec().service_account)
    );
    assert!(
        record["policy"].as_str().is_some_and(|policy| !policy.is_empty()),
        "{record:#}"
    );
}

#[test]
fn f46_a_cut_says_which_rule_cut_it() {
    let shop = Shop::open_with(Options {
        ztunnel_args: ["--log-format", "json"].map(str::to_owned).to_vec(),
        ..Options::default()
    });
    let _echo = Server::echo(shop.cart.listen(8080).unwrap()).unwrap();
    let socket = shop.web.connect((shop.vip.v4, 80)).unwrap();
    socket.set_read_timeout(Some(WAIT)).unwrap();
    echo_once(&socket, b"seven b").unwrap();
    let rule = DENY.replace("[phone]", &format!("[{}]", shop.web.spec().service_account));
    shop.mesh.apply(&rule).unwrap();
    assert!((&socket).read(&mut [0; 8]).is_err(), "the connection is reset");
    let record = one_record(&shop.b, &[("message", "connection cut")]);
    for (name, want) in [
        ("reason", "denied"),
        ("policy", "shop/no-phone"),
        ("level", "WARN"),
    ] {
        assert_eq!(record[name], want, "{record:#}");
    }
    poll_until("its metrics", WAIT, || {
        let metrics = shop.b.metrics()?;
        let cut = metrics.sum("culvert_connections_cut_total", &[("direction", "inbound")]);
        let closed = metrics.sum(
            "istio_tcp_connections_closed_total",
            &[("response_flags", "DENY")],
        );
        let effect = metrics.sum("culvert_time_to_effect_seconds_count", &[]);
        Ok((cut == 1.0 && closed == 1.0 && effect >= 1.0).then_some(()))
    })
    .unwrap();
}

#[test]
fn metrics_say_what_has_happened() {
    let shop = Shop::open();
    let _echo = Server::echo(shop.cart.listen(8080).unwrap()).unwrap();
    let to = SocketAddr::from((shop.vip.v4, 80));
    let kept = shop.web.connect(to).unwrap();
    kept.set_read_timeout(Some(WAIT)).unwrap();
    echo_once(&kept, b"seven b").unwrap();
    for _ in 0..4 {
        call(&shop.web, to).unwrap();
    }
    let (web, cart) = (
        identity("shop", &shop.web.spec().service_account),
        identity("shop", &shop.cart.spec().service_account),
    );
    for (node, reporter) in [(&shop.a, "source"), (&shop.b, "destination")] {
        let labels = [
            ("reporter", reporter),
            ("source_workload", "web"),
            ("source_workload_namespace", "shop"),
            ("source_principal", &*web),
            ("source_canonical_service", "web"),
            ("source_app", "web"),
            ("destination_workload", "cart"),
            ("destination_workload_namespace", "shop"),
            ("destination_principal", &*cart),
            ("destination_canonical_service", "cart"),
            ("destination_service", "cart.shop.svc.cluster.local"),
            ("destination_service_name", "cart"),
            ("destination_service_namespace", "shop"),
            ("request_protocol", "tcp"),
            ("connection_security_policy", "mutual_tls"),
            ("response_flags", "-"),
        ];
        let metrics = poll_until("the counters", WAIT, || {
            let metrics = node.metrics()?;
            let value = |name| metrics.sum(name, &labels);
            // The kept connection's bytes count while it is open.
            let there = value("istio_tcp_connections_opened_total") == 5.0
                && value("istio_tcp_connections_closed_total") == 4.0
                && value("istio_tcp_received_bytes_total") == 35.0
                && value("istio_tcp_sent_bytes_total") == 35.0
                && metrics.sum("istio_tcp_sockets_open", &[("reporter", reporter)]) == 1.0;
            Ok(there.then_some(metrics))
        })
        .unwrap_or_else(|e| panic!("{e:#}: {:#?}", node.metrics().unwrap()));
        let first = metrics
            .series("istio_tcp_connections_opened_total", &labels)
            .next()
            .unwrap();
        assert_eq!(first.labels.len(), 27, "{:?}", first.labels);
        let value = |name, labels: &[(&str, &str)]| metrics.sum(name, labels);
        let direction = if reporter == "source" {
            "outbound"
        } else {
            "inbound"
        };
        assert_eq!(value("istio_tcp_sockets_open", &[("reporter", reporter)]), 1.0);
        assert_eq!(
            value("culvert_connections_open", &[("direction", direction)]),
            1.0
        );
        assert!(value("culvert_tunnels_open", &[("direction", direction)]) >= 1.0);
        assert!(
            value(
                "culvert_handshake_duration_seconds_count",
                &[("direction", direction)]
            ) >= 1.0
        );
        let allowed = [("direction", direction), ("verdict", "allow")];
        assert_eq!(value("culvert_policy_decisions_total", &allowed), 5.0);
        assert_eq!(value("culvert_control_connected", &[]), 1.0);
        assert_eq!(value("culvert_config_age_seconds", &[]), 0.0);
        let now = std::time::UNIX_EPOCH.elapsed().unwrap().as_secs_f64();
        let first = value("culvert_svid_first_expiry_timestamp_seconds", &[]);
        assert!(first > now + 60.0 && first < now + 7200.0, "{first}");
        assert!(value("culvert_svid_requests_total", &[("outcome", "issued")]) >= 1.0);
        assert!(value("istio_xds_message_total", &[]) >= 4.0);
        assert!(value("istio_xds_message_bytes_total", &[]) > 0.0);
        assert_eq!(value("istio_build", &[("component", "ztunnel")]), 1.0);
        assert!(value("process_open_fds", &[]) > 10.0);
        assert!(value("process_resident_memory_bytes", &[]) > 1e6);
        assert_eq!(value("culvert_quota_used", &[("quota", "connections")]), 1.0);
    }
    let metrics = shop.a.metrics().unwrap();
    let checkouts = |outcome| metrics.sum("culvert_pool_checkouts_total", &[("outcome", outcome)]);
    assert!(checkouts("dialled") >= 1.0 && checkouts("reused") >= 1.0);
    let delivered = shop.b.metrics().unwrap();
    assert_eq!(
        delivered.sum("culvert_application_connect_duration_seconds_count", &[]),
        5.0
    );

    // The agent has no port: what it counts goes out here.
    poll_until("the agent's counters", WAIT, || {
        let metrics = shop.a.metrics()?;
        let captured = metrics.sum("culvert_agent_pods", &[("state", "captured")]);
        let there = captured == 1.0
            && metrics.sum("culvert_agent_pods", &[("state", "broken")]) == 0.0
            && metrics.sum("culvert_agent_verifications_total", &[]) >= 1.0
            && metrics.sum("culvert_agent_cpu_seconds_total", &[]) > 0.0
            && metrics.sum("culvert_agent_report_age_seconds", &[]) < 10.0;
        Ok(there.then_some(()))
    })
    .unwrap();

    let control = shop.mesh.control_metrics().unwrap();
    let value = |name, labels: &[(&str, &str)]| control.sum(name, labels);
    assert_eq!(value("culvert_control_streams", &[("service", "discovery")]), 2.0);
    assert_eq!(value("culvert_control_streams", &[("service", "orders")]), 2.0);
    assert!(value("culvert_control_certificates_total", &[("verdict", "issued")]) >= 2.0);
    assert!(value("culvert_control_resources_total", &[("change", "sent")]) >= 4.0);
    assert!(value("culvert_control_push_duration_seconds_count", &[]) >= 1.0);
    assert!(value("culvert_control_reloads_total", &[("result", "applied")]) >= 1.0);
    assert_eq!(value("culvert_config_mistakes", &[]), 0.0);

    // Control away: what is in use grows old, and says so.
    shop.mesh.kill_control().unwrap();
    poll_until("the age of the configuration", WAIT, || {
        let metrics = shop.a.metrics()?;
        let old = metrics.sum("culvert_config_age_seconds", &[]) > 0.0;
        let apart = metrics.sum("culvert_control_connected", &[]) == 0.0;
        let ended = metrics.sum("istio_xds_connection_terminations_total", &[]) >= 1.0;
        Ok((old && apart && ended).then_some(()))
    })
    .unwrap();
    drop(kept);
}

#[test]
fn f38_a_log_that_nobody_reads_holds_up_nothing() {
    let shop = Shop::open();
    let _echo = Server::echo(shop.cart.listen(8080).unwrap()).unwrap();
    let to = SocketAddr::from((shop.vip.v4, 80));
    for node in [&shop.a, &shop.b] {
        node.kill_ztunnel().unwrap();
        node.start_ztunnel_unread().unwrap();
        node.wait_ready().unwrap();
        // So much is said that queue and pipe are full soon.
        let set = node.admin_call("POST", "/logging?level=trace").unwrap();
        assert_eq!(set.status, 200, "{}", set.body);
    }
    let attempts = Attempts::start(&shop.web, to, 50, WAIT).unwrap();
    for node in [&shop.a, &shop.b] {
        poll_until("lines are dropped and counted", Duration::from_secs(60), || {
            let dropped = node.metrics()?.sum("culvert_log_lines_dropped_total", &[]);
            Ok((dropped > 0.0).then_some(()))
        })
        .unwrap();
    }
    let before = attempts.started();
    poll_until("more attempts", WAIT, || {
        Ok((attempts.started() > before + 150).then_some(()))
    })
    .unwrap();
    all_complete(&attempts.stop().unwrap()).unwrap();
}

#[test]
fn t58_admin_is_on_loopback_and_every_change_is_audited() {
    let shop = Shop::open();
    let node = &shop.a;
    let dump: Value = serde_json::from_str(&node.admin("/config_dump").unwrap().body).unwrap();
    for key in [
        "workloads",
        "services",
        "policies",
        "stagedServices",
        "staticConfig",
        "version",
        "config",
        "certificates",
        "workloadState",
    ] {
        assert!(dump.get(key).is_some(), "{key} in {dump:#}");
    }
    let certificate = &dump["certificates"][0];
    assert_eq!(certificate["state"], "Available", "{certificate:#}");
    for key in ["pem", "serialNumber", "validFrom", "expirationTime"] {
        assert!(
            certificate["certChain"][0][key].is_string(),
            "{key} in {certificate:#}"
        );
    }
    // What peers are verified against, as the chain is: "-----BEGIN CERTIFICATE-----" in base64.
    let root = certificate["rootCerts"][0]["pem"].as_str().unwrap();
    assert!(
        root.starts_with("LS0tLS1CRUdJTiBDRVJUSUZJQ0FURS0tLS0t"),
        "{certificate:#}"
    );
    let state = dump["workloadState"]
        .as_object()
        .unwrap()
        .values()
        .next()
        .unwrap();
    assert_eq!(state["info"]["name"], "web", "{state:#}");
    let text = dump.to_string();
    for secret in ["PRIVATE KEY", "token-of-node"] {
        assert!(!text.contains(secret), "{secret}");
    }

    assert_eq!(node.admin("/logging").unwrap().body, "info\n");
    for (method, path, status) in [
        ("POST", "/logging?level=info%2Caccess%3Ddebug", 200),
        ("POST", "/logging?level=no-such%3Dlevel", 400),
        ("POST", "/logging", 400),
        ("PUT", "/logging?level=off", 405),
        ("POST", "/config_dump", 405),
        ("POST", "/quitquitquit", 405),
        ("DELETE", "/", 405),
        ("GET", "/quitquitquit", 404),
        ("GET", "/debug/pprof/heap", 404),
        ("GET", "/metrics", 404),
    ] {
        let page = node.admin_call(method, path).unwrap();
        assert_eq!(page.status, status, "{method} {path}: {}", page.body);
    }
    assert_eq!(node.admin("/logging").unwrap().body, "info,access=debug\n");
    let _echo = Server::echo(shop.cart.listen(8080).unwrap()).unwrap();
    call(&shop.web, (shop.vip.v4, 80).into()).unwrap();
    node.with_ztunnel(|ztunnel| ztunnel.wait_for_log("connection opened", WAIT))
        .unwrap()
        .unwrap();
    assert_eq!(node.admin_call("POST", "/logging?reset").unwrap().body, "info\n");
    poll_until("the audit", WAIT, || {
        let log = node.with_ztunnel(|ztunnel| ztunnel.log())?;
        let audited: Vec<&str> = log
            .lines()
            .filter(|line| line.contains(" audit: admin call"))
            .collect();
        Ok((audited.len() == 3).then_some(()))
    })
    .unwrap();
    // Not from outside of the pod's own loopback, whatever the address.
    for ip in node.ztunnel_pod().addresses().all() {
        for from in [node.node(), shop.b.node()] {
            assert!(
                from.connect_within((ip, 15000), Duration::from_secs(2)).is_err(),
                "{ip}"
            );
        }
    }
}

/// What a port may answer, path by path; every other path is 404.
fn documented(port: u16) -> Option<&'static [(&'static str, u16)]> {
    match port {
        15014 => Some(&[("/metrics", 200), ("/healthz/ready", 200)]),
        15020 => Some(&[("/metrics", 200), ("/stats/prometheus", 200)]),
        15021 => Some(&[("/healthz/ready", 200)]),
        _ => None,
    }
}

const PATHS: [&str; 11] = [
    "/",
    "/metrics",
    "/stats/prometheus",
    "/healthz/ready",
    "/config_dump",
    "/debug/connections",
    "/logging",
    "/logging?level=trace",
    "/quitquitquit",
    "/debug/pprof/profile",
    "/debug/pprof/heap",
];

/// The ports of `ip` that take a connection from `from`.
fn open_ports(from: &Endpoint, ip: IpAddr, ports: &[u16]) -> BTreeSet<u16> {
    from.inside(|| {
        let open = ports.iter().copied().filter(|port| {
            let connected = TcpStream::connect_timeout(&(ip, *port).into(), Duration::from_millis(250));
            connected.is_ok_and(|socket| {
                // Without this a scan leaves a thousand ports in TIME_WAIT.
                let _ = socket2::SockRef::from(&socket).set_linger(Some(Duration::ZERO));
                true
            })
        });
        open.collect()
    })
    .unwrap()
}

fn answers_as_documented(from: &Endpoint, ip: IpAddr, port: u16) {
    let Some(table) = documented(port) else {
        panic!(
            "port {port} of {ip} is open to {} and not documented",
            from.name()
        );
    };
    for path in PATHS {
        for method in ["GET", "POST"] {
            let page = pages::request(from, (ip, port).into(), method, path).unwrap();
            let want = match method {
                "GET" => table
                    .iter()
                    .find(|(known, _)| *known == path)
                    .map_or(404, |(_, status)| *status),
                _ => 405,
            };
            // Control answers every method but GET with 404: it is documented as having pages alone.
            let refused = page.status == want || (method == "POST" && page.status == 404);
            assert!(
                refused,
                "{method} {ip}:{port}{path} from {}: {}",
                from.name(),
                page.status
            );
            for secret in ["BEGIN ", "token", "notPrincipals", "\"rules\""] {
                assert!(!page.body.contains(secret), "{secret} in {ip}:{port}{path}");
            }
        }
    }
}

#[test]
fn f66_ports_answer_what_is_documented_and_nothing_else_is_open() {
    let shop = Shop::open();
    let outsider = shop.mesh.lab().outside("outsider").unwrap();
    let stranger = shop.mesh.lab().host("stranger").unwrap();
    let ports: Vec<u16> = if full_length() {
        (1..=u16::MAX).collect()
    } else {
        (1..=1024)
            .chain(8000..=8100)
            .chain(14900..=15200)
            .chain([16000, 16020, 16021])
            .collect()
    };
    let control: BTreeSet<u16> = [15012, 15014].into();
    let proxy: BTreeSet<u16> = [15020, 15021].into();
    let none = BTreeSet::new();
    let targets: BTreeMap<&str, (&Endpoint, &BTreeSet<u16>)> = [
        ("control", (shop.mesh.control_host(), &control)),
        ("node a", (shop.a.node() as &Endpoint, &none)),
        ("node b", (shop.b.node(), &none)),
        ("ztunnel of a", (shop.a.ztunnel_pod(), &proxy)),
        ("ztunnel of b", (shop.b.ztunnel_pod(), &proxy)),
    ]
    .into();
    let viewers: [&Endpoint; 4] = [shop.a.node(), shop.b.ztunnel_pod(), &stranger, &outsider];
    for (name, (target, want)) in &targets {
        for from in viewers {
            for ip in target.addresses().all() {
                let open = open_ports(from, ip, &ports);
                // Its own loopback may have more than others see; a viewer is not asked about itself.
                if from.name() == target.name() {
                    continue;
                }
                assert!(
                    open.is_subset(want),
                    "{name} at {ip} from {}: {open:?}",
                    from.name()
                );
                for port in open.into_iter().filter(|port| *port != 15012) {
                    answers_as_documented(from, ip, port);
                }
            }
        }
    }
    // Someone does see them: the scan is not blind.
    let seen = open_ports(
        &stranger,
        shop.a.ztunnel_pod().addresses().v4.into(),
        &[15020, 15021],
    );
    assert_eq!(seen, proxy);
    // Control's own port speaks TLS, and to nobody without a token.
    let plain = pages::request(
        &stranger,
        (shop.mesh.control_host().addresses().v4, 15012).into(),
        "GET",
        "/",
    );
    assert!(plain.is_err(), "{plain:?}");
}

#[test]
fn t21_nothing_of_ours_answers_inside_an_application_pod() {
    let shop = Shop::open();
    let own = |from: &Endpoint, port: u16| -> Vec<SocketAddr> {
        let loopback: [IpAddr; 2] = [[127, 0, 0, 1].into(), std::net::Ipv6Addr::LOCALHOST.into()];
        let all = loopback.into_iter().chain(from.addresses().all());
        all.map(|ip| (ip, port).into()).collect()
    };
    for pod in [&shop.web, &shop.cart] {
        for port in [
            15000, 15001, 15006, 15008, 15012, 15014, 15020, 15021, 15053, 15054,
        ] {
            for to in own(pod, port) {
                let heard = pod
                    .inside(|| -> Vec<u8> {
                        let Ok(mut socket) = TcpStream::connect_timeout(&to, Duration::from_secs(2)) else {
                            return Vec::new();
                        };
                        socket.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
                        let _ = socket.write_all(b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n");
                        let mut heard = Vec::new();
                        let _ = socket.read_to_end(&mut heard);
                        heard
                    })
                    .unwrap();
                // TLS may say that it does not understand; no page and no application byte comes.
                let is_alert = heard.first() == Some(&0x15) && heard.len() <= 7;
                assert!(
                    heard.is_empty() || is_alert,
                    "{to} in {}: {:?}",
                    pod.name(),
                    String::from_utf8_lossy(&heard)
                );
            }
        }
    }
    // And the proxy goes on.
    let _echo = Server::echo(shop.cart.listen(8080).unwrap()).unwrap();
    call(&shop.web, (shop.vip.v4, 80).into()).unwrap();
}

#[test]
fn s0_4_exposure_is_what_the_kernel_says_it_is() {
    let shop = Shop::open();
    let node = &shop.a;
    let exposure = |of: &str| node.metrics().unwrap().sum("culvert_exposure", &[("of", of)]);
    let pid = node.with_ztunnel(|ztunnel| ztunnel.pid()).unwrap();
    let held: BTreeSet<String> = fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .filter_map(|fd| fs::read_link(fd.unwrap().path()).ok())
        .filter_map(|link| {
            let name = link.to_string_lossy().into_owned();
            Some(name.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned())
        })
        .collect();
    // Listening TCP sockets (state 0A) and bound UDP ones (07), in its own pod and in those it serves.
    let mut listening = BTreeSet::new();
    for place in [node.ztunnel_pod() as &Endpoint, &shop.web] {
        let tables = place
            .inside(|| {
                let read = |name: &str| fs::read_to_string(format!("/proc/thread-self/net/{name}")).unwrap();
                [("tcp", "0A"), ("tcp6", "0A"), ("udp", "07"), ("udp6", "07")]
                    .map(|(name, state)| (read(name), state))
            })
            .unwrap();
        for (table, state) in tables {
            for line in table.lines().skip(1) {
                let fields: Vec<&str> = line.split_whitespace().collect();
                if fields[3] == state && !fields[1].ends_with(":0000") {
                    listening.insert(fields[9].to_owned());
                }
            }
        }
    }
    let ports = listening.intersection(&held).count();
    assert!(ports >= 6, "{ports} in {listening:?}");
    assert_eq!(exposure("ports"), ports as f64);
    assert_eq!((exposure("identities"), exposure("tenants")), (1.0, 1.0));
    // Tunnels to one peer are one peer, however many they are.
    assert_eq!(exposure("peers"), 0.0);
    let _echo = Server::echo(shop.cart.listen(8080).unwrap()).unwrap();
    for _ in 0..3 {
        let socket = shop.web.connect((shop.vip.v4, 80)).unwrap();
        echo_once(&socket, b"hello").unwrap();
    }
    assert_eq!(exposure("peers"), 1.0);
}
