//! Pages of metrics, as a scraper reads them.

use super::*;
use std::time::{Duration, Instant};

crate::metrics! {
    /// A few families.
    struct Few {
        /// Things counted.
        things: IntCounterVec = "culvert_things_total" ["kind"],
        /// Names from outside.
        names: Bounded = "culvert_names_total" ["name"],
        /// How long it took.
        took: Histogram = "culvert_took_seconds" [],
    }
}

fn series(registry: &Registry, name: &str) -> usize {
    let mut page = Page::default();
    page.registry(registry);
    page.text()
        .lines()
        .filter(|line| line.starts_with(&format!("{name}{{")))
        .count()
}

#[test]
fn a_declaration_is_the_family_and_its_row() {
    let registry = Registry::new();
    let some = Few::declare(&registry).unwrap();
    some.things.with_label_values(&["x"]).inc();
    some.took.observe(0.5);
    let mut page = Page::default();
    page.registry(&registry);
    assert!(
        page.text()
            .contains("# HELP culvert_things_total Things counted\n"),
        "{}",
        page.text()
    );
    assert!(
        page.text().contains("culvert_things_total{kind=\"x\"} 1\n"),
        "{}",
        page.text()
    );
    assert_eq!(
        Few::DECLARED[0].row(),
        "| `culvert_things_total` | counter | 1 | `kind` | Things counted |"
    );
    assert_eq!(
        Few::DECLARED[2].row(),
        "| `culvert_took_seconds` | histogram | seconds | – | How long it took |"
    );
}

#[test]
fn t59_names_from_outside_make_a_bounded_number_of_series() {
    let registry = Registry::new();
    let some = Few::declare(&registry).unwrap();
    for number in 0..20_000 {
        some.names.count(&[&format!("name-{number}")]);
    }
    assert_eq!(some.names.len(), 1000);
    assert_eq!(series(&registry, "culvert_names_total"), 1001);
    some.names
        .sweep(Instant::now() + Duration::from_secs(60), Duration::from_secs(30));
    assert_eq!(
        (some.names.len(), series(&registry, "culvert_names_total")),
        (0, 1)
    );
    some.names.count(&["again"]);
    assert_eq!(some.names.len(), 1);
}

#[test]
fn the_process_shows_itself() {
    let mut page = Page::default();
    process::show(&mut page, "test");
    for declared in process::DECLARED {
        assert!(
            page.text().lines().any(|line| line.starts_with(declared.name)),
            "{}",
            declared.name
        );
    }
    let value = |name: &str| -> f64 {
        let line = page.text().lines().find(|line| line.starts_with(name)).unwrap();
        line.rsplit(' ').next().unwrap().parse().unwrap()
    };
    assert!(value("process_resident_memory_bytes") > 1e6);
    assert!(value("process_start_time_seconds") > 1.6e9);
}

#[test]
fn t16_a_label_stays_a_label() {
    let mut page = Page::default();
    read_metrics! { ALL = {
        /// One.
        ONE: "gauge" = "culvert_one" ["name"],
    } }
    assert_eq!(ALL.len(), 1);
    page.family(&ONE).sample(&["a\"} 1\nforged 2\\"], 3.0);
    assert_eq!(
        page.text().lines().last(),
        Some("culvert_one{name=\"a\\\"} 1\\nforged 2\\\\\"} 3")
    );
}
