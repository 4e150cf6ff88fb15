//! Responses, as the client reads them.
//!
//! The first response may list a whole mesh. Invariant: its resources stay the bytes that came until each is
//! applied, one at a time; a hundred thousand of them decoded at once would take three times the memory.

use bytes::Bytes;
use culvert_proto::discovery::ControlPlane;
use http::uri::PathAndQuery;
use std::time::{Duration, SystemTime};

/// The method that answers with [`Response`].
pub fn method() -> PathAndQuery {
    PathAndQuery::from_static(
        "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources",
    )
}

/// `envoy.service.discovery.v3.DeltaDiscoveryResponse`, its resources not yet decoded.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Response {
    #[prost(string, tag = "1")]
    pub system_version_info: String,
    /// Each an `envoy.service.discovery.v3.Resource`.
    #[prost(bytes = "bytes", repeated, tag = "2")]
    pub resources: Vec<Bytes>,
    #[prost(string, tag = "4")]
    pub type_url: String,
    #[prost(string, tag = "5")]
    pub nonce: String,
    #[prost(string, repeated, tag = "6")]
    pub removed_resources: Vec<String>,
    #[prost(message, optional, tag = "7")]
    pub control_plane: Option<ControlPlane>,
}

impl Response {
    /// When control published the change that this pushes; none if it answers a question.
    pub fn published(&self) -> Option<SystemTime> {
        let control = self.control_plane.as_ref()?;
        let (_, milliseconds) = control.identifier.rsplit_once("published=")?;
        SystemTime::UNIX_EPOCH.checked_add(Duration::from_millis(milliseconds.parse().ok()?))
    }
}

#[cfg(test)]
impl From<culvert_proto::discovery::DeltaDiscoveryResponse> for Response {
    fn from(whole: culvert_proto::discovery::DeltaDiscoveryResponse) -> Self {
        use prost::Message;
        Self::decode(whole.encode_to_vec().as_slice()).expect("the same message, field by field")
    }
}
