//! Records as a log reader sees them, field by field.

use super::*;
use crate::fixtures::{CART, WEB, service, snapshot, workload};
use std::net::SocketAddr;

/// A record's field names and values.
type Record = Vec<(String, String)>;

/// Runs `log` and returns the records of target `access`.
fn records(log: impl FnOnce()) -> Vec<Record> {
    use parking_lot::Mutex;
    use tracing::field::{Field, Visit};
    use tracing_subscriber::{Layer, layer::Context, prelude::*};

    #[derive(Default)]
    struct Fields(Record);
    impl Visit for Fields {
        fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
            self.0.push((field.name().to_owned(), format!("{value:?}")));
        }
        fn record_str(&mut self, field: &Field, value: &str) {
            self.0.push((field.name().to_owned(), value.to_owned()));
        }
    }
    struct Kept(Arc<Mutex<Vec<Record>>>);
    impl<S: tracing::Subscriber> Layer<S> for Kept {
        fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
            let mut fields = Fields::default();
            event.record(&mut fields);
            let level = ("level".to_owned(), event.metadata().level().to_string());
            assert_eq!(event.metadata().target(), "access");
            fields.0.insert(0, level);
            self.0.lock().push(fields.0);
        }
    }
    let kept = Arc::new(Mutex::new(vec![]));
    let subscriber = tracing_subscriber::registry().with(Kept(kept.clone()));
    tracing::subscriber::with_default(subscriber, log);
    kept.lock().clone()
}

fn known() -> Known {
    let mesh = snapshot([
        workload(WEB, "10.0.1.5", |_| ()),
        workload(CART, "10.0.2.7", |_| ()),
        service("shop/cart", "10.96.0.1", |_| ()),
    ]);
    let of = |uid: &str| mesh.workload(&uid.into()).cloned();
    let at = |text: &str| -> Option<SocketAddr> { Some(text.parse().unwrap()) };
    let mut known = Known::new(
        Reporter::Source,
        "10.0.1.5:40000".parse().unwrap(),
        at("10.0.2.7:15008"),
    );
    known.hbone_address = at("10.0.2.7:8080");
    known.source = of(WEB);
    known.source_identity = known.source.as_ref().map(|workload| workload.identity.clone());
    known.destination = of(CART);
    known.destination_identity = known
        .destination
        .as_ref()
        .map(|workload| workload.identity.clone());
    known.service = mesh
        .service(&"shop/cart".parse().unwrap())
        .cloned()
        .map(Served::Whole);
    known.trace = Some(Traceparent::new([0x11; 16], [0x22; 8]));
    known
}

const SHARED: [(&str, &str); 12] = [
    ("src.addr", "10.0.1.5:40000"),
    ("src.workload", "web"),
    ("src.namespace", "shop"),
    ("src.identity", "spiffe://cluster.local/ns/shop/sa/web"),
    ("dst.addr", "10.0.2.7:15008"),
    ("dst.hbone_addr", "10.0.2.7:8080"),
    ("dst.service", "cart"),
    ("dst.workload", "cart"),
    ("dst.namespace", "shop"),
    ("dst.identity", "spiffe://cluster.local/ns/shop/sa/cart"),
    ("direction", "outbound"),
    ("trace_id", "11111111111111111111111111111111"),
];

fn record(level: &str, message: &str, own: &[(&str, &str)]) -> Record {
    [("level", level), ("message", message)]
        .iter()
        .chain(&SHARED)
        .chain(own)
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
        .collect()
}

#[test]
fn records_have_the_fields_of_the_field() {
    let known = known();
    let flow = Flow::default();
    flow.received.store(7, Ordering::Relaxed);
    flow.sent.store(9, Ordering::Relaxed);
    let took = Duration::from_millis(15);
    let cut = Cut {
        reason: "denied",
        policy: Some("shop/no-web".parse().unwrap()),
    };
    let found = records(|| {
        opened(&known);
        complete(&known, &flow, took, None, None);
        complete(&known, &flow, took, Some(&Fault::Cut), Some(&cut));
    });
    // Seen from the source, what the initiator sent was sent.
    let bytes = [("bytes_sent", "7"), ("bytes_recv", "9"), ("duration", "15ms")];
    let cut = [
        &bytes[..],
        &[
            ("reason", "denied"),
            ("policy", "shop/no-web"),
            ("error", "cut: it is no longer allowed"),
        ],
    ]
    .concat();
    assert_eq!(
        found,
        [
            record("DEBUG", "connection opened", &[]),
            record("INFO", "connection complete", &bytes),
            record("WARN", "connection cut", &cut),
        ]
    );
}

#[derive(Debug, thiserror::Error)]
#[error("denied by policy shop/no-web")]
struct Denied(PolicyKey);

impl Refusing for Denied {
    fn reason(&self) -> &'static str {
        "denied"
    }

    fn policy(&self) -> Option<&PolicyKey> {
        Some(&self.0)
    }

    fn flag(&self) -> Flag {
        Flag::Deny
    }
}

#[test]
fn a_refusal_leaves_one_record_with_reason_identities_and_rule() {
    let metrics = Metrics::new().unwrap();
    let known = known();
    let denied = Denied("shop/no-web".parse().unwrap());
    let found = records(|| refused(&metrics, &known, &denied));
    let own = [
        ("reason", "denied"),
        ("policy", "shop/no-web"),
        ("error", "denied by policy shop/no-web"),
    ];
    assert_eq!(found, [record("WARN", "connection failed", &own)]);
    let refusals = metrics.refused.with_label_values(&["outbound", "denied"]).get();
    assert_eq!(refusals, 1);
}

#[test]
fn what_was_given_up_is_no_refusal() {
    let metrics = Metrics::new().unwrap();
    let left = Denied("shop/no-web".parse().unwrap());
    let found = records(|| given_up(&metrics, &known(), &left));
    let own = [("reason", "denied")];
    assert_eq!(found, [record("INFO", "connection given up", &own)]);
    let refusals = metrics.refused.with_label_values(&["outbound", "denied"]);
    assert_eq!(refusals.get(), 0);
}
