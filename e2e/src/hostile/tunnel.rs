//! A tunnel of which every byte is the test's own.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustls::{ClientConfig, ClientConnection, StreamOwned};
use rustls_pki_types::ServerName;

use super::Svid;
use super::frames::{self, ACK, DATA, GOAWAY, HEADERS, PING, PREFACE, RST_STREAM, SETTINGS};
use crate::lab::Endpoint;

/// How long the peer may take for a handshake, and to take what is written.
const WAIT: Duration = Duration::from_secs(10);

/// How often a wait looks whether it is over.
const TICK: Duration = Duration::from_millis(20);

/// What became of a stream, or of the whole tunnel before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    Status(u16),
    /// RST_STREAM with this code.
    Reset(u32),
    /// GOAWAY with this code.
    GoAway(u32),
    /// The connection ended without a word.
    Closed,
    /// Nothing came in time.
    Silence,
}

impl Answer {
    /// Whether the peer refused: anything but an acceptance or a shrug.
    pub fn is_refusal(self) -> bool {
        !matches!(self, Self::Status(200) | Self::Silence)
    }
}

/// The dialling end of a tunnel.
pub struct Tunnel {
    tls: StreamOwned<ClientConnection, TcpStream>,
    read: Vec<u8>,
    answers: BTreeMap<u32, Answer>,
    ends: BTreeMap<u32, u32>,
    data: BTreeMap<u32, Vec<u8>>,
    goaway: Option<u32>,
    ended: bool,
    /// Whether SETTINGS and PING are acknowledged.
    pub polite: bool,
    /// Kinds of frames received, with their numbers.
    pub received: BTreeMap<u8, u64>,
}

impl Tunnel {
    /// TLS, preface and SETTINGS (no dynamic table, so that statuses are plain to read).
    pub fn open(from: &Endpoint, to: SocketAddr, svid: &Svid) -> Result<Self> {
        let mut tunnel = Self::shake_hands(from, to, svid.client()?)?;
        tunnel.write(PREFACE)?;
        tunnel.write(&frames::settings(&[(1, 0)]))?;
        Ok(tunnel)
    }

    /// TLS alone.
    pub fn shake_hands(from: &Endpoint, to: SocketAddr, config: ClientConfig) -> Result<Self> {
        let socket = from.connect_within(to, WAIT)?;
        socket.set_nodelay(true)?;
        socket.set_write_timeout(Some(WAIT))?;
        socket.set_read_timeout(Some(WAIT))?;
        let name = ServerName::try_from("unused.example")?;
        let mut connection = ClientConnection::new(Arc::new(config), name)?;
        let mut socket = socket;
        while connection.is_handshaking() {
            connection.complete_io(&mut socket).context("TLS handshake")?;
        }
        Ok(Self {
            tls: StreamOwned::new(connection, socket),
            read: Vec::new(),
            answers: BTreeMap::new(),
            ends: BTreeMap::new(),
            data: BTreeMap::new(),
            goaway: None,
            ended: false,
            polite: true,
            received: BTreeMap::new(),
        })
    }

    pub fn session(&self) -> &ClientConnection {
        &self.tls.conn
    }

    pub fn socket(&self) -> &TcpStream {
        &self.tls.sock
    }

