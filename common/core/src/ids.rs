//! Names: what workloads, services, policies and identities are called.
//!
//! Strings from the wire become these types once, at the edge; inside, holding the type is the proof
//! that the name is well formed. Invariant: every name is opaque. It is compared and logged, and no part
//! of it is ever parsed to decide something.

use std::{fmt, net::IpAddr, str::FromStr, sync::Arc};

/// Why a string is no identity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    #[error("not a SPIFFE ID: {reason}: {text:?}")]
    SpiffeId { text: String, reason: String },
    #[error("not a trust domain: {reason}: {text:?}")]
    TrustDomain { text: String, reason: String },
    #[error("not of the form namespace/name: {0:?}")]
    Namespaced(String),
}

/// Keeps what an error quotes short and on one line, whatever a peer sent.
fn quoted(text: &str) -> String {
    text.chars().take(128).collect()
}

/// A trust domain: 1 to 255 bytes of `[a-z0-9._-]` (SPIFFE-ID §2.1). Valid once built.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TrustDomain(Arc<str>);

impl TrustDomain {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for TrustDomain {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        let refuse = |reason: &str| {
            Err(IdError::TrustDomain {
                text: quoted(text),
                reason: reason.to_owned(),
            })
        };
        if text.is_empty() || text.len() > 255 {
            return refuse("must have 1 to 255 bytes");
        }
        if !text
            .bytes()
            .all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'_' | b'-'))
        {
            return refuse("only a-z, 0-9, '.', '_' and '-' are allowed");
        }
        Ok(Self(text.into()))
    }
}

/// A SPIFFE ID, `spiffe://trust-domain/path`: opaque.
///
/// Two IDs are the same when their bytes are: SPIFFE allows no case folding, no escapes, no query, no
/// fragment, no port (SPIFFE-ID §2). A workload's ID has a path.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpiffeId {
    uri: Arc<str>,
    trust_domain_len: u8,
}

/// Most bytes of a SPIFFE ID (SPIFFE-ID §2.3).
pub const MAX_SPIFFE_ID_BYTES: usize = 2048;

const SCHEME: &str = "spiffe://";

impl SpiffeId {
    /// The default template: `spiffe://{trust_domain}/ns/{namespace}/sa/{service_account}`.
    pub fn from_template(
        trust_domain: &TrustDomain,
        namespace: &str,
        service_account: &str,
    ) -> Result<Self, IdError> {
        Self::template(trust_domain, namespace, service_account).parse()
    }

    /// The text of the default template, not yet checked.
    pub fn template(trust_domain: &TrustDomain, namespace: &str, service_account: &str) -> String {
        format!(
            "{SCHEME}{}/ns/{namespace}/sa/{service_account}",
            trust_domain.as_str()
        )
    }

    pub fn as_str(&self) -> &str {
        &self.uri
    }

    /// The trust domain, whose roots must have signed a certificate of this ID.
    pub fn trust_domain(&self) -> &str {
        &self.uri[SCHEME.len()..SCHEME.len() + usize::from(self.trust_domain_len)]
    }

    /// The ID without its scheme: what a policy's `principals` are compared with.
    pub fn principal(&self) -> &str {
        &self.uri[SCHEME.len()..]
    }
}

impl FromStr for SpiffeId {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        let refuse = |reason: String| {
            Err(IdError::SpiffeId {
                text: quoted(text),
                reason,
            })
        };
        if text.len() > MAX_SPIFFE_ID_BYTES {
            return refuse(format!("longer than {MAX_SPIFFE_ID_BYTES} bytes"));
        }
        let id = match spiffe::SpiffeId::new(text) {
            Ok(id) => id,
            Err(error) => return refuse(error.to_string()),
        };
        if id.path().is_empty() {
            return refuse("a workload's ID has a path".to_owned());
        }
        // Some parsers fold case; an ID that is not its own canonical form is no ID.
        if id.to_string() != text {
            return refuse("not in canonical form".to_owned());
        }
        let trust_domain: TrustDomain = id.trust_domain_name().parse()?;
        Ok(Self {
            uri: text.into(),
            trust_domain_len: u8::try_from(trust_domain.as_str().len()).map_err(|_| IdError::SpiffeId {
                text: quoted(text),
                reason: "trust domain too long".into(),
            })?,
        })
    }
}

macro_rules! opaque {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(Arc<str>);

        impl $name {
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl From<&str> for $name {
            fn from(text: &str) -> Self {
                Self(text.into())
            }
        }

        impl From<Arc<str>> for $name {
            fn from(text: Arc<str>) -> Self {
                Self(text)
            }
        }

        impl From<$name> for Arc<str> {
            fn from(name: $name) -> Self {
                name.0
            }
        }

        impl From<String> for $name {
            fn from(text: String) -> Self {
                Self(text.into())
            }
        }
    };
}

opaque! {
    /// The control plane's key of a workload: opaque, compared, never parsed.
    WorkloadUid
}
opaque! {
    /// Kubernetes' uid of a pod, as the node's agent names it.
    PodUid
}
opaque! {
    /// A network in which addresses are unique; empty is the mesh's own.
    NetworkId
}

