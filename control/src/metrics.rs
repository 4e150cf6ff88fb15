//! What control counts. Names, labels and meanings stand here alone.
//!
//! Labels are closed words: types of resources, verdicts, results. Invariant: no label is a node's or a pod's.

use crate::{index::World, watch::files::Health};
use culvert_io::{
    log::Log,
    metrics::{Page, process},
};
use parking_lot::Mutex;
use prometheus::{Histogram, IntCounterVec, IntGauge, IntGaugeVec, Registry};
use std::{
    ops::Deref,
    time::{Instant, SystemTime, UNIX_EPOCH},
};

culvert_io::metrics! {
    /// Families that count as things happen.
    pub struct Families {
        /// Streams of nodes open now: `discovery` of ztunnels, `orders` of agents.
        streams: IntGaugeVec = "culvert_control_streams" ["service"],
        /// Discovery responses sent.
        responses: IntCounterVec = "culvert_control_responses_total" ["url"],
        /// Resources in them, `sent` or named as `removed`.
        resources: IntCounterVec = "culvert_control_resources_total" ["url", "change"],
        /// Responses of which a node refused something.
        nacks: IntCounterVec = "culvert_control_nacks_total" ["url"],
        /// From the publication of a change until a node's stream has what of it may be sent at once.
        push_seconds: Histogram = "culvert_control_push_duration_seconds" [],
        /// Requests for certificates: `issued`, or why not: `nothing_asked`, `not_on_node`, `not_signed`.
        certificates: IntCounterVec = "culvert_control_certificates_total" ["verdict"],
        /// Changes of the folder: `applied`, or `rejected` for a mistake.
        reloads: IntCounterVec = "culvert_control_reloads_total" ["result"],
    }
}

culvert_io::read_metrics! { DECLARED = {
    /// Version of the configuration served.
    VERSION: "gauge" = "culvert_config_version" [],
    /// Mistakes in the folder now; the last good state is served.
    MISTAKES: "gauge" = "culvert_config_mistakes" [],
    /// How long the folder has not been what is served: 0 while there is no mistake in it.
    AGE: "gauge" = "culvert_config_age_seconds" [],
    /// When the configuration served was published, in seconds since 1970.
    PUBLISHED: "gauge" = "culvert_config_published_timestamp_seconds" [],
    /// Log lines dropped because nobody took them in time.
    LOG_DROPPED: "counter" = "culvert_log_lines_dropped_total" [],
} }

/// All metrics of control; its families are reached as its own fields.
pub struct Metrics {
    registry: Registry,
    families: Families,
    published: Mutex<(SystemTime, Instant)>,
}

impl Deref for Metrics {
    type Target = Families;

    fn deref(&self) -> &Families {
        &self.families
    }
}

impl Metrics {
    pub fn new() -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        Ok(Self {
            families: Families::declare(&registry)?,
            published: Mutex::new((SystemTime::now(), Instant::now())),
            registry,
        })
    }

    /// Notes that a world is published now.
    pub fn publish(&self) {
        *self.published.lock() = (SystemTime::now(), Instant::now());
    }

    /// When the latest world was published.
    pub fn published(&self) -> (SystemTime, Instant) {
        *self.published.lock()
    }

    /// Counts a stream as open until the value is dropped.
    pub fn stream(&self, service: &str) -> OpenStream {
        let gauge = self.streams.with_label_values(&[service]);
        gauge.inc();
        OpenStream(gauge)
    }

    /// The page that Prometheus scrapes.
    pub fn page(&self, world: &World, health: &Health, log: &Log) -> Vec<u8> {
        let mut page = Page::default();
        page.registry(&self.registry);
        process::show(&mut page, "control");
        page.one(&VERSION, world.number as f64);
        page.one(&MISTAKES, health.mistakes.len() as f64);
        let since = health.since.map(|since| since.elapsed());
        page.one(&AGE, since.unwrap_or_default().as_secs_f64());
        let published = self.published().0.duration_since(UNIX_EPOCH);
        page.one(&PUBLISHED, published.unwrap_or_default().as_secs_f64());
        page.one(&LOG_DROPPED, log.dropped() as f64);
        page.into_bytes()
    }
}

/// An open stream, counted for as long as this lives.
pub struct OpenStream(IntGauge);

impl Drop for OpenStream {
    fn drop(&mut self) {
        self.0.dec();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_metric_is_documented_and_every_documented_one_exists() {
        let page = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/metrics.md");
        let declared = [Families::DECLARED, DECLARED, process::DECLARED];
        culvert_io::metrics::check_documented(&page, "control", &declared)
            .unwrap_or_else(|why| panic!("{why}"));
    }
}
