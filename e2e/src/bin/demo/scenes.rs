//! The scenes. Each does something to the mesh, looks at what came of it, and judges.
//!
//! Invariant: a scene leaves the stage as it found it.

use std::io::{ErrorKind, Read};
use std::net::SocketAddr;
use std::process::{Command, Output};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use culvert_e2e::lab::capture::tls::{TLS13, X25519MLKEM768};
use culvert_e2e::lab::{Pod, poll_until};
use culvert_e2e::load::{Attempts, Failure, all_complete, percentile};
use culvert_e2e::traffic::echo_once;

use crate::measure::{self, Times};
use crate::stage::{CANARY, ECHO_PORT, HTTP_PORT, SINK_PORT, Stage};
use crate::{Row, row};

const WAIT: Duration = Duration::from_secs(15);

fn curl(from: &Pod, to: SocketAddr) -> Result<Output> {
    let mut command = Command::new("curl");
    command.args(["-sS", "--fail", "--max-time", "10", &format!("http://{to}/page")]);
    from.run_within(command, WAIT)
}

fn fetch(from: &Pod, to: SocketAddr) -> Result<()> {
    let output = curl(from, to)?;
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    ensure!(output.status.success(), "curl in {} to {to}: {said}", from.name());
    ensure!(
        output.stdout.starts_with(CANARY.as_bytes()),
        "curl got another page"
    );
    Ok(())
}

/// The shop's web page, by the service's and by the pod's address, over both families.
fn pages(stage: &Stage) -> Vec<SocketAddr> {
    let services = stage.cart_vip.all().map(|ip| SocketAddr::new(ip, 80));
    let pods = stage
        .cart
        .addresses()
        .all()
        .map(|ip| SocketAddr::new(ip, HTTP_PORT));
    [services, pods].concat()
}

pub fn captured(stage: &Stage) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for node in [&stage.a, &stage.b] {
        let pods = poll_until("ztunnel has its pods", WAIT, || {
            let pods = node.metrics()?.sum("culvert_pods", &[]);
            Ok((pods > 0.0).then_some(pods))
        })?;
        let ztunnel = |field: &str| node.with_ztunnel(|ztunnel| ztunnel.status_field(field))?;
        let (uid, effective) = (ztunnel("Uid")?, ztunnel("CapEff")?);
        ensure!(
            u64::from_str_radix(&effective, 16)? == 0,
            "ztunnel has capabilities: {effective}"
        );
        let uid = uid.split_whitespace().next().unwrap_or_default().to_owned();
        rows.push(row(
            format!("node {}", node.name()),
            format!("pods captured: {pods}; ztunnel is uid {uid} with no capability"),
        ));
    }
    for pod in [&stage.web, &stage.cart, &stage.teller, &stage.near, &stage.far] {
        let member = if pod.spec().namespace == "plain" {
            "not in the mesh"
        } else {
            "in the mesh"
        };
        let ips = pod.addresses();
        rows.push(row(
            pod.name(),
            format!("{} {} on node {}, {member}", ips.v4, ips.v6, pod.node().name()),
        ));
    }
    Ok(rows)
}

pub fn identities(stage: &Stage) -> Result<Vec<Row>> {
    let to = SocketAddr::new(stage.cart_vip.v4.into(), 80);
    fetch(&stage.web, to)?;
    let mut rows = vec![row("curl in shop/web", format!("http://{to}/page: 200"))];
    for (node, reporter) in [(&stage.a, "source"), (&stage.b, "destination")] {
        let labels = [("reporter", reporter), ("destination_workload_namespace", "shop")];
        let (source, destination) = poll_until("the connection is counted", WAIT, || {
            let metrics = node.metrics()?;
            let series = metrics
                .series("istio_tcp_connections_opened_total", &labels)
                .next();
            let label = |name: &str| {
                let labels = &series?.labels;
                labels
                    .iter()
                    .find(|(label, _)| label == name)
                    .map(|(_, value)| value.clone())
            };
            Ok(label("source_principal").zip(label("destination_principal")))
        })?;
        for principal in [&source, &destination] {
            ensure!(
                principal.contains("/ns/shop/sa/"),
                "{principal:?} is no identity of the shop"
            );
        }
        rows.push(row(
            format!("seen at the {reporter} (node {})", node.name()),
            format!("{source} → {destination}"),
        ));
    }
    Ok(rows)
}

