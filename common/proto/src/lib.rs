//! Protobuf messages of the mesh's wire contracts, generated from `proto/` and committed.
//!
//! Invariant: nothing here decides. These types stop at the decoder of whoever receives them; inside,
//! `culvert-core` has checked types of its own. `tests/generated.rs` proves that the committed code is
//! what the `.proto` files say; run it with `CULVERT_REGENERATE=1` to write the code anew.

#![forbid(unsafe_code)]
#![allow(clippy::all, rustdoc::all)]

mod google {
    pub mod rpc {
        include!("generated/google.rpc.rs");
    }
}
mod envoy {
    pub mod service {
        pub mod discovery {
            pub mod v3 {
                include!("generated/envoy.service.discovery.v3.rs");
            }
        }
    }
}
mod istio {
    pub mod workload {
        include!("generated/istio.workload.rs");
    }
    pub mod security {
        include!("generated/istio.security.rs");
    }
    pub mod v1 {
        pub mod auth {
            include!("generated/istio.v1.auth.rs");
        }
    }
}
mod culvert {
    pub mod mesh {
        pub mod v1 {
            include!("generated/culvert.mesh.v1.rs");
        }
    }
    pub mod node {
        pub mod v1 {
            include!("generated/culvert.node.v1.rs");
        }
    }
    pub mod agent {
        pub mod v1 {
            include!("generated/culvert.agent.v1.rs");
        }
    }
}

/// Agent and ztunnel (`culvert.agent.v1`).
pub use culvert::agent::v1 as agent;
/// Culvert's own discovery types (`culvert.mesh.v1`).
pub use culvert::mesh::v1 as mesh;
/// Agent and control (`culvert.node.v1`).
pub use culvert::node::v1 as node;
/// Delta ADS (`envoy.service.discovery.v3`).
pub use envoy::service::discovery::v3 as discovery;
/// `google.rpc.Status`.
pub use google::rpc;
/// L4 authorization (`istio.security`).
pub use istio::security;
/// Certificate signing (`istio.v1.auth`).
pub use istio::v1::auth as ca;
/// Workload discovery (`istio.workload`).
pub use istio::workload;

/// Type URLs of the resources on an ADS stream.
pub mod type_url {
    pub const ADDRESS: &str = "type.googleapis.com/istio.workload.Address";
    pub const AUTHORIZATION: &str = "type.googleapis.com/istio.security.Authorization";
    pub const MESH_CONFIG: &str = "type.googleapis.com/culvert.mesh.v1.MeshConfig";
    pub const OUTBOUND_POLICY: &str = "type.googleapis.com/culvert.mesh.v1.OutboundPolicy";
}
