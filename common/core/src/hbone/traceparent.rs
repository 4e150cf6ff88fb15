//! `traceparent` (W3C Trace Context, version 00).

use http::HeaderValue;
use std::fmt;

/// A trace and parent id; the tunnel's own carry flags 00.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Traceparent {
    trace: [u8; 16],
    parent: [u8; 8],
    flags: u8,
}

impl Traceparent {
    /// From random bytes of the caller's; all zeros are not a legal id, so the last bit is set.
    pub fn new(trace: [u8; 16], parent: [u8; 8]) -> Self {
        let (mut trace, mut parent) = (trace, parent);
        trace[15] |= 1;
        parent[7] |= 1;
        Self {
            trace,
            parent,
            flags: 0,
        }
    }

    /// Reads a value of exactly 55 characters; anything else is none, and the reader makes a fresh one.
    pub fn decode(value: &HeaderValue) -> Option<Self> {
        let text = value.as_bytes();
        if text.len() != 55 || &text[..3] != b"00-" || text[35] != b'-' || text[52] != b'-' {
            return None;
        }
        let (mut trace, mut parent, mut flags) = ([0; 16], [0; 8], [0; 1]);
        unhex(&text[3..35], &mut trace)?;
        unhex(&text[36..52], &mut parent)?;
        unhex(&text[53..55], &mut flags)?;
        let zero = trace == [0; 16] || parent == [0; 8];
        (!zero).then_some(Self {
            trace,
            parent,
            flags: flags[0],
        })
    }

    /// The trace alone, for a log.
    pub fn trace_id(&self) -> impl fmt::Display {
        TraceId(self.trace)
    }

    pub fn encode(&self) -> HeaderValue {
        // Hexadecimal digits and dashes are always a legal value.
        HeaderValue::try_from(self.to_string()).unwrap_or_else(|_| HeaderValue::from_static(""))
    }
}

/// Lower-case hexadecimal, as the recommendation demands.
fn unhex(text: &[u8], into: &mut [u8]) -> Option<()> {
    let digit = |b: u8| match b {
        b'0'..=b'9' => Some(b - b'0'),
        b'a'..=b'f' => Some(b - b'a' + 10),
        _ => None,
    };
    for (pair, byte) in text.chunks_exact(2).zip(into) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(())
}

/// Sixteen bytes as 32 hexadecimal digits.
struct TraceId([u8; 16]);

impl fmt::Display for TraceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

impl fmt::Display for Traceparent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (trace, parent) = (self.trace_id(), u64::from_be_bytes(self.parent));
        write!(f, "00-{trace}-{parent:016x}-{:02x}", self.flags)
    }
}

impl fmt::Debug for Traceparent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_read_as_it_is_written_and_odd_ones_are_none() {
        let own = Traceparent::new([7; 16], [9; 8]);
        assert_eq!(Traceparent::decode(&own.encode()), Some(own));
        let good = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        assert_eq!(
            Traceparent::decode(&HeaderValue::from_static(good))
                .unwrap()
                .to_string(),
            good
        );
        for bad in [
            "",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-0",
            "01-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-0AF7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
            "00_0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        ] {
            assert_eq!(Traceparent::decode(&HeaderValue::from_static(bad)), None, "{bad}");
        }
    }
}
