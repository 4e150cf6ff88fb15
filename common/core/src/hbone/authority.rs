//! The CONNECT's authority: an address or a host name, always with a port.

use std::{
    fmt,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    str::FromStr,
    sync::Arc,
};

/// `a.b.c.d:port`, `[v6]:port` or `hostname:port`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Authority {
    Address(SocketAddr),
    /// A name in lower case without a dot at its end.
    Host {
        name: Arc<str>,
        port: u16,
    },
}

/// Why a text is no authority.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AuthorityError {
    #[error("no port")]
    NoPort,
    #[error("port is not a number from 1 to 65535")]
    Port,
    #[error("user information is not allowed")]
    UserInfo,
    #[error("not an address, and not a host name of 1 to 253 letters, digits, '-', '_' and '.'")]
    Host,
    #[error("an IPv4 address written as IPv6, or one with a zone")]
    Mapped,
}

impl Authority {
    pub fn port(&self) -> u16 {
        match self {
            Self::Address(address) => address.port(),
            Self::Host { port, .. } => *port,
        }
    }
}

impl FromStr for Authority {
    type Err = AuthorityError;

    fn from_str(text: &str) -> Result<Self, AuthorityError> {
        if text.contains('@') {
            return Err(AuthorityError::UserInfo);
        }
        let (host, port) = text.rsplit_once(':').ok_or(AuthorityError::NoPort)?;
        if port.is_empty() || host.is_empty() {
            return Err(AuthorityError::NoPort);
        }
        // `u16::from_str` takes a sign; an authority has none.
        let port = match port.parse() {
            Ok(number) if number != 0 && !port.starts_with('+') => number,
            _ => return Err(AuthorityError::Port),
        };
        if let Some(v6) = host.strip_prefix('[') {
            let v6 = v6.strip_suffix(']').ok_or(AuthorityError::Host)?;
            if v6.contains('%') {
                return Err(AuthorityError::Mapped);
            }
            let ip: Ipv6Addr = v6.parse().map_err(|_| AuthorityError::Host)?;
            // A mapped address would name one endpoint in two ways.
            if ip.to_ipv4_mapped().is_some() {
                return Err(AuthorityError::Mapped);
            }
            return Ok(Self::Address(SocketAddr::new(IpAddr::V6(ip), port)));
        }
        if let Ok(ip) = host.parse() {
            return Ok(Self::Address(SocketAddr::new(IpAddr::V4(ip), port)));
        }
        let name = host.strip_suffix('.').unwrap_or(host);
        // A name whose last label is numeric is a badly written address, never a host (RFC 3696 §2).
        let last = name.rsplit('.').next().unwrap_or_default();
        let legal = !name.is_empty()
            && name.len() <= 253
            && name.split('.').all(|label| (1..=63).contains(&label.len()))
            && name
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
            && !last.bytes().all(|b| b.is_ascii_digit());
        if !legal {
            return Err(AuthorityError::Host);
        }
        Ok(Self::Host {
            name: name.to_ascii_lowercase().into(),
            port,
        })
    }
}

impl fmt::Display for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => write!(f, "{address}"),
            Self::Host { name, port } => write!(f, "{name}:{port}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn t20_an_authority_is_an_address_or_a_name_with_a_port() {
        for (text, want) in [
            ("10.0.0.1:80", Authority::Address("10.0.0.1:80".parse().unwrap())),
            (
                "[fd00::1]:65535",
                Authority::Address("[fd00::1]:65535".parse().unwrap()),
            ),
            (
                "Cart.shop.svc.:80",
                Authority::Host {
                    name: "cart.shop.svc".into(),
                    port: 80,
                },
            ),
        ] {
            assert_eq!(text.parse(), Ok(want), "{text}");
        }
        for bad in [
            "",
            ":",
            ":80",
            "cart",
            "10.0.0.1",
            "10.0.0.1:",
            "10.0.0.1:0",
            "10.0.0.1:65536",
            "10.0.0.1:+80",
            "10.0.0.1:8 0",
            "10.0.0.1:-1",
            "user@10.0.0.1:80",
            "user:pass@cart:80",
            "[fd00::1]",
            "[fd00::1:80",
            "fd00::1]:80",
            "[fe80::1%eth0]:80",
            "[::ffff:10.0.0.1]:80",
            "[cart]:80",
            "010.0.0.1:80",
            "10.0.0.256:80",
            "10.1:80",
            "0x7f.1:80",
            "2130706433:80",
            "cart shop:80",
            "cart/x:80",
            "ca\0rt:80",
            "cart\n:80",
            "..:80",
            "a..b:80",
            "ünïcode:80",
            "127.0.0.1:80:80",
        ] {
            assert!(bad.parse::<Authority>().is_err(), "{bad:?}");
        }
        for with_user in ["user@10.0.0.1:80", "user:pass@cart:80"] {
            assert_eq!(with_user.parse::<Authority>(), Err(AuthorityError::UserInfo));
        }
        let long = format!("{}:80", ["a".repeat(63).as_str(); 5].join("."));
        assert!(long.parse::<Authority>().is_err());
    }

    proptest! {
        #[test]
        fn what_is_read_is_written_back(text in "[a-z0-9.:\\[\\]-]{1,40}") {
            if let Ok(authority) = text.parse::<Authority>() {
                prop_assert_eq!(authority.to_string().parse::<Authority>(), Ok(authority));
            }
        }

        #[test]
        fn no_text_makes_the_parser_panic(text in "\\PC{0,80}") {
            let _ = text.parse::<Authority>();
        }
    }
}