pub fn link(stage: &Stage) -> Result<Vec<Row>> {
    let capture = stage.a.node().capture(&[CANARY.as_bytes()])?;
    for to in pages(stage) {
        fetch(&stage.web, to)?;
    }
    let recording = capture.stop()?;
    ensure!(
        recording.sightings().is_empty(),
        "the page crossed in the clear: {:?}",
        recording.sightings()
    );
    let (web, cart) = (stage.web.addresses(), stage.cart.addresses());
    let mut bytes = 0;
    for ip in cart.all() {
        for flow in recording.flows_between(stage.web.ip_like(ip), ip) {
            ensure!(flow.server.port() == 15008, "{flow} is no tunnel");
            bytes += flow.payload_bytes();
            // A tunnel that an earlier scene has opened shows no handshake here.
            if flow.opened {
                let hello = flow.server_hello().with_context(|| flow.to_string())?;
                ensure!(
                    hello.version == TLS13 && hello.group == Some(X25519MLKEM768),
                    "{flow}: {hello:x?}"
                );
            }
        }
    }
    ensure!(bytes > 0, "nothing crossed between {} and {}", web.v4, cart.v4);
    let refuted = stage.a.node().capture(&[CANARY.as_bytes()])?;
    fetch(
        &stage.near,
        SocketAddr::new(stage.far.addresses().v4.into(), HTTP_PORT),
    )?;
    let seen = refuted.stop()?;
    ensure!(
        !seen.sightings().is_empty(),
        "the capture is blind: it misses the page without the mesh"
    );
    Ok(vec![
        row(
            "4 pages fetched by shop/web",
            format!("{bytes} B in tunnels to port 15008, the page's text nowhere"),
        ),
        row(
            "the same page outside of the mesh",
            format!("in the clear in {}", seen.sightings()[0].place),
        ),
    ])
}

pub fn refusal(stage: &Stage) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for to in pages(stage) {
        fetch(&stage.web, to)?;
    }
    rows.push(row("shop/web → shop/cart", "200 on all four addresses"));
    for (from, why) in [
        (&stage.teller, "another tenant"),
        (&stage.near, "not in the mesh"),
    ] {
        for to in pages(stage) {
            // Service addresses mean nothing outside of the mesh.
            if std::ptr::eq(from, &stage.near) && to.port() == 80 {
                continue;
            }
            let output = curl(from, to)?;
            ensure!(
                !output.status.success(),
                "{} has fetched the page from {to}",
                from.name()
            );
            ensure!(
                !output
                    .stdout
                    .windows(CANARY.len())
                    .any(|w| w == CANARY.as_bytes()),
                "the page leaked"
            );
        }
        rows.push(row(
            format!("{} → shop/cart", from.name()),
            format!("refused: {why}"),
        ));
    }
    Ok(rows)
}

const POLICY: &str = "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: closed, namespace: shop}
spec:
  selector: {matchLabels: {app: cart}}
  action: DENY
  rules:
  - from:
    - source: {namespaces: [shop]}
";

pub fn cut(stage: &Stage) -> Result<Vec<Row>> {
    let to = SocketAddr::new(stage.cart_vip.v4.into(), ECHO_PORT);
    let mut open = stage.web.connect(to)?;
    open.set_read_timeout(Some(WAIT))?;
    echo_once(&open, b"open")?;
    stage.mesh.apply(POLICY)?;
    let start = Instant::now();
    let ended = open.read(&mut [0; 1]);
    let took = start.elapsed();
    let reset = matches!(&ended, Err(e) if e.kind() == ErrorKind::ConnectionReset);
    let refused = stage
        .web
        .connect(to)
        .map_err(anyhow::Error::from)
        .and_then(|socket| {
            socket.set_read_timeout(Some(WAIT))?;
            echo_once(&socket, b"new")
        });
    stage.mesh.delete("AuthorizationPolicy", "shop", "closed")?;
    poll_until("the shop is open again", WAIT, || {
        let socket = stage.web.connect(to)?;
        socket.set_read_timeout(Some(WAIT))?;
        echo_once(&socket, b"again").map(Some)
    })?;
    ensure!(reset, "the open connection was not reset: {ended:?}");
    ensure!(refused.is_err(), "a new connection was admitted under the policy");
    ensure!(took < Duration::from_secs(1), "cut only after {took:?}");
    Ok(vec![
        row(
            "the policy's file is in place → the application sees a reset",
            millis(took),
        ),
        row("a new connection, meanwhile", "refused"),
        row("the policy is deleted", "admitted again"),
    ])
}

