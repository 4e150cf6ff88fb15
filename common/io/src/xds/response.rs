//! Responses, as the client reads them.
//!
//! The first response may list a whole mesh. Invariant: its resources stay the bytes that came until each is
//! applied, one at a time; a hundred thousand of them decoded at once would take three times the memory.

use bytes::Bytes;
use http::uri::PathAndQuery;

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
}

#[cfg(test)]
impl From<culvert_proto::discovery::DeltaDiscoveryResponse> for Response {
    fn from(whole: culvert_proto::discovery::DeltaDiscoveryResponse) -> Self {
        use prost::Message;
        Self::decode(whole.encode_to_vec().as_slice()).expect("the same message, field by field")
    }
}
