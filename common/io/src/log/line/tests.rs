//! Events become lines, in both forms.

use super::*;
use parking_lot::Mutex;
use std::sync::Arc;
use tracing_subscriber::{Layer, layer::Context, prelude::*};

/// Keeps the lines that events become, at a fixed time.
struct Kept(Format, Arc<Mutex<Vec<String>>>);

impl<S: Subscriber> Layer<S> for Kept {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut line = String::new();
        let at = time::OffsetDateTime::from_unix_timestamp(1_795_578_000).unwrap();
        write_line(&mut line, self.0, at, event).unwrap();
        self.1.lock().push(line);
    }
}

fn lines(format: Format, log: impl FnOnce()) -> Vec<String> {
    let kept = Arc::new(Mutex::new(vec![]));
    let subscriber = tracing_subscriber::registry().with(Kept(format, kept.clone()));
    tracing::subscriber::with_default(subscriber, log);
    kept.lock().clone()
}

fn closing_record() {
    let address: std::net::SocketAddr = "10.0.1.5:40000".parse().unwrap();
    tracing::info!(
        target: "access",
        { src.addr = %address, src.workload = "web", dst.service = None::<&str>, bytes_sent = 7u64,
        error = "application: \"gone\"" },
        "connection complete"
    );
}

#[test]
fn records_look_like_this() {
    assert_eq!(
        lines(Format::Text, closing_record),
        [
            "2026-11-25T03:40:00.000000Z  INFO access: connection complete src.addr=10.0.1.5:40000 src.workload=web \
          bytes_sent=7 error=\"application: \\\"gone\\\"\"\n"
        ]
    );
    assert_eq!(
        lines(Format::Json, closing_record),
        [
            "{\"timestamp\":\"2026-11-25T03:40:00.000000Z\",\"level\":\"INFO\",\"target\":\"access\",\
          \"message\":\"connection complete\",\"src.addr\":\"10.0.1.5:40000\",\"src.workload\":\"web\",\
          \"bytes_sent\":7,\"error\":\"application: \\\"gone\\\"\"}\n"
        ]
    );
}

#[test]
fn t16_no_field_splits_a_record() {
    let nasty =
        "a\nINFO access: forged src.identity=x\r\u{1b}[2K\u{7f}\u{85}\u{9b}31m\u{2028}\u{2029}\u{202e}\"\\";
    let log = || {
        tracing::warn!(target: "access", plain = nasty, shown = %nasty, debugged = ?nasty, "said {nasty}");
        let error = std::io::Error::other(nasty);
        tracing::warn!(error = &error as &(dyn Error + 'static), "failed");
    };
    for format in [Format::Text, Format::Json] {
        for line in lines(format, log) {
            let record = line.strip_suffix('\n').unwrap();
            let bad = record.chars().find(|c| c.is_control() || is_deceptive(*c));
            assert_eq!(bad, None, "{format:?}: {record:?}");
        }
    }
    for line in lines(Format::Json, log) {
        let read: serde_json::Value = serde_json::from_str(&line).unwrap();
        if read["message"] != "failed" {
            assert_eq!(read["plain"], nasty);
            assert_eq!(read["shown"], nasty);
        }
    }
}

#[test]
fn numbers_and_words_stay_what_they_are_in_json() {
    let log = || tracing::info!(n = -1i64, x = 0.5, nan = f64::NAN, yes = true, empty = "", "m");
    assert!(
        lines(Format::Json, log)[0]
            .ends_with("\"message\":\"m\",\"n\":-1,\"x\":0.5,\"nan\":\"NaN\",\"yes\":true,\"empty\":\"\"}\n")
    );
    assert!(lines(Format::Text, log)[0].ends_with("m n=-1 x=0.5 nan=NaN yes=true empty=\"\"\n"));
}
