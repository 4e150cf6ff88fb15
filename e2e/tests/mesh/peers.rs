//! HBONE is not ours alone: Envoy, as it is published, speaks it with ztunnel, from either end.

use std::fs;
use std::io::Read;
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpStream};
use std::process::Command;
use std::time::Duration;

use culvert_e2e::hostile::Svid;
use culvert_e2e::lab::{Endpoint, Pod, PodSpec, Process, poll_until};
use culvert_e2e::mesh::MeshNode;
use culvert_e2e::prerequisites;
use culvert_e2e::traffic::{Server, digest_of, echo_once, send_pattern};
use serde_json::{Value, json};

use crate::{Shop, WAIT};

/// Where Envoy takes plain connections that it tunnels.
const ENTRANCE: [u16; 2] = [9004, 9006];

fn id(account: &str) -> String {
    format!("spiffe://cluster.local/ns/shop/sa/{account}")
}

/// A pod that ztunnel has no part in, published as a workload that speaks HBONE itself.
fn stranger(shop: &Shop, node: &MeshNode) -> (Pod, Svid) {
    let pod = node.node().pod(PodSpec::new("shop", "envoy")).unwrap();
    let addresses = pod.addresses().all();
    shop.mesh
        .apply_object(&json!({
            "apiVersion": "culvert.dev/v1alpha1", "kind": "Workload",
            "metadata": { "name": "envoy", "namespace": "shop" },
            "spec": {
                "addresses": addresses, "serviceAccount": "envoy", "node": node.name(), "hbone": true,
            },
        }))
        .unwrap();
    // By its node's token, as a ztunnel gets those of its pods.
    let svid = Svid::issue(&shop.mesh, node, &id("envoy")).unwrap();
    (pod, svid)
}

/// Starts Envoy in `pod` with these listeners and clusters.
fn envoy(pod: &Pod, svid: &Svid, listeners: Value, clusters: Value) -> Process {
    let program = prerequisites::envoy().unwrap();
    let folder = pod.path("/run/envoy");
    fs::create_dir_all(&folder).unwrap();
    let config = json!({
        "node": { "id": "envoy", "cluster": "envoy" },
        "static_resources": { "listeners": listeners, "clusters": clusters },
    });
    for (name, text) in [
        ("config.json", config.to_string()),
        ("chain.pem", svid.chain_pem.clone()),
        ("key.pem", svid.key_pem.clone()),
        ("roots.pem", svid.roots_pem.clone()),
    ] {
        fs::write(folder.join(name), text).unwrap();
    }
    let mut command = Command::new(program);
    command.args([
        "-c",
        "/run/envoy/config.json",
        "--concurrency",
        "1",
        "--disable-hot-restart",
    ]);
    command.args(["--log-level", "warning"]);
    pod.spawn("envoy", command).unwrap()
}

/// TLS 1.3 with the hybrid group, our SVID, and the one peer that is expected.
fn tls(kind: &str, peer: &str) -> Value {
    let file = |name: &str| json!({ "filename": format!("/run/envoy/{name}") });
    let mut context = json!({
        "@type": format!("type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.{kind}"),
        "common_tls_context": {
            "alpn_protocols": ["h2"],
            "tls_params": {
                "tls_minimum_protocol_version": "TLSv1_3",
                "tls_maximum_protocol_version": "TLSv1_3",
                "ecdh_curves": ["X25519MLKEM768"],
            },
            "tls_certificates": [{ "certificate_chain": file("chain.pem"), "private_key": file("key.pem") }],
            "validation_context": {
                "trusted_ca": file("roots.pem"),
                "match_typed_subject_alt_names": [{ "san_type": "URI", "matcher": { "exact": peer } }],
            },
        },
    });
    if kind == "DownstreamTlsContext" {
        context["require_client_certificate"] = true.into();
    }
    json!({ "name": "envoy.transport_sockets.tls", "typed_config": context })
}

fn address(ip: IpAddr, port: u16) -> Value {
    let mut address = json!({ "address": ip, "port_value": port });
    if ip.is_ipv6() && ip.is_unspecified() {
        address["ipv4_compat"] = true.into();
    }
    json!({ "socket_address": address })
}

fn cluster(name: &str, to: SocketAddr) -> Value {
    let endpoint = json!({ "endpoint": { "address": address(to.ip(), to.port()) } });
    json!({
        "name": name, "type": "STATIC", "connect_timeout": "5s",
        "load_assignment": { "cluster_name": name, "endpoints": [{ "lb_endpoints": [endpoint] }] },
    })
}

