//! What control says about the node and its pods, checked.
//!
//! Invariant: inside the agent an address is an address and a port a port; what does not parse is refused
//! here, whole, and the last order stands.

use culvert_proto::node;
use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use std::{net::IpAddr, time::Duration};

/// Most resolvers of a cluster: each needs two listeners in every pod, and one message carries them all.
pub const MAX_RESOLVERS: usize = 16;

/// How control wants a pod to be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct PodOrder {
    pub enrolled: bool,
    pub spiffe_id: String,
    pub service_account: String,
    pub workload_uid: String,
    pub probe_ports: Vec<u16>,
    pub exclude_inbound_ports: Vec<u16>,
    pub exclude_outbound_ports: Vec<u16>,
    pub exclude_outbound_nets: Vec<IpNet>,
    pub refuse_plaintext: bool,
    /// The pod's namespace as a whole takes no part in the mesh.
    pub namespace_apart: bool,
}

/// What holds for all pods of the node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct Settings {
    pub resolvers: Vec<IpAddr>,
    pub mesh_nets: Vec<IpNet>,
    pub refuse_other_traffic: bool,
    pub enrolment_grace: Duration,
}

/// Why an order is not taken.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum OrderError {
    #[error("{0} bytes are no address")]
    Address(usize),
    #[error("{0} is no port")]
    Port(u32),
    #[error("a prefix of {0} bits does not fit its address")]
    Prefix(u32),
    #[error("{0} resolvers; at most {MAX_RESOLVERS} are possible")]
    Resolvers(usize),
}

/// An address from 4 or 16 bytes.
pub fn address(bytes: &[u8]) -> Result<IpAddr, OrderError> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Ok(v4.into());
    }
    match <[u8; 16]>::try_from(bytes) {
        Ok(v6) => Ok(v6.into()),
        Err(_) => Err(OrderError::Address(bytes.len())),
    }
}

/// An address as the wire has it: 4 or 16 bytes.
pub fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

/// A port from the wire's wider number.
pub fn port(number: u32) -> Result<u16, OrderError> {
    match u16::try_from(number) {
        Ok(port) if port != 0 => Ok(port),
        _ => Err(OrderError::Port(number)),
    }
}

fn net(cidr: &node::Cidr) -> Result<IpNet, OrderError> {
    let prefix = OrderError::Prefix(cidr.length);
    let Ok(length) = u8::try_from(cidr.length) else {
        return Err(prefix);
    };
    Ok(IpNet::new(address(&cidr.address)?, length)
        .map_err(|_| prefix)?
        .trunc())
}

fn ports(numbers: &[u32]) -> Result<Vec<u16>, OrderError> {
    numbers.iter().map(|number| port(*number)).collect()
}

impl TryFrom<&node::PodOrder> for PodOrder {
    type Error = OrderError;

    fn try_from(order: &node::PodOrder) -> Result<Self, OrderError> {
        let exclusions = order.exclusions.clone().unwrap_or_default();
        Ok(Self {
            enrolled: order.enrolled,
            spiffe_id: order.spiffe_id.clone(),
            service_account: order.service_account.clone(),
            workload_uid: order.workload_uid.clone(),
            probe_ports: ports(&order.probe_ports)?,
            exclude_inbound_ports: ports(&exclusions.inbound_ports)?,
            exclude_outbound_ports: ports(&exclusions.outbound_ports)?,
            exclude_outbound_nets: exclusions
                .outbound_cidrs
                .iter()
                .map(net)
                .collect::<Result<_, _>>()?,
            refuse_plaintext: order.refuse_plaintext,
            namespace_apart: order.namespace_apart,
        })
    }
}

impl TryFrom<&node::NodeSettings> for Settings {
    type Error = OrderError;

    fn try_from(settings: &node::NodeSettings) -> Result<Self, OrderError> {
        if settings.resolvers.len() > MAX_RESOLVERS {
            return Err(OrderError::Resolvers(settings.resolvers.len()));
        }
        Ok(Self {
            resolvers: settings
                .resolvers
                .iter()
                .map(|ip| address(ip))
                .collect::<Result<_, _>>()?,
            mesh_nets: settings.mesh_ranges.iter().map(net).collect::<Result<_, _>>()?,
            refuse_other_traffic: settings.refuse_other_traffic,
            enrolment_grace: Duration::from_secs(settings.enrolment_grace_seconds.into()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_parse_is_refused_whole() {
        let cidr = |address: &[u8], length| node::Cidr {
            address: address.to_vec(),
            length,
        };
        let settings = |range| node::NodeSettings {
            mesh_ranges: vec![range],
            ..Default::default()
        };
        for (range, want) in [
            (cidr(&[10, 1, 2, 3], 16), Ok("10.1.0.0/16")),
            (cidr(&[10, 1, 2, 3], 33), Err(OrderError::Prefix(33))),
            (cidr(&[10, 1, 2, 3], 256 + 8), Err(OrderError::Prefix(264))),
            (cidr(&[10, 1, 2], 8), Err(OrderError::Address(3))),
        ] {
            let got = Settings::try_from(&settings(range)).map(|s| s.mesh_nets[0].to_string());
            assert_eq!(got, want.map(str::to_owned));
        }
        for (number, want) in [
            (0, Err(OrderError::Port(0))),
            (80, Ok(80)),
            (65536, Err(OrderError::Port(65536))),
        ] {
            assert_eq!(port(number), want);
        }
        let many = node::NodeSettings {
            resolvers: vec![vec![10, 0, 0, 1]; 17],
            ..Default::default()
        };
        assert_eq!(Settings::try_from(&many), Err(OrderError::Resolvers(17)));
    }
}
