//! Series of pairs, bounded, and the page that the documentation describes.

use super::{
    pairs::{MAX_PAIRS, Party},
    *,
};
use crate::access::Served;
use crate::fixtures::{CART, WEB, service, snapshot, workload};
use culvert_core::{ids::SpiffeId, mesh::Locality, snapshot::Snapshot};
use std::{path::Path, sync::Arc};

fn mesh() -> Snapshot {
    snapshot([
        workload(WEB, "10.0.1.5", |w| {
            w.locality = Locality {
                region: "eu".into(),
                zone: "eu-1".into(),
                subzone: "".into(),
            };
        }),
        workload(CART, "10.0.2.7", |w| w.canonical_revision = "v2".into()),
        service("shop/cart", "10.96.0.1", |_| ()),
    ])
}

fn page(metrics: &Metrics) -> String {
    let mut page = Page::default();
    metrics.show(&mut page);
    page.text().to_owned()
}

#[test]
fn a_pair_has_the_labels_of_the_field() {
    let (metrics, mesh) = (Metrics::new().unwrap(), mesh());
    let (web, cart) = (
        mesh.workload(&WEB.into()).unwrap(),
        mesh.workload(&CART.into()).unwrap(),
    );
    let served = mesh
        .service(&"shop/cart".parse().unwrap())
        .cloned()
        .map(Served::Whole);
    let party = Party {
        source: Some(web),
        source_identity: Some(&web.identity),
        destination: Some(cart),
        destination_identity: Some(&cart.identity),
        service: served.as_ref(),
    };
    let ends = metrics.ends(Reporter::Source, &party);
    ends.opened();
    ends.moved(3, 4);
    ends.closed(Flag::None);
    metrics.ends(Reporter::Source, &party).failed(Flag::Deny);
    let labels = "reporter=\"source\",source_workload=\"web\",source_canonical_service=\"web\",\
        source_canonical_revision=\"unknown\",source_workload_namespace=\"shop\",\
        source_principal=\"spiffe://cluster.local/ns/shop/sa/web\",source_app=\"web\",\
        source_version=\"unknown\",source_cluster=\"Kubernetes\",source_region=\"eu\",source_zone=\"eu-1\",\
        destination_service=\"cart\",destination_service_namespace=\"shop\",\
        destination_service_name=\"shop/cart\",destination_workload=\"cart\",\
        destination_canonical_service=\"cart\",destination_canonical_revision=\"v2\",\
        destination_workload_namespace=\"shop\",\
        destination_principal=\"spiffe://cluster.local/ns/shop/sa/cart\",destination_app=\"cart\",\
        destination_version=\"v2\",destination_cluster=\"Kubernetes\",destination_region=\"unknown\",\
        destination_zone=\"unknown\",request_protocol=\"tcp\",connection_security_policy=\"mutual_tls\"";
    let page = page(&metrics);
    for line in [
        format!("istio_tcp_connections_opened_total{{{labels},response_flags=\"-\"}} 1"),
        format!("istio_tcp_connections_closed_total{{{labels},response_flags=\"-\"}} 1"),
        format!("istio_tcp_connections_failed_total{{{labels},response_flags=\"DENY\"}} 1"),
        format!("istio_tcp_received_bytes_total{{{labels},response_flags=\"-\"}} 3"),
        format!("istio_tcp_sent_bytes_total{{{labels},response_flags=\"-\"}} 4"),
    ] {
        assert!(page.lines().any(|found| found == line), "{line}\nin\n{page}");
    }
}

#[test]
fn a_workload_that_changes_keeps_its_series_if_its_labels_stay() {
    let metrics = Metrics::new().unwrap();
    for _ in 0..3 {
        let mesh = mesh();
        let party = Party {
            source: mesh.workload(&WEB.into()),
            ..Party::default()
        };
        metrics.ends(Reporter::Source, &party).opened();
    }
    assert_eq!(metrics.pairs.sizes(), (3, 1));
    let line = page(&metrics);
    let line = line
        .lines()
        .find(|line| line.starts_with("istio_tcp_connections_opened_total{"))
        .unwrap();
    assert!(line.ends_with(" 3"), "{line}");
}

