//! The head of an HBONE request.

use super::{Authority, AuthorityError, Baggage, Forwarded, Traceparent};
use http::{HeaderMap, Method, Request, StatusCode, request};

/// A CONNECT for one user connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Connect {
    pub authority: Authority,
    pub baggage: Baggage,
    pub forwarded: Forwarded,
    pub traceparent: Option<Traceparent>,
}

/// Why a request is no CONNECT of ours.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConnectError {
    #[error("method {0} is not CONNECT")]
    Method(Method),
    #[error("no authority")]
    NoAuthority,
    #[error("a CONNECT has no scheme and no path")]
    SchemeOrPath,
    #[error("authority: {0}")]
    Authority(#[from] AuthorityError),
}

impl ConnectError {
    /// What the peer is told.
    pub fn status(&self) -> StatusCode {
        StatusCode::BAD_REQUEST
    }
}

impl Connect {
    /// Reads the head of an HBONE request: an HTTP/2 CONNECT (RFC 9113 §8.5) for `:authority`.
    pub fn decode(head: &request::Parts) -> Result<Self, ConnectError> {
        if head.method != Method::CONNECT {
            return Err(ConnectError::Method(head.method.clone()));
        }
        if head.uri.scheme().is_some() || !matches!(head.uri.path(), "" | "/") || head.uri.query().is_some() {
            return Err(ConnectError::SchemeOrPath);
        }
        let authority = head.uri.authority().ok_or(ConnectError::NoAuthority)?;
        Ok(Self {
            authority: authority.as_str().parse()?,
            baggage: Baggage::decode(&head.headers),
            forwarded: head
                .headers
                .get("forwarded")
                .map(Forwarded::decode)
                .unwrap_or_default(),
            traceparent: head.headers.get("traceparent").and_then(Traceparent::decode),
        })
    }

    /// The request that asks for this.
    pub fn encode(&self) -> Result<Request<()>, http::Error> {
        let mut request = Request::connect(self.authority.to_string())
            .version(http::Version::HTTP_2)
            .body(())?;
        let headers: &mut HeaderMap = request.headers_mut();
        if let Some(baggage) = self.baggage.encode() {
            headers.insert("baggage", baggage);
        }
        if let Some(forwarded) = self.forwarded.encode() {
            headers.insert("forwarded", forwarded);
        }
        if let Some(traceparent) = &self.traceparent {
            headers.insert("traceparent", traceparent.encode());
        }
        Ok(request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn connect(authority: &str) -> Connect {
        Connect {
            authority: authority.parse().unwrap(),
            baggage: Baggage {
                namespace: Some("shop".into()),
                ..Baggage::default()
            },
            forwarded: Forwarded {
                source: Some("10.0.0.1:999".parse().unwrap()),
                host: None,
            },
            traceparent: Some(Traceparent::new([1; 16], [2; 8])),
        }
    }

    #[test]
    fn what_is_asked_is_what_is_read() {
        for authority in ["10.0.0.1:80", "[fd00::1]:8080", "cart.shop.svc.cluster.local:80"] {
            let asked = connect(authority);
            let (head, ()) = asked.encode().unwrap().into_parts();
            assert_eq!(Connect::decode(&head), Ok(asked), "{authority}");
        }
    }

    #[test]
    fn t23_only_a_plain_connect_with_an_authority_is_taken() {
        let head = |method: &str, uri: &str| {
            Request::builder()
                .method(method)
                .uri(uri)
                .body(())
                .unwrap()
                .into_parts()
                .0
        };
        assert_eq!(
            Connect::decode(&head("GET", "http://10.0.0.1:80/")),
            Err(ConnectError::Method(Method::GET))
        );
        assert_eq!(
            Connect::decode(&head("POST", "http://10.0.0.1:80/")),
            Err(ConnectError::Method(Method::POST))
        );
        assert_eq!(
            Connect::decode(&head("CONNECT", "http://10.0.0.1:80/x")),
            Err(ConnectError::SchemeOrPath)
        );
        assert_eq!(
            Connect::decode(&head("CONNECT", "/x")),
            Err(ConnectError::SchemeOrPath)
        );
        assert_eq!(
            Connect::decode(&head("CONNECT", "10.0.0.1")),
            Err(AuthorityError::NoPort.into())
        );
        assert_eq!(ConnectError::NoAuthority.status(), StatusCode::BAD_REQUEST);
    }
}