pub fn kill(stage: &Stage) -> Result<Vec<Row>> {
    const AWAY: Duration = Duration::from_secs(3);
    let to = SocketAddr::new(stage.cart_vip.v6.into(), ECHO_PORT);
    let attempts = Attempts::start(&stage.web, to, 200, WAIT)?;
    thread::sleep(Duration::from_secs(1));
    let killed = Instant::now();
    stage.a.kill_ztunnel()?;
    thread::sleep(AWAY);
    stage.a.start_ztunnel()?;
    stage.a.wait_ready()?;
    let ready = Instant::now();
    thread::sleep(Duration::from_secs(2));
    let attempts = attempts.stop()?;
    // Those under way at the kill have lost their tunnel, and are told so by a reset.
    let (under_way, attempts): (Vec<_>, Vec<_>) = attempts.into_iter().partition(|attempt| {
        attempt.started < killed && attempt.outcome == Err(Failure::Lost(ErrorKind::ConnectionReset))
    });
    let reset = under_way.len();
    all_complete(&attempts)?;
    let late = attempts
        .iter()
        .filter(|attempt| attempt.started < ready)
        .map(|attempt| attempt.started + attempt.took)
        .max();
    let after = late.map_or(Duration::ZERO, |late| late.saturating_duration_since(ready));
    ensure!(
        after < Duration::from_secs(2),
        "what waited was through only {after:?} after readiness"
    );
    Ok(vec![
        row(
            "attempts, 200 a second, ztunnel of node a away for 3 s",
            format!("{} complete", attempts.len()),
        ),
        row("refused", "0"),
        row("reset under way", reset.to_string()),
        row(
            "median; slowest",
            format!(
                "{}; {}",
                millis(percentile(&attempts, 50)),
                millis(percentile(&attempts, 100))
            ),
        ),
        row("ready again → everything that waited is through", millis(after)),
    ])
}

pub fn latency(stage: &Stage) -> Result<Vec<Row>> {
    let mesh = SocketAddr::new(stage.cart_vip.v4.into(), ECHO_PORT);
    let plain = SocketAddr::new(stage.far.addresses().v4.into(), ECHO_PORT);
    let mut rows = Vec::new();
    let mut compare = |what: &str, [without, with]: [Times; 2]| {
        let line = |times: &Times| {
            let (median, slow) = (times.percentile(50), times.percentile(99));
            format!("p50 {}, p99 {}", micros(median), micros(slow))
        };
        let added = with.percentile(50).saturating_sub(without.percentile(50));
        rows.push(row(format!("{what}, no mesh"), line(&without)));
        rows.push(row(
            format!("{what}, mesh"),
            format!("{} (p50 + {})", line(&with), micros(added)),
        ));
    };
    compare(
        "round trip",
        measure::by_turns(
            || measure::round_trips(&stage.near, plain, 1000),
            || measure::round_trips(&stage.web, mesh, 1000),
        )?,
    );
    compare(
        "new connection and echo",
        measure::by_turns(
            || measure::connections(&stage.near, plain, 200),
            || measure::connections(&stage.web, mesh, 200),
        )?,
    );
    Ok(rows)
}

pub fn throughput(stage: &Stage) -> Result<Vec<Row>> {
    const BYTES: u64 = 1 << 30;
    let mesh = SocketAddr::new(stage.cart_vip.v4.into(), SINK_PORT);
    let plain = SocketAddr::new(stage.far.addresses().v4.into(), SINK_PORT);
    let [without, with] = measure::medians(
        || measure::throughput(&stage.near, plain, BYTES),
        || measure::throughput(&stage.web, mesh, BYTES),
    )?;
    Ok(vec![
        row("one stream of 1 GiB, no mesh", format!("{without:.1} Gbit/s")),
        row("one stream of 1 GiB, mesh", format!("{with:.1} Gbit/s")),
    ])
}

fn millis(time: Duration) -> String {
    format!("{:.1} ms", time.as_secs_f64() * 1e3)
}

fn micros(time: Duration) -> String {
    format!("{:.0} µs", time.as_secs_f64() * 1e6)
}
