//! The ServerHello of a captured stream: which version and key exchange the server selected.
//!
//! Invariant: only what is in the clear is read; everything after the ServerHello is ciphertext.

/// TLS 1.3 as `supported_versions` names it (RFC 8446 §4.2.1).
pub const TLS13: u16 = 0x0304;
/// The group of draft-ietf-tls-ecdhe-mlkem: X25519 and ML-KEM-768 together.
pub const X25519MLKEM768: u16 = 0x11ec;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ServerHello {
    /// The selected version: of `supported_versions` if there is one, else the legacy field.
    pub version: u16,
    /// The group of the server's key share; `None` when there is no such extension.
    pub group: Option<u16>,
    pub cipher_suite: u16,
    /// Whether a HelloRetryRequest came before.
    pub retried: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NotTls {
    #[error("the server's first bytes are no TLS handshake record")]
    NoHandshake,
    #[error("the server's first bytes end inside its hello")]
    CutShort,
    #[error("the server's first handshake message is of type {0}")]
    NoServerHello(u8),
}

const HANDSHAKE: u8 = 22;
const CHANGE_CIPHER_SPEC: u8 = 20;
const SERVER_HELLO: u8 = 2;

/// `random` of a HelloRetryRequest (RFC 8446 §4.1.3).
const RETRY: [u8; 32] = [
    0xcf, 0x21, 0xad, 0x74, 0xe5, 0x9a, 0x61, 0x11, 0xbe, 0x1d, 0x8c, 0x02, 0x1e, 0x65, 0xb8, 0x91, 0xc2,
    0xa2, 0x11, 0x16, 0x7a, 0xbb, 0x8c, 0x5e, 0x07, 0x9e, 0x09, 0xe2, 0xc8, 0xa8, 0x33, 0x9c,
];

/// Reads the hello that settles the handshake from the first bytes that a server sent.
pub fn server_hello(head: &[u8]) -> Result<ServerHello, NotTls> {
    let handshake = handshake_bytes(head)?;
    let mut messages = Bytes(&handshake);
    let mut retried = false;
    loop {
        let kind = messages.u8()?;
        let length = messages.u24()?;
        let mut body = Bytes(messages.take(length)?);
        if kind != SERVER_HELLO {
            return Err(NotTls::NoServerHello(kind));
        }
        let legacy = body.u16()?;
        let is_retry = body.take(32)? == RETRY;
        let session = usize::from(body.u8()?);
        body.take(session)?;
        let cipher_suite = body.u16()?;
        body.u8()?;
        let (version, group) = extensions(&mut body, legacy)?;
        if !is_retry {
            return Ok(ServerHello {
                version,
                group,
                cipher_suite,
                retried,
            });
        }
        retried = true;
    }
}

fn extensions(body: &mut Bytes<'_>, legacy: u16) -> Result<(u16, Option<u16>), NotTls> {
    let (mut version, mut group) = (legacy, None);
    if body.0.is_empty() {
        return Ok((version, group));
    }
    let length = usize::from(body.u16()?);
    let mut list = Bytes(body.take(length)?);
    while !list.0.is_empty() {
        let kind = list.u16()?;
        let length = usize::from(list.u16()?);
        let mut extension = Bytes(list.take(length)?);
        match kind {
            43 => version = extension.u16()?,
            51 => group = Some(extension.u16()?),
            _ => {}
        }
    }
    Ok((version, group))
}

/// The handshake messages in the clear: records of that type until ciphertext starts.
fn handshake_bytes(head: &[u8]) -> Result<Vec<u8>, NotTls> {
    let mut records = Bytes(head);
    let mut handshake = Vec::new();
    while let Ok(kind) = records.u8() {
        if kind == CHANGE_CIPHER_SPEC && !handshake.is_empty() {
            records.take(4)?;
            records.take(1)?;
            continue;
        }
        if kind != HANDSHAKE {
            break;
        }
        if records.u16().map_err(|_| NotTls::CutShort)? >> 8 != 3 {
            break;
        }
        let length = usize::from(records.u16()?);
        let Ok(fragment) = records.take(length) else { break };
        handshake.extend_from_slice(fragment);
    }
    if handshake.is_empty() {
        Err(NotTls::NoHandshake)
    } else {
        Ok(handshake)
    }
}

struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], NotTls> {
        let (taken, rest) = self.0.split_at_checked(count).ok_or(NotTls::CutShort)?;
        self.0 = rest;
        Ok(taken)
    }

    fn u8(&mut self) -> Result<u8, NotTls> {
        Ok(self.take(1)?[0])
    }

    fn u16(&mut self) -> Result<u16, NotTls> {
        let bytes = self.take(2)?;
        Ok(u16::from_be_bytes([bytes[0], bytes[1]]))
    }

    fn u24(&mut self) -> Result<usize, NotTls> {
        let bytes = self.take(3)?;
        Ok(usize::from(bytes[0]) << 16 | usize::from(bytes[1]) << 8 | usize::from(bytes[2]))
    }
}
