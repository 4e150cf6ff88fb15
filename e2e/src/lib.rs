//! Culvert end to end: what the demo, the mesh tests and the mesh bench stand on.
//!
//! ```text
//! lab            nodes, pods and hosts as network namespaces of this machine; wires, faults, captures
//! mesh           real control, agents and ztunnels in a lab
//! hostile        a peer with a stolen SVID that writes TLS and HTTP/2 as it likes
//! load           load with an account of every attempt and stream
//! oracles        the steady load of the fault catalogue, and the four oracles that judge it
//! prerequisites  programs of others, found or fetched
//! traffic        servers and clients where no program of others says enough
//! ```
#![forbid(unsafe_code)]

pub mod hostile;
pub mod lab;
pub mod load;
pub mod mesh;
pub mod oracles;
pub mod prerequisites;
pub mod traffic;
