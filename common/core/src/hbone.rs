//! HBONE: what one connection says to its peer before its bytes flow.
//!
//! ```text
//! Connect ──encode──▶ :method CONNECT, :authority, baggage, forwarded, traceparent ──decode──▶ Connect
//! ```
//! Wire contract: HTTP/2 CONNECT (RFC 9113 §8.5), header names as Istio's ambient mode uses them.
//! Invariant: nothing in a header decides. The peer's identity is what its certificate proves and its
//! address is where it connected from; headers feed telemetry.

mod authority;
mod baggage;
mod connect;
mod forwarded;
mod traceparent;

pub use authority::{Authority, AuthorityError};
pub use baggage::Baggage;
pub use connect::{Connect, ConnectError};
pub use forwarded::Forwarded;
pub use traceparent::Traceparent;