/// Waits until Envoy listens: from inside its pod.
fn listening(pod: &Pod, process: &Process, port: u16) {
    process
        .poll_until("Envoy listens", WAIT, || {
            Ok(pod.connect((Ipv4Addr::LOCALHOST, port)).is_ok().then_some(()))
        })
        .unwrap();
}

/// Two megabytes there, half closed, and their digest back over the other half.
fn transfer(from: &Endpoint, to: SocketAddr) {
    let socket = from.connect(to).unwrap();
    socket.set_read_timeout(Some(WAIT)).unwrap();
    let sent = send_pattern(&socket, 2 << 20, 9).unwrap();
    let mut arrived = String::new();
    (&socket).read_to_string(&mut arrived).unwrap();
    assert_eq!(arrived, sent, "to {to}");
}

/// Two megabytes back.
fn download(mut socket: TcpStream, want: &str) {
    socket.set_read_timeout(Some(WAIT)).unwrap();
    let mut all = Vec::new();
    socket.read_to_end(&mut all).unwrap();
    assert_eq!(digest_of(&all), want);
}

fn payload() -> Vec<u8> {
    (0..2u32 << 20)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect()
}

/// Servers of the pod at the far end: echo, digest, one that speaks and ends, and one that does so after its
/// client has ended.
fn servers(pod: &Pod) -> Vec<Server> {
    vec![
        Server::echo(pod.listen(8080).unwrap()).unwrap(),
        Server::digest(pod.listen(8081).unwrap()).unwrap(),
        Server::start(pod.listen(8082).unwrap(), |mut socket, _| async move {
            use tokio::io::AsyncWriteExt;
            socket.write_all(&payload()).await?;
            socket.shutdown().await
        })
        .unwrap(),
        Server::start(pod.listen(8083).unwrap(), |mut socket, _| async move {
            use tokio::io::{AsyncReadExt, AsyncWriteExt};
            socket.read_to_end(&mut Vec::new()).await?;
            socket.write_all(&payload()).await?;
            socket.shutdown().await
        })
        .unwrap(),
    ]
}

/// Connections that this node's ztunnel reports from one account's identity to another's.
fn opened(node: &MeshNode, reporter: &str, source: &str, destination: &str) -> f64 {
    let (source, destination) = (id(source), id(destination));
    let labels = [
        ("reporter", reporter),
        ("source_principal", &*source),
        ("destination_principal", &*destination),
    ];
    let metrics = node.metrics().unwrap();
    metrics.sum("istio_tcp_connections_opened_total", &labels)
}

#[test]
fn envoy_as_hbone_client_reaches_a_pod_behind_ztunnel() {
    let shop = Shop::open();
    let (pod, svid) = stranger(&shop, &shop.a);
    let _servers = servers(&shop.cart);
    // A plain listener for each port and family of the destination; each is a CONNECT for its address.
    let (mut listeners, mut clusters, mut entrances) = (Vec::new(), Vec::new(), Vec::new());
    for (family, ip) in shop.cart.addresses().all().into_iter().enumerate() {
        let name = format!("cart-{family}");
        let mut tunnel = cluster(&name, (ip, 15008).into());
        tunnel["transport_socket"] = tls("UpstreamTlsContext", &id("cart"));
        tunnel["typed_extension_protocol_options"] = json!({
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                "explicit_http_config": { "http2_protocol_options": {} },
            },
        });
        clusters.push(tunnel);
        for number in 0..3 {
            let port = ENTRANCE[family] + 10 * number;
            let proxy = json!({
                "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
                "stat_prefix": name, "cluster": name,
                "tunneling_config": {
                    "hostname": SocketAddr::new(ip, 8080 + number).to_string(),
                    "headers_to_add": [{ "header": { "key": "baggage", "value": "k8s.pod.name=envoy" } }],
                },
            });
            listeners.push(json!({
                "name": format!("{name}-{number}"),
                "address": address(Ipv4Addr::LOCALHOST.into(), port),
                "filter_chains": [{ "filters": [{ "name": "envoy.filters.network.tcp_proxy", "typed_config": proxy }] }],
            }));
            entrances.push(SocketAddr::from((Ipv4Addr::LOCALHOST, port)));
        }
    }
    let process = envoy(&pod, &svid, listeners.into(), clusters.into());
    listening(&pod, &process, ENTRANCE[0]);
    let want = digest_of(&payload());
    for to in entrances.chunks(3) {
        let socket = pod.connect(to[0]).unwrap();
        socket.set_read_timeout(Some(WAIT)).unwrap();
        for message in [&b"through ztunnel"[..], b"and again"] {
            echo_once(&socket, message).unwrap_or_else(|e| panic!("{}: {e:#}\n{}", to[0], process.log()));
        }
        transfer(&pod, to[1]);
        // The server ends first, and what it has said arrives.
        download(pod.connect(to[2]).unwrap(), &want);
    }
    // One more was to see whether Envoy listens.
    let by_envoy = opened(&shop.b, "destination", "envoy", "cart");
    assert_eq!(by_envoy, 7.0, "connections by Envoy's identity");
    // A rule for Envoy's account is a rule for what it carries.
    shop.mesh
        .apply(
            "apiVersion: culvert.dev/v1alpha1\nkind: AuthorizationPolicy\n\
             metadata: {name: no-envoy, namespace: shop}\nspec:\n  action: DENY\n  rules:\n  \
             - from: [{source: {serviceAccounts: [envoy]}}]\n",
        )
        .unwrap();
    poll_until("Envoy is refused, and by ztunnel", WAIT, || {
        let socket = pod.connect(entrances[0])?;
        // What Envoy tells its own client of a 401 is its affair.
        socket.set_read_timeout(Some(Duration::from_secs(1)))?;
        let heard = echo_once(&socket, b"refused?").is_ok();
        let metrics = shop.b.metrics()?;
        let refused = metrics.sum("culvert_connections_refused_total", &[("direction", "inbound")]);
        Ok((!heard && refused > 0.0).then_some(()))
    })
    .unwrap();
}