#[test]
fn t59_a_million_distinct_peers_make_a_bounded_page() {
    let metrics = Metrics::new().unwrap();
    let count = if std::env::var_os("CULVERT_E2E_LONG").is_some() {
        1_000_000
    } else {
        50_000
    };
    let before = resident();
    for number in 0..count {
        let identity: SpiffeId = format!("spiffe://cluster.local/ns/n{number}/sa/a")
            .parse()
            .unwrap();
        let party = Party {
            source_identity: Some(&identity),
            ..Party::default()
        };
        let ends = metrics.ends(Reporter::Destination, &party);
        ends.opened();
        ends.closed(Flag::None);
    }
    let (known, pairs) = metrics.pairs.sizes();
    assert_eq!(pairs, MAX_PAIRS);
    assert!(known <= 2 * MAX_PAIRS, "{known}");
    let grown = resident().saturating_sub(before);
    assert!(grown < 64 << 20, "{grown} bytes for {MAX_PAIRS} pairs");
    let page = page(&metrics);
    let opened = |line: &&str| line.starts_with("istio_tcp_connections_opened_total{");
    assert_eq!(page.lines().filter(opened).count(), MAX_PAIRS + 1);
    let overflow = page
        .lines()
        .filter(opened)
        .find(|line| line.contains("source_principal=\"overflow\""))
        .unwrap();
    assert!(
        overflow.ends_with(&format!(" {}", count - MAX_PAIRS)),
        "{overflow}"
    );
}

fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .unwrap();
    line.split_whitespace().next().unwrap().parse::<u64>().unwrap() * 1024
}

#[test]
fn idle_pairs_go_and_pairs_with_a_connection_stay() {
    let metrics = Metrics::new().unwrap();
    let mesh = mesh();
    let of = |uid: &str| Party {
        source: mesh.workload(&uid.into()),
        ..Party::default()
    };
    let open = metrics.ends(Reporter::Source, &of(WEB));
    drop(metrics.ends(Reporter::Source, &of(CART)));
    let later = Instant::now() + IDLE + Duration::from_secs(1);
    metrics.sweep(Instant::now());
    assert_eq!(metrics.pairs.sizes(), (2, 2));
    metrics.sweep(later);
    assert_eq!(metrics.pairs.sizes().1, 1);
    // The series in use is found again, not made anew beside itself.
    open.opened();
    metrics.ends(Reporter::Source, &of(WEB)).opened();
    let page = page(&metrics);
    assert!(
        page.lines()
            .any(|line| line.starts_with("istio_tcp_connections_opened_total{") && line.ends_with(" 2"))
    );
    drop(open);
    metrics.sweep(later + IDLE);
    assert_eq!(metrics.pairs.sizes(), (0, 0));
}

#[test]
fn what_is_open_is_counted_for_as_long_as_it_lives() {
    let metrics = Metrics::new().unwrap();
    let value = |name: &str| {
        let page = page(&metrics);
        let line = page.lines().find(|line| line.starts_with(name)).unwrap();
        line.rsplit(' ').next().unwrap().to_owned()
    };
    let (one, two) = (
        metrics.open(Reporter::Source, 1),
        metrics.open(Reporter::Source, 2),
    );
    let tunnel = metrics.tunnel(Reporter::Source);
    assert_eq!(value("istio_tcp_sockets_open{reporter=\"source\"}"), "3");
    assert_eq!(value("culvert_connections_open{direction=\"outbound\"}"), "2");
    assert_eq!(value("culvert_tunnels_open{direction=\"outbound\"}"), "1");
    drop((one, two, tunnel));
    assert_eq!(value("istio_tcp_sockets_open{reporter=\"source\"}"), "0");
    assert_eq!(value("culvert_tunnels_open{direction=\"outbound\"}"), "0");
}

#[test]
fn every_metric_is_documented_and_every_documented_one_exists() {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/metrics.md");
    let declared = [
        pairs::DECLARED,
        Families::DECLARED,
        read::DECLARED,
        culvert_io::metrics::process::DECLARED,
    ];
    culvert_io::metrics::check_documented(&page, "ztunnel", &declared).unwrap_or_else(|why| panic!("{why}"));
    let mut names: Vec<&str> = declared
        .iter()
        .flat_map(|some| some.iter())
        .map(|one| one.name)
        .collect();
    names.sort_unstable();
    let all = names.len();
    names.dedup();
    assert_eq!(names.len(), all, "a name stands twice");
}

/// The cost of a look-up of a known pair must not include writing its labels.
#[test]
fn a_known_pair_is_found_by_its_values_places() {
    let (metrics, mesh) = (Metrics::new().unwrap(), mesh());
    let party = Party {
        source: mesh.workload(&WEB.into()),
        destination: mesh.workload(&CART.into()),
        ..Party::default()
    };
    for _ in 0..1000 {
        metrics.ends(Reporter::Source, &party).opened();
    }
    assert_eq!(metrics.pairs.sizes(), (1, 1));
    let copy = Arc::new(mesh.workload(&WEB.into()).unwrap().as_ref().clone());
    let other = Party {
        source: Some(&copy),
        ..party
    };
    metrics.ends(Reporter::Source, &other).opened();
    assert_eq!(metrics.pairs.sizes(), (2, 1));
}
