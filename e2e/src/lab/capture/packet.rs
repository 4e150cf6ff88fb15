//! Ethernet, IPv4, IPv6, TCP and UDP headers, as far as a capture needs them.
//!
//! Invariant: any bytes are a packet; what is cut short or unknown has a name and no ports.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

#[derive(Debug)]
pub struct Packet<'a> {
    pub source: Option<IpAddr>,
    pub destination: Option<IpAddr>,
    pub transport: Transport<'a>,
}

#[derive(Debug)]
pub enum Transport<'a> {
    Tcp(Segment<'a>),
    Udp {
        source_port: u16,
        destination_port: u16,
    },
    Arp,
    Icmp,
    /// Neighbour discovery, router and group messages: IPv6's own housekeeping.
    Icmpv6Housekeeping,
    Icmpv6,
    /// A later fragment, whose ports are in the first.
    Fragment,
    Ip(u8),
    Ethernet(u16),
    Malformed,
}

#[derive(Debug, Clone, Copy)]
pub struct Segment<'a> {
    pub source_port: u16,
    pub destination_port: u16,
    pub sequence: u32,
    pub syn: bool,
    pub ack: bool,
    pub rst: bool,
    pub payload: &'a [u8],
}

const TCP: u8 = 6;
const UDP: u8 = 17;

impl<'a> Packet<'a> {
    pub fn parse(frame: &'a [u8]) -> Self {
        let unaddressed = |transport| Self {
            source: None,
            destination: None,
            transport,
        };
        let Some((header, body)) = frame.split_at_checked(14) else {
            return unaddressed(Transport::Malformed);
        };
        match u16::from_be_bytes([header[12], header[13]]) {
            0x0800 => Self::ipv4(body).unwrap_or_else(|| unaddressed(Transport::Malformed)),
            0x86dd => Self::ipv6(body).unwrap_or_else(|| unaddressed(Transport::Malformed)),
            0x0806 => unaddressed(Transport::Arp),
            other => unaddressed(Transport::Ethernet(other)),
        }
    }

    fn ipv4(bytes: &'a [u8]) -> Option<Self> {
        let header_length = usize::from(bytes.first()? & 0x0f) * 4;
        let total = usize::from(be16(bytes, 2)?);
        // Zero is what a packet longer than the field shows.
        let total = if total == 0 {
            bytes.len()
        } else {
            total.min(bytes.len())
        };
        let body = bytes.get(header_length..total)?;
        let fragment_offset = be16(bytes, 6)? & 0x1fff;
        let address = |at: usize| -> Option<IpAddr> {
            let octets: [u8; 4] = bytes.get(at..at + 4)?.try_into().ok()?;
            Some(Ipv4Addr::from(octets).into())
        };
        let transport = if fragment_offset == 0 {
            transport(*bytes.get(9)?, body)
        } else {
            Transport::Fragment
        };
        Some(Self {
            source: Some(address(12)?),
            destination: Some(address(16)?),
            transport,
        })
    }

    fn ipv6(bytes: &'a [u8]) -> Option<Self> {
        let length = usize::from(be16(bytes, 4)?);
        let all = bytes.get(40..)?;
        let mut body = if length == 0 {
            all
        } else {
            all.get(..length.min(all.len()))?
        };
        let address = |at: usize| -> Option<IpAddr> {
            let octets: [u8; 16] = bytes.get(at..at + 16)?.try_into().ok()?;
            Some(Ipv6Addr::from(octets).into())
        };
        let mut next = *bytes.get(6)?;
        let transport = loop {
            match next {
                // Hop-by-hop, routing and destination options say their own length.
                0 | 43 | 60 => {
                    next = *body.first()?;
                    body = body.get((usize::from(*body.get(1)?) + 1) * 8..)?;
                }
                44 => {
                    if be16(body, 2)? & 0xfff8 != 0 {
                        break Transport::Fragment;
                    }
                    next = *body.first()?;
                    body = body.get(8..)?;
                }
                protocol => break transport(protocol, body),
            }
        };
        Some(Self {
            source: Some(address(8)?),
            destination: Some(address(24)?),
            transport,
        })
    }

    /// A name for what it is, with the service's port where there is one.
    pub fn kind(&self) -> String {
        match &self.transport {
            Transport::Tcp(_) => "tcp".to_owned(),
            // The lower port is the one that names the service, in both directions.
            Transport::Udp {
                source_port,
                destination_port,
            } => {
                format!("udp port {}", source_port.min(destination_port))
            }
            Transport::Arp => "arp".to_owned(),
            Transport::Icmp => "icmp".to_owned(),
            Transport::Icmpv6Housekeeping => "icmpv6 housekeeping".to_owned(),
            Transport::Icmpv6 => "icmpv6".to_owned(),
            Transport::Fragment => "ip fragment".to_owned(),
            Transport::Ip(protocol) => format!("ip protocol {protocol}"),
            Transport::Ethernet(kind) => format!("ethernet 0x{kind:04x}"),
            Transport::Malformed => "malformed".to_owned(),
        }
    }
}

impl fmt::Display for Packet<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.kind())?;
        if let (Some(source), Some(destination)) = (self.source, self.destination) {
            write!(f, " {source} -> {destination}")?;
        }
        Ok(())
    }
}

fn transport(protocol: u8, body: &[u8]) -> Transport<'_> {
    match protocol {
        TCP => tcp(body).map_or(Transport::Malformed, Transport::Tcp),
        UDP => match (be16(body, 0), be16(body, 2)) {
            (Some(source_port), Some(destination_port)) => Transport::Udp {
                source_port,
                destination_port,
            },
            _ => Transport::Malformed,
        },
        1 => Transport::Icmp,
        58 => match body.first() {
            Some(130..=137 | 143) => Transport::Icmpv6Housekeeping,
            _ => Transport::Icmpv6,
        },
        other => Transport::Ip(other),
    }
}

fn tcp(body: &[u8]) -> Option<Segment<'_>> {
    let offset = usize::from(body.get(12)? >> 4) * 4;
    let flags = *body.get(13)?;
    Some(Segment {
        source_port: be16(body, 0)?,
        destination_port: be16(body, 2)?,
        sequence: u32::from_be_bytes(body.get(4..8)?.try_into().ok()?),
        syn: flags & 0x02 != 0,
        rst: flags & 0x04 != 0,
        ack: flags & 0x10 != 0,
        payload: body.get(offset..)?,
    })
}

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]))
}
