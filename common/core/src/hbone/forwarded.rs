//! `forwarded` (RFC 7239): where the source says the connection came from, for telemetry alone.

use http::HeaderValue;
use std::{net::SocketAddr, sync::Arc};

/// `for="ip:port"` and, when the service is known, `;host=service-hostname`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Forwarded {
    pub source: Option<SocketAddr>,
    pub host: Option<Arc<str>>,
}

const MAX_BYTES: usize = 512;

impl Forwarded {
    /// Reads one header value; what is not understood is absent.
    pub fn decode(value: &HeaderValue) -> Self {
        let mut forwarded = Self::default();
        let Some(text) = value.to_str().ok().filter(|text| text.len() <= MAX_BYTES) else {
            return forwarded;
        };
        for (key, value) in text.split(';').filter_map(|pair| pair.split_once('=')) {
            let value = value.trim();
            let value = value
                .strip_prefix('"')
                .and_then(|v| v.strip_suffix('"'))
                .unwrap_or(value);
            match key.trim().to_ascii_lowercase().as_str() {
                "for" => forwarded.source = value.parse().ok(),
                "host" => {
                    let legal = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
                    let named = !value.is_empty() && value.len() <= 253 && value.bytes().all(legal);
                    forwarded.host = named.then(|| value.to_ascii_lowercase().into());
                }
                _ => {}
            }
        }
        forwarded
    }

    /// The header's value, if there is anything to say.
    pub fn encode(&self) -> Option<HeaderValue> {
        let source = self.source.map(|source| format!("for=\"{source}\""));
        let host = self.host.as_ref().map(|host| format!("host={host}"));
        let text = match (source, host) {
            (Some(source), Some(host)) => format!("{source};{host}"),
            (Some(one), None) | (None, Some(one)) => one,
            (None, None) => return None,
        };
        HeaderValue::try_from(text).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn it_is_read_as_it_is_written() {
        for (text, source, host) in [
            ("for=\"10.0.0.1:80\"", Some("10.0.0.1:80"), None),
            (
                "for=\"[fd00::1]:80\";host=cart.shop.svc",
                Some("[fd00::1]:80"),
                Some("cart.shop.svc"),
            ),
            ("host=cart", None, Some("cart")),
        ] {
            let want = Forwarded {
                source: source.map(|s| s.parse().unwrap()),
                host: host.map(Into::into),
            };
            let value = HeaderValue::from_static(text);
            assert_eq!(Forwarded::decode(&value), want, "{text}");
            assert_eq!(want.encode(), Some(value), "{text}");
        }
        for odd in [
            "",
            "for=unknown",
            "for=_hidden",
            "for=\"10.0.0.1\"",
            "host=a b",
            "host=",
            ";;;=",
            "for=\"",
        ] {
            assert_eq!(
                Forwarded::decode(&HeaderValue::from_static(odd)),
                Forwarded::default(),
                "{odd}"
            );
        }
    }

    proptest! {
        #[test]
        fn any_header_is_read_without_panic(value in "[\\x20-\\x7e]{0,600}") {
            let _ = Forwarded::decode(&value.parse().unwrap());
        }
    }
}
