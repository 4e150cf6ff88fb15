//! Culvert end to end: what the demo, the mesh tests and the mesh bench stand on.
//!
//! ```text
//! lab    nodes, pods and hosts as network namespaces of this machine; wires, faults, captures
//! ```
#![forbid(unsafe_code)]

pub mod lab;