    pub fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.tls.write_all(bytes)?;
        self.tls.flush()
    }

    /// Opens a stream by a CONNECT to `authority` and waits for its answer.
    pub fn connect(&mut self, stream: u32, authority: &str) -> Answer {
        self.ask(stream, &frames::connect(stream, authority))
    }

    /// Writes a request and waits for the answer of its stream.
    pub fn ask(&mut self, stream: u32, request: &[u8]) -> Answer {
        // The answer says more than a broken pipe.
        let _ = self.write(request);
        self.answer(stream, WAIT)
    }

    /// The first answer of a stream.
    pub fn answer(&mut self, stream: u32, within: Duration) -> Answer {
        self.pump(within, |tunnel| tunnel.answers.contains_key(&stream));
        if let Some(answer) = self.answers.get(&stream) {
            return *answer;
        }
        match (self.goaway, self.ended) {
            (Some(code), _) => Answer::GoAway(code),
            (None, true) => Answer::Closed,
            (None, false) => Answer::Silence,
        }
    }

    /// How the whole tunnel ended, if it does in time.
    pub fn end(&mut self, within: Duration) -> Answer {
        self.pump(within, |tunnel| tunnel.goaway.is_some());
        match (self.goaway, self.ended) {
            (Some(code), _) => Answer::GoAway(code),
            (None, true) => Answer::Closed,
            (None, false) => Answer::Silence,
        }
    }

    /// The streams that have an answer.
    pub fn answers(&self) -> &BTreeMap<u32, Answer> {
        &self.answers
    }

    /// The code with which an accepted stream was reset.
    pub fn reset_code(&self, stream: u32) -> Option<u32> {
        self.ends.get(&stream).copied()
    }

    /// What came on a stream so far.
    pub fn data(&self, stream: u32) -> &[u8] {
        self.data.get(&stream).map_or(&[], Vec::as_slice)
    }

    /// The code of the last GOAWAY.
    pub fn goaway(&self) -> Option<u32> {
        self.goaway
    }

    pub fn is_ended(&self) -> bool {
        self.ended
    }

    pub fn is_over(&self) -> bool {
        self.ended || self.goaway.is_some()
    }

    /// Reads what comes until `enough`, the tunnel's end, or the deadline.
    pub fn pump(&mut self, within: Duration, enough: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + within;
        while !self.ended && !enough(self) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            self.read_for(left.min(TICK));
        }
    }

    /// Takes what has come already, so that the peer's writes do not block ours.
    pub fn drain(&mut self) {
        self.read_for(Duration::from_millis(1));
    }

    fn read_for(&mut self, wait: Duration) {
        let _ = self.tls.sock.set_read_timeout(Some(wait));
        // Read apart from writing: what the peer said last is of interest when nothing can be written to it.
        match self.tls.conn.read_tls(&mut self.tls.sock) {
            Ok(0) => self.ended = true,
            Ok(_) if self.tls.conn.process_new_packets().is_ok() => {}
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Ok(_) | Err(_) => self.ended = true,
        }
        let mut block = [0; 16 << 10];
        while let Ok(length @ 1..) = self.tls.conn.reader().read(&mut block) {
            self.read.extend_from_slice(&block[..length]);
        }
        while let Some(frame) = self.take_frame() {
            self.note(frame);
        }
    }

    fn take_frame(&mut self) -> Option<(u8, u8, u32, Vec<u8>)> {
        let head: [u8; 9] = self.read.get(..9)?.try_into().ok()?;
        let length = usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2]);
        let payload = self.read.get(9..9 + length)?.to_vec();
        self.read.drain(..9 + length);
        let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
        Some((head[3], head[4], stream, payload))
    }

    fn note(&mut self, (kind, flags, stream, payload): (u8, u8, u32, Vec<u8>)) {
        *self.received.entry(kind).or_default() += 1;
        let code = |at: usize| {
            payload
                .get(at..at + 4)
                .and_then(|bytes| bytes.try_into().ok())
                .map_or(0, u32::from_be_bytes)
        };
        match kind {
            HEADERS => {
                let status = frames::status(&payload).unwrap_or(0);
                self.answers.entry(stream).or_insert(Answer::Status(status));
            }
            DATA => self.data.entry(stream).or_default().extend_from_slice(&payload),
            RST_STREAM => {
                let code = code(0);
                self.answers.entry(stream).or_insert(Answer::Reset(code));
                self.ends.insert(stream, code);
            }
            GOAWAY => self.goaway = Some(code(4)),
            SETTINGS | PING if flags & ACK == 0 && self.polite => {
                let payload = if kind == PING { &payload[..] } else { &[] };
                // A peer that has gone needs no acknowledgement.
                let _ = self.write(&frames::frame(kind, ACK, 0, payload));
            }
            _ => {}
        }
    }
}