#[test]
fn envoy_as_hbone_server_is_reached_from_a_pod_behind_ztunnel() {
    let shop = Shop::open();
    let (pod, svid) = stranger(&shop, &shop.b);
    let _servers = servers(&pod);
    let mut routes = Vec::new();
    let mut clusters = Vec::new();
    for port in 8080..8084 {
        let name = format!("app-{port}");
        clusters.push(cluster(&name, (Ipv4Addr::LOCALHOST, port).into()));
        let authorities: Vec<String> = pod
            .addresses()
            .all()
            .iter()
            .map(|ip| SocketAddr::new(*ip, port).to_string())
            .collect();
        routes.push(json!({
            "name": name, "domains": authorities,
            "routes": [{
                "match": { "connect_matcher": {} },
                "route": {
                    "cluster": name, "timeout": "0s",
                    "upgrade_configs": [{ "upgrade_type": "CONNECT", "connect_config": {} }],
                },
            }],
        }));
    }
    let seen =
        "%DOWNSTREAM_PEER_URI_SAN% to %REQ(:AUTHORITY)% %RESPONSE_CODE% %REQ(FORWARDED)% %REQ(BAGGAGE)%\n";
    let manager = json!({
        "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "hbone", "codec_type": "HTTP2",
        "http2_protocol_options": { "allow_connect": true },
        "upgrade_configs": [{ "upgrade_type": "CONNECT" }],
        "route_config": { "virtual_hosts": routes },
        "access_log": [{
            "name": "envoy.access_loggers.stdout",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.access_loggers.stream.v3.StdoutAccessLog",
                "log_format": { "text_format_source": { "inline_string": seen } },
            },
        }],
        "http_filters": [{
            "name": "envoy.filters.http.router",
            "typed_config": { "@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router" },
        }],
    });
    let listener = json!({
        "name": "hbone",
        "address": address("::".parse().unwrap(), 15008),
        "filter_chains": [{
            "transport_socket": tls("DownstreamTlsContext", &id("web")),
            "filters": [{ "name": "envoy.filters.network.http_connection_manager", "typed_config": manager }],
        }],
    });
    let process = envoy(&pod, &svid, json!([listener]), clusters.into());
    listening(&pod, &process, 15008);
    let want = digest_of(&payload());
    for ip in pod.addresses().all() {
        let socket = shop.web.connect((ip, 8080)).unwrap();
        socket.set_read_timeout(Some(WAIT)).unwrap();
        for message in [&b"to Envoy"[..], b"and again"] {
            echo_once(&socket, message).unwrap_or_else(|e| panic!("{ip}: {e:#}\n{}", process.log()));
        }
        transfer(&shop.web, (ip, 8081).into());
        // A CONNECT whose server ends first is reset by Envoy: here the client does.
        let asked = shop.web.connect((ip, 8083)).unwrap();
        asked.shutdown(Shutdown::Write).unwrap();
        download(asked, &want);
        drop(socket);
        let line = format!("{} to {} 200", id("web"), SocketAddr::new(ip, 8080));
        process.wait_for_log(&line, WAIT).unwrap();
    }
    let log = process.log();
    assert!(
        log.contains("k8s.namespace.name=shop"),
        "Envoy sees whose connection it is: {log}"
    );
    let to_envoy = opened(&shop.a, "source", "web", "envoy");
    assert_eq!(to_envoy, 6.0, "connections to Envoy's identity");
}