macro_rules! namespaced {
    ($(#[$doc:meta])* $name:ident, $second:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name {
            text: Arc<str>,
            slash: u16,
        }

        impl $name {
            /// `namespace/name` as one string.
            pub fn as_str(&self) -> &str {
                &self.text
            }

            pub fn namespace(&self) -> &str {
                &self.text[..usize::from(self.slash)]
            }

            pub fn $second(&self) -> &str {
                &self.text[usize::from(self.slash) + 1..]
            }
        }

        impl FromStr for $name {
            type Err = IdError;

            fn from_str(text: &str) -> Result<Self, IdError> {
                let slash = match text.split_once('/') {
                    Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() => {
                        u16::try_from(namespace.len()).ok()
                    }
                    _ => None,
                };
                let slash = slash.ok_or_else(|| IdError::Namespaced(quoted(text)))?;
                Ok(Self { text: text.into(), slash })
            }
        }
    };
}

namespaced! {
    /// A service: `namespace/hostname`.
    ServiceKey, hostname
}
namespaced! {
    /// A policy: `namespace/name`.
    PolicyKey, name
}

macro_rules! shown {
    ($($name:ident),*) => {$(
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:?}", self.as_str())
            }
        }
    )*};
}

shown!(
    TrustDomain,
    SpiffeId,
    WorkloadUid,
    PodUid,
    NetworkId,
    ServiceKey,
    PolicyKey
);

/// An address in its network: unique at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NetworkAddress {
    pub network: NetworkId,
    pub ip: IpAddr,
}

impl NetworkAddress {
    /// The name under which discovery knows it: `network/ip`.
    pub fn resource_name(&self) -> String {
        format!("{}/{}", self.network, self.ip)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn t36_a_spiffe_id_has_one_spelling() {
        for good in [
            "spiffe://cluster.local/ns/shop/sa/web",
            "spiffe://td/team/app",
            "spiffe://a-b.c_d/x.y-z_/A",
        ] {
            let id: SpiffeId = good.parse().expect(good);
            assert_eq!(id.as_str(), good);
            assert_eq!(format!("spiffe://{}", id.principal()), good);
        }
        let long = format!("spiffe://td/{}", "a".repeat(2048));
        for (why, bad) in [
            ("other scheme", "https://td/a"),
            ("scheme in capitals", "SPIFFE://td/a"),
            ("capitals in the trust domain", "spiffe://TD/a"),
            ("no trust domain", "spiffe:///a"),
            ("no path", "spiffe://td"),
            ("path of a slash alone", "spiffe://td/"),
            ("trailing slash", "spiffe://td/a/"),
            ("empty segment", "spiffe://td//a"),
            ("dot segment", "spiffe://td/../a"),
            ("single dot", "spiffe://td/./a"),
            ("percent escape", "spiffe://td/%61"),
            ("port", "spiffe://td:80/a"),
            ("userinfo", "spiffe://u@td/a"),
            ("query", "spiffe://td/a?b"),
            ("fragment", "spiffe://td/a#b"),
            ("trailing space", "spiffe://td/a "),
            ("NUL", "spiffe://td/a\0b"),
            ("new line", "spiffe://td/a\nb"),
            ("not ASCII", "spiffe://td/ä"),
            ("wildcard", "spiffe://td/*"),
            ("too long", &long),
            ("empty", ""),
        ] {
            assert!(bad.parse::<SpiffeId>().is_err(), "{why}: {bad:?}");
        }
    }

    #[test]
    fn the_trust_domain_is_what_stands_before_the_path() {
        let id: SpiffeId = "spiffe://prod.example/ns/a/sa/b".parse().expect("legal");
        assert_eq!(id.trust_domain(), "prod.example");
        assert_eq!(id.principal(), "prod.example/ns/a/sa/b");
    }

    #[test]
    fn keys_have_a_namespace_and_a_name() {
        let key: ServiceKey = "shop/cart.shop.svc.cluster.local".parse().expect("legal");
        assert_eq!(
            (key.namespace(), key.hostname()),
            ("shop", "cart.shop.svc.cluster.local")
        );
        for bad in ["", "shop", "/cart", "shop/"] {
            assert!(bad.parse::<PolicyKey>().is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parsers_panic(text in ".{0,300}") {
            let _ = text.parse::<SpiffeId>();
            let _ = text.parse::<TrustDomain>();
            let _ = text.parse::<ServiceKey>();
        }

        #[test]
        fn every_legal_id_is_kept_as_it_is(td in "[a-z0-9][a-z0-9._-]{0,30}", path in "(/[a-zA-Z0-9_-]{1,20}){1,5}") {
            let text = format!("spiffe://{td}{path}");
            let id: SpiffeId = text.parse().expect("legal");
            prop_assert_eq!(id.as_str(), &text);
            prop_assert_eq!(id.trust_domain(), td);
        }
    }
}
