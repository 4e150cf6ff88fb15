//! Protobuf messages of the mesh's wire contracts, generated from `proto/` and committed.
//!
//! Invariant: nothing here decides. These types stop at the decoder of whoever receives them; inside,
//! `culvert-core` has checked types of its own. `tests/generated.rs` proves that the committed code is
//! what the `.proto` files say; run it with `CULVERT_REGENERATE=1` to write the code anew.

#![forbid(unsafe_code)]
#![allow(clippy::all, rustdoc::all)]

/// Delta ADS (`envoy.service.discovery.v3`).
pub mod discovery {
    include!("generated/envoy.service.discovery.v3.rs");
}
/// Workload discovery (`istio.workload`).
pub mod workload {
    include!("generated/istio.workload.rs");
}
/// L4 authorization (`istio.security`).
pub mod security {
    include!("generated/istio.security.rs");
}
/// Certificate signing (`istio.v1.auth`).
pub mod ca {
    include!("generated/istio.v1.auth.rs");
}
/// Culvert's own discovery types (`culvert.mesh.v1`).
pub mod mesh {
    include!("generated/culvert.mesh.v1.rs");
}
/// Agent and control (`culvert.node.v1`).
pub mod node {
    include!("generated/culvert.node.v1.rs");
}
/// Agent and ztunnel (`culvert.agent.v1`).
pub mod agent {
    include!("generated/culvert.agent.v1.rs");
}
/// `google.rpc.Status`.
pub mod rpc {
    include!("generated/google.rpc.rs");
}

/// Type URLs of the resources on an ADS stream.
pub mod type_url {
    pub const ADDRESS: &str = "type.googleapis.com/istio.workload.Address";
    pub const AUTHORIZATION: &str = "type.googleapis.com/istio.security.Authorization";
    pub const MESH_CONFIG: &str = "type.googleapis.com/culvert.mesh.v1.MeshConfig";
    pub const OUTBOUND_POLICY: &str = "type.googleapis.com/culvert.mesh.v1.OutboundPolicy";
}
