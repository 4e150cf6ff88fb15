//! The socket between `ztunnel-agent` and `ztunnel`: one protobuf message per packet, with descriptors.
//!
//! Invariant: a packet is taken whole or refused. Descriptors that came with a refused packet are closed,
//! and a peer that sends one is no peer of ours: the caller ends the connection.

use crate::sys::{MAX_FDS, accept, recv_with_fds, send_with_fds};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, getsockopt, listen, socket, sockopt,
};
use prost::Message;
use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::Path,
};
use tokio::io::{Interest, unix::AsyncFd};

/// Version of the messages; both ends speak the same.
pub const VERSION: u32 = 1;

/// Most bytes of a packet.
pub const MAX_PACKET: usize = 64 * 1024;

/// Why a packet is not taken.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    #[error("agent socket: {0}")]
    Io(#[from] io::Error),
    #[error("agent socket: packet is not the message expected: {0}")]
    Decode(#[from] prost::DecodeError),
    #[error("agent socket: message of {0} bytes; at most {MAX_PACKET} are allowed")]
    TooLong(usize),
    #[error("agent socket: {0} descriptors; at most {MAX_FDS} are allowed")]
    TooManyFds(usize),
}

impl From<nix::Error> for SocketError {
    fn from(error: nix::Error) -> Self {
        Self::Io(error.into())
    }
}

/// One end of a connection.
#[derive(Debug)]
pub struct Channel(AsyncFd<OwnedFd>);

/// The user at the other end, as the kernel vouches for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    pub uid: u32,
    pub pid: i32,
}

impl Channel {
    /// Takes over a connected `SOCK_SEQPACKET` socket. Needs a tokio runtime.
    pub fn new(socket: OwnedFd) -> Result<Self, SocketError> {
        nix::fcntl::fcntl(
            &socket,
            nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK),
        )?;
        let interest = Interest::READABLE | Interest::WRITABLE;
        Ok(Self(crate::sys::register(socket, interest)?))
    }

    /// Connects to a listening socket.
    pub fn connect(path: &Path) -> Result<Self, SocketError> {
        let socket = seqpacket()?;
        connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
        Self::new(socket)
    }

    pub fn peer(&self) -> Result<Peer, SocketError> {
        let credentials = getsockopt(self.0.get_ref(), sockopt::PeerCredentials)?;
        Ok(Peer {
            uid: credentials.uid(),
            pid: credentials.pid(),
        })
    }

    /// Sends one message; waits while the peer's queue is full. Cancel safe: it is sent whole or not.
    pub async fn send(&self, message: &impl Message, fds: &[BorrowedFd<'_>]) -> Result<(), SocketError> {
        self.send_bytes(&message.encode_to_vec(), fds).await
    }

    /// Sends one packet as it is.
    pub async fn send_bytes(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), SocketError> {
        if bytes.len() > MAX_PACKET {
            return Err(SocketError::TooLong(bytes.len()));
        }
        if fds.len() > MAX_FDS {
            return Err(SocketError::TooManyFds(fds.len()));
        }
        let send = |socket: &OwnedFd| send_with_fds(socket.as_fd(), bytes, fds);
        Ok(self.0.async_io(Interest::WRITABLE, send).await?)
    }

    /// Receives one message, or none when the peer has closed. Cancel safe.
    pub async fn recv<M: Message + Default>(&self) -> Result<Option<(M, Vec<OwnedFd>)>, SocketError> {
        match self.recv_bytes().await? {
            Some((bytes, fds)) => Ok(Some((M::decode(bytes.as_slice())?, fds))),
            None => Ok(None),
        }
    }

    /// Receives one packet as it is.
    pub async fn recv_bytes(&self) -> Result<Option<(Vec<u8>, Vec<OwnedFd>)>, SocketError> {
        let mut buffer = vec![0; MAX_PACKET];
        let (length, fds) = self
            .0
            .async_io(Interest::READABLE, |socket| {
                recv_with_fds(socket.as_fd(), &mut buffer)
            })
            .await?;
        if length == 0 && fds.is_empty() {
            return Ok(None);
        }
        buffer.truncate(length);
        Ok(Some((buffer, fds)))
    }
}

