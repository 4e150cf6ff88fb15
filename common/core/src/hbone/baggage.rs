//! `baggage`: what the source says it is, for telemetry alone.

use http::{HeaderMap, HeaderValue};
use std::{fmt::Write, sync::Arc};

/// The keys that a node proxy sends, in this order; absent ones are left out.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Baggage {
    pub cluster: Option<Arc<str>>,
    pub namespace: Option<Arc<str>>,
    /// `deployment`, `cronjob`, `pod` or `job`, and its name.
    pub workload: Option<(&'static str, Arc<str>)>,
    pub service_name: Option<Arc<str>>,
    pub service_version: Option<Arc<str>>,
    pub region: Option<Arc<str>>,
    pub zone: Option<Arc<str>>,
}

const KINDS: [&str; 4] = ["deployment", "cronjob", "pod", "job"];

/// Most bytes of baggage that are read; the rest is ignored.
const MAX_BYTES: usize = 4096;
/// Most bytes of one value; a longer one counts as absent. A Kubernetes name has at most 253.
const MAX_VALUE_BYTES: usize = 256;

impl Baggage {
    /// Reads all `baggage` headers: an empty value is absent, an unknown key ignored, the first of a key
    /// that stands twice is taken. Values that a name cannot have are ignored too, so that nothing odd
    /// reaches a log or a metric.
    pub fn decode(headers: &HeaderMap) -> Self {
        let mut baggage = Self::default();
        let mut left = MAX_BYTES;
        for value in headers.get_all("baggage") {
            let Ok(text) = value.to_str() else { continue };
            let Some(rest) = left.checked_sub(text.len()) else {
                break;
            };
            left = rest;
            for (key, value) in text.split(',').filter_map(|pair| pair.split_once('=')) {
                baggage.take(key.trim(), value.trim());
            }
        }
        baggage
    }

    fn take(&mut self, key: &str, value: &str) {
        let legal = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b'/' | b':');
        if value.is_empty() || value.len() > MAX_VALUE_BYTES || !value.bytes().all(legal) {
            return;
        }
        let slot = match key {
            "k8s.cluster.name" => &mut self.cluster,
            "k8s.namespace.name" => &mut self.namespace,
            "service.name" => &mut self.service_name,
            "service.version" => &mut self.service_version,
            "cloud.region" => &mut self.region,
            "cloud.availability_zone" => &mut self.zone,
            _ => {
                let kind = key.strip_prefix("k8s.").and_then(|key| key.strip_suffix(".name"));
                if let Some(kind) = KINDS.into_iter().find(|known| Some(*known) == kind) {
                    self.workload.get_or_insert_with(|| (kind, value.into()));
                }
                return;
            }
        };
        slot.get_or_insert_with(|| value.into());
    }

    /// The header's value; none when there is nothing to say or a value that no header can carry.
    pub fn encode(&self) -> Option<HeaderValue> {
        let mut text = String::new();
        let mut put = |key: &str, value: Option<&str>| {
            if let Some(value) = value.filter(|value| !value.is_empty()) {
                let comma = if text.is_empty() { "" } else { "," };
                let _ = write!(text, "{comma}{key}={value}");
            }
        };
        put("k8s.cluster.name", self.cluster.as_deref());
        put("k8s.namespace.name", self.namespace.as_deref());
        if let Some((kind, name)) = &self.workload {
            put(&format!("k8s.{kind}.name"), Some(name));
        }
        put("service.name", self.service_name.as_deref());
        put("service.version", self.service_version.as_deref());
        put("cloud.region", self.region.as_deref());
        put("cloud.availability_zone", self.zone.as_deref());
        if text.is_empty() {
            None
        } else {
            HeaderValue::try_from(text).ok()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn headers(values: &[&str]) -> HeaderMap {
        values
            .iter()
            .map(|value| (http::HeaderName::from_static("baggage"), value.parse().unwrap()))
            .collect()
    }

    #[test]
    fn baggage_is_written_in_order_and_read_back() {
        let baggage = Baggage {
            cluster: Some("Kubernetes".into()),
            namespace: Some("shop".into()),
            workload: Some(("deployment", "web".into())),
            service_name: Some("web".into()),
            service_version: Some("v1".into()),
            ..Baggage::default()
        };
        let value = baggage.encode().unwrap();
        assert_eq!(
            value.to_str().unwrap(),
            "k8s.cluster.name=Kubernetes,k8s.namespace.name=shop,k8s.deployment.name=web,service.name=web,service.version=v1"
        );
        assert_eq!(Baggage::decode(&headers(&[value.to_str().unwrap()])), baggage);
        assert_eq!(Baggage::default().encode(), None);
    }

    #[test]
    fn t16_a_value_that_no_name_has_is_ignored() {
        let read = Baggage::decode(&headers(&[
            "k8s.namespace.name=,k8s.cluster.name=a b,other=x,service.name=a\"b",
            "k8s.namespace.name=shop , cloud.region=eu",
            "k8s.namespace.name=evil",
        ]));
        let want = Baggage {
            namespace: Some("shop".into()),
            region: Some("eu".into()),
            ..Baggage::default()
        };
        assert_eq!(read, want);
    }

    proptest! {
        #[test]
        fn any_header_is_read_without_panic(value in "[\\x20-\\x7e]{0,400}") {
            let _ = Baggage::decode(&headers(&[&value]));
        }
    }
}
