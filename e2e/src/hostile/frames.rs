//! HTTP/2 frames and header blocks as bytes (RFC 9113 §4–6, RFC 7541).

/// What a client sends before its first frame.
pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const PRIORITY: u8 = 2;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;
pub const WINDOW_UPDATE: u8 = 8;
pub const CONTINUATION: u8 = 9;

pub const ACK: u8 = 1;
pub const END_STREAM: u8 = 1;
pub const END_HEADERS: u8 = 4;

pub const CANCEL: u32 = 8;
pub const REFUSED_STREAM: u32 = 7;

/// One frame, its payload as it is given.
pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(9 + payload.len());
    bytes.extend_from_slice(&(payload.len() as u32).to_be_bytes()[1..]);
    bytes.extend([kind, flags]);
    bytes.extend_from_slice(&stream.to_be_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

/// A SETTINGS frame with these parameters.
pub fn settings(parameters: &[(u16, u32)]) -> Vec<u8> {
    let mut payload = Vec::new();
    for (name, value) in parameters {
        payload.extend_from_slice(&name.to_be_bytes());
        payload.extend_from_slice(&value.to_be_bytes());
    }
    frame(SETTINGS, 0, 0, &payload)
}

/// A header block of literals that nobody remembers.
pub fn block(fields: &[(&str, &str)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (name, value) in fields {
        bytes.push(0);
        text(&mut bytes, name.as_bytes());
        text(&mut bytes, value.as_bytes());
    }
    bytes
}

/// A request's HEADERS, its head alone.
pub fn headers(stream: u32, fields: &[(&str, &str)]) -> Vec<u8> {
    frame(HEADERS, END_HEADERS, stream, &block(fields))
}

/// The HEADERS of a CONNECT to `authority`.
pub fn connect(stream: u32, authority: &str) -> Vec<u8> {
    headers(stream, &[(":method", "CONNECT"), (":authority", authority)])
}

pub fn reset(stream: u32, code: u32) -> Vec<u8> {
    frame(RST_STREAM, 0, stream, &code.to_be_bytes())
}

pub fn window_update(stream: u32, by: u32) -> Vec<u8> {
    frame(WINDOW_UPDATE, 0, stream, &by.to_be_bytes())
}

/// A string without Huffman coding.
pub fn text(bytes: &mut Vec<u8>, text: &[u8]) {
    integer(bytes, 7, 0, text.len());
    bytes.extend_from_slice(text);
}

/// An integer with a prefix of `bits` bits, `first` in the bits before it.
pub fn integer(bytes: &mut Vec<u8>, bits: u8, first: u8, value: usize) {
    let most = (1 << bits) - 1;
    if value < most {
        return bytes.push(first | value as u8);
    }
    bytes.push(first | most as u8);
    let mut left = value - most;
    while left >= 128 {
        bytes.push(0x80 | (left & 0x7f) as u8);
        left >>= 7;
    }
    bytes.push(left as u8);
}

/// The `:status` that begins a response's header block, as a peer without a dynamic table writes it.
pub fn status(block: &[u8]) -> Option<u16> {
    // A change of the table's size may stand first.
    let start = block.iter().position(|byte| byte & 0xe0 != 0x20)?;
    let (&first, rest) = block[start..].split_first()?;
    if first & 0x80 != 0 {
        const STATIC: [u16; 7] = [200, 204, 206, 304, 400, 404, 500];
        return STATIC.get(usize::from(first & 0x7f).checked_sub(8)?).copied();
    }
    let (&length, value) = rest.split_first()?;
    let value = value.get(..usize::from(length & 0x7f))?;
    if length & 0x80 == 0 {
        return std::str::from_utf8(value).ok()?.parse().ok();
    }
    digits(value)
}

/// Digits in Huffman code: 0 to 2 take five bits, 3 to 9 six (RFC 7541, appendix B).
fn digits(coded: &[u8]) -> Option<u16> {
    let bits: Vec<u8> = coded
        .iter()
        .flat_map(|byte| (0..8).rev().map(move |shift| byte >> shift & 1))
        .collect();
    let (mut at, mut number) = (0, 0u16);
    while bits.len() - at >= 5 {
        let five = bits[at..at + 5].iter().fold(0, |sum, bit| sum << 1 | bit);
        let digit = if five < 3 {
            at += 5;
            five
        } else {
            let Some(sixth) = bits.get(at + 5) else { break };
            at += 6;
            match five << 1 | sixth {
                six @ 0x19..=0x1f => six - 0x19 + 3,
                // The padding, all ones.
                0x3f => break,
                _ => return None,
            }
        };
        number = number.checked_mul(10)?.checked_add(digit.into())?;
    }
    Some(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_is_read_in_every_form() {
        for (block, want) in [
            (&[0x88][..], Some(200)),
            (&[0x20, 0x8c], Some(400)),
            (&[0x08, 3, b'4', b'0', b'1'], Some(401)),
            (&[0x48, 0x82, 0x68, 0x01], Some(401)),
            (&[0x48, 0x83, 0x6c, 0x0c, 0xff], Some(503)),
            (&[], None),
        ] {
            assert_eq!(status(block), want, "{block:x?}");
        }
    }

    #[test]
    fn integers_are_written_as_the_rfc_shows() {
        let mut bytes = Vec::new();
        integer(&mut bytes, 5, 0, 10);
        integer(&mut bytes, 5, 0, 1337);
        assert_eq!(bytes, [10, 31, 154, 10]);
    }
}