/// A listening socket on a path, made anew.
#[derive(Debug)]
pub struct Listener(AsyncFd<OwnedFd>);

impl Listener {
    /// Listens on `path`, replacing a socket that an earlier process left there.
    pub fn bind(path: &Path) -> Result<Self, SocketError> {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
        let socket = seqpacket()?;
        bind(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
        listen(&socket, Backlog::new(16)?)?;
        nix::fcntl::fcntl(
            &socket,
            nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK),
        )?;
        Ok(Self(crate::sys::register(socket, Interest::READABLE)?))
    }

    /// The next connection.
    pub async fn accept(&self) -> Result<Channel, SocketError> {
        let accepted = self
            .0
            .async_io(Interest::READABLE, |socket| accept(socket.as_fd()))
            .await?;
        Channel::new(accepted)
    }
}

fn seqpacket() -> Result<OwnedFd, SocketError> {
    Ok(socket(
        AddressFamily::Unix,
        SockType::SeqPacket,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use culvert_proto::agent::{FromZtunnel, Ready, WantSockets, from_ztunnel};
    use nix::sys::socket::socketpair;

    fn pair() -> (Channel, Channel) {
        let (a, b) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )
        .unwrap();
        (Channel::new(a).unwrap(), Channel::new(b).unwrap())
    }

    fn want(uid: &str) -> FromZtunnel {
        let message = from_ztunnel::Message::WantSockets(WantSockets {
            uid: uid.into(),
            count: 64,
            ..Default::default()
        });
        FromZtunnel {
            message: Some(message),
        }
    }

    #[tokio::test]
    async fn messages_keep_their_bounds_and_their_descriptors() {
        let (a, b) = pair();
        let file = std::fs::File::open("/dev/null").unwrap();
        a.send(&want("one"), &[file.as_fd()]).await.unwrap();
        a.send(
            &FromZtunnel {
                message: Some(from_ztunnel::Message::Ready(Ready {})),
            },
            &[],
        )
        .await
        .unwrap();
        let (first, fds) = b.recv::<FromZtunnel>().await.unwrap().unwrap();
        assert_eq!((first, fds.len()), (want("one"), 1));
        let (second, fds) = b.recv::<FromZtunnel>().await.unwrap().unwrap();
        assert!(matches!(second.message, Some(from_ztunnel::Message::Ready(_))) && fds.is_empty());
        drop(a);
        assert!(b.recv::<FromZtunnel>().await.unwrap().is_none());
    }

    #[tokio::test]
    async fn f65_garbage_is_an_error_and_never_a_panic() {
        let (a, b) = pair();
        for seed in 0..500u32 {
            let length = (seed * 37 % 300 + 1) as usize;
            let bytes: Vec<u8> = (0..length as u32)
                .map(|i| (i.wrapping_mul(seed ^ 0x9e37) >> 3) as u8)
                .collect();
            a.send_bytes(&bytes, &[]).await.unwrap();
            let _ = b.recv::<FromZtunnel>().await;
        }
        assert!(matches!(
            a.send_bytes(&vec![0; MAX_PACKET + 1], &[]).await,
            Err(SocketError::TooLong(_))
        ));
        let file = std::fs::File::open("/dev/null").unwrap();
        let many = vec![file.as_fd(); MAX_FDS + 1];
        assert!(matches!(
            a.send(&want("x"), &many).await,
            Err(SocketError::TooManyFds(_))
        ));
    }

    #[tokio::test]
    async fn s2_7_the_kernel_names_the_peer() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ztunnel.sock");
        let listener = Listener::bind(&path).unwrap();
        let near = Channel::connect(&path).unwrap();
        let far = listener.accept().await.unwrap();
        let own = Peer {
            uid: nix::unistd::getuid().as_raw(),
            pid: nix::unistd::getpid().as_raw(),
        };
        assert_eq!(far.peer().unwrap(), own);
        near.send(&want("x"), &[]).await.unwrap();
        assert_eq!(far.recv::<FromZtunnel>().await.unwrap().unwrap().0, want("x"));
        Listener::bind(&path).unwrap();
    }
}
