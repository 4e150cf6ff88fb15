//! The servers that the loads talk to: one thread each, as cheap as they can be.
//!
//! ```text
//! listener ─▶ epoll ─▶ Answer { Page: request → page | Byte: what came | Count: bytes, at their end }
//! ```
//! Invariant: a server takes whatever comes and never decides when a load ends; the client does.

use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd};

use anyhow::{Context, Result};
use culvert_e2e::lab::Endpoint;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{MsgFlags, recv};

/// What a client of [`Answer::Page`] sends; the server counts its bytes and does not read them.
pub const REQUEST: &[u8] = b"GET /items/1 HTTP/1.1\r\nhost: cart\r\nuser-agent: bench\r\naccept: */*\r\n\r\n";

/// What it gets for each.
pub const PAGE: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: 64\r\n\r\n\
0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

/// How a server answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// A page for each request.
    Page,
    /// The bytes that came.
    Echo,
    /// The number of bytes that came, as 8 bytes in little endian, at their end.
    Count,
}

/// Starts a server on `port` of `place`; it ends with this process.
pub fn start(place: &Endpoint, port: u16, answer: Answer) -> Result<()> {
    let listener = place.listen(port)?;
    std::thread::Builder::new()
        .name(format!("server-{port}"))
        .spawn(move || {
            if let Err(error) = serve(&listener, answer) {
                eprintln!("bench: the server on port {port} failed: {error:#}");
            }
        })?;
    Ok(())
}

struct Client {
    socket: TcpStream,
    received: u64,
}

const LISTENER: u64 = u64::MAX;

fn serve(listener: &TcpListener, answer: Answer) -> Result<()> {
    listener.set_nonblocking(true)?;
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    epoll.add(listener.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, LISTENER))?;
    let mut clients = HashMap::new();
    let mut events = vec![EpollEvent::empty(); 256];
    let mut block = vec![0; 1 << 20];
    loop {
        let count = epoll.wait(&mut events, EpollTimeout::NONE)?;
        for event in &events[..count] {
            if event.data() == LISTENER {
                accept_all(listener, &epoll, &mut clients)?;
                continue;
            }
            let Some(client) = clients.get_mut(&event.data()) else {
                continue;
            };
            if !client.serve(&mut block, answer) {
                clients.remove(&event.data());
            }
        }
    }
}

fn accept_all(listener: &TcpListener, epoll: &Epoll, clients: &mut HashMap<u64, Client>) -> Result<()> {
    loop {
        match listener.accept() {
            Ok((socket, _)) => {
                socket.set_nonblocking(true)?;
                socket.set_nodelay(true)?;
                let id = u64::try_from(socket.as_raw_fd())?;
                epoll.add(socket.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, id))?;
                clients.insert(id, Client { socket, received: 0 });
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error).context("accept"),
        }
    }
}

impl Client {
    /// Answers what has come; false once the connection has ended.
    fn serve(&mut self, block: &mut [u8], answer: Answer) -> bool {
        let length = if answer == Answer::Count {
            // Bytes that nobody reads need not be copied either.
            match recv(self.socket.as_raw_fd(), block, MsgFlags::MSG_TRUNC) {
                Ok(length) => length,
                Err(nix::Error::EAGAIN) => return true,
                Err(_) => return false,
            }
        } else {
            match self.socket.read(block) {
                Ok(length) => length,
                Err(error) => return error.kind() == ErrorKind::WouldBlock,
            }
        };
        let before = self.received;
        self.received += length as u64;
        match answer {
            Answer::Count if length == 0 => {
                let _ = self.socket.write_all(&self.received.to_le_bytes());
                false
            }
            Answer::Count => true,
            _ if length == 0 => false,
            Answer::Echo => self.socket.write_all(&block[..length]).is_ok(),
            Answer::Page => {
                let request = REQUEST.len() as u64;
                let pages = self.received / request - before / request;
                (0..pages).all(|_| self.socket.write_all(PAGE).is_ok())
            }
        }
    }
}
