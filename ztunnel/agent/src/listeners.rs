//! The sockets that the agent makes inside a pod: listeners, which it keeps, and outbound sockets, which
//! it hands out.
//!
//! Invariant: a listener is the only one on its port. None sets SO_REUSEPORT, so a process in the pod that
//! was there first makes enrolment fail, and one that comes later gets EADDRINUSE (settled D4).

use crate::{netns::Netns, orders::octets};
use culvert_proto::agent::{Listener, ListenerFd};
use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::OwnedFd,
    sync::Arc,
};

pub const OUTBOUND_PORT: u16 = 15001;
pub const INBOUND_PORT: u16 = 15006;
pub const HBONE_PORT: u16 = 15008;
pub const DNS_PORT: u16 = 15053;

/// Connections that wait while ztunnel is away (settled D4).
const BACKLOG: i32 = 4096;

/// A kept listener, and what ztunnel is told about it.
#[derive(Debug)]
pub struct Kept {
    pub what: ListenerFd,
    pub socket: Arc<OwnedFd>,
}

/// Why a pod's listeners could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    #[error("entering the namespace: {0}")]
    Enter(#[source] io::Error),
    #[error("port {port} is taken in the pod: {source}; stop what listens there, then enrol again")]
    Taken { port: u16, source: io::Error },
    #[error("port {port}: {source}")]
    Port { port: u16, source: io::Error },
}

/// Makes all listeners of a pod. They carry the mark of ztunnel's sockets, and so do the connections that
/// are accepted on them: only what is marked leaves the pod.
pub fn listen(netns: &Netns, mark: u32, resolvers: &[IpAddr]) -> Result<Vec<Kept>, ListenError> {
    netns
        .enter(|| listen_here(mark, resolvers))
        .map_err(ListenError::Enter)?
}

/// How many listeners a pod has.
pub fn count(resolvers: &[IpAddr]) -> usize {
    3 + 2 * resolvers.len()
}

fn listen_here(mark: u32, resolvers: &[IpAddr]) -> Result<Vec<Kept>, ListenError> {
    let v6 = Socket::new(Domain::IPV6, Type::STREAM, None).is_ok();
    let any = if v6 {
        IpAddr::V6(Ipv6Addr::UNSPECIFIED)
    } else {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED)
    };
    let mut kept = vec![];
    for (kind, port) in [
        (Listener::Outbound, OUTBOUND_PORT),
        (Listener::InboundPlaintext, INBOUND_PORT),
        (Listener::InboundHbone, HBONE_PORT),
    ] {
        kept.push(Kept {
            what: what(kind, v6, None),
            socket: stream(SocketAddr::new(any, port), mark)?.into(),
        });
    }
    for (port, resolver) in (DNS_PORT..).zip(resolvers) {
        let loopback: IpAddr = match resolver {
            IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
            IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
        };
        let address = SocketAddr::new(loopback, port);
        let v6 = resolver.is_ipv6();
        kept.push(Kept {
            what: what(Listener::DnsTcp, v6, Some(*resolver)),
            socket: stream(address, mark)?.into(),
        });
        kept.push(Kept {
            what: what(Listener::DnsUdp, v6, Some(*resolver)),
            socket: datagram(address, mark)?.into(),
        });
    }
    Ok(kept)
}

/// Why a listener that ztunnel gives back is not kept.
#[derive(Debug, thiserror::Error)]
pub enum AdoptError {
    #[error("{0}")]
    Look(#[from] io::Error),
    #[error("it lives in another namespace")]
    Elsewhere,
    #[error("it does not listen")]
    Deaf,
    #[error("it is bound to {0:?}, which is not where this listener belongs")]
    Address(Option<SocketAddr>),
}

/// Takes a listener back after a restart, once the kernel has shown that it is what it is said to be: the
/// peer's word alone would let it put any socket in a pod's place.
pub fn adopt(
    what: ListenerFd,
    socket: OwnedFd,
    cookie: u64,
    mark: u32,
    resolvers: &[IpAddr],
) -> Result<Kept, AdoptError> {
    if culvert_io::sys::netns_cookie(&socket)? != cookie {
        return Err(AdoptError::Elsewhere);
    }
    let kept = Kept {
        what,
        socket: Arc::new(socket),
    };
    let local = SockRef::from(&kept.socket).local_addr()?.as_socket();
    let belongs = match (kept.what.kind(), local) {
        (_, None) => false,
        (Listener::Outbound, Some(local)) => local.port() == OUTBOUND_PORT && local.ip().is_unspecified(),
        (Listener::InboundPlaintext, Some(local)) => {
            local.port() == INBOUND_PORT && local.ip().is_unspecified()
        }
        (Listener::InboundHbone, Some(local)) => local.port() == HBONE_PORT && local.ip().is_unspecified(),
        (Listener::DnsTcp | Listener::DnsUdp, Some(local)) => {
            let mut expected = (DNS_PORT..).zip(resolvers);
            local.ip().is_loopback()
                && expected.any(|(port, ip)| port == local.port() && octets(*ip) == kept.what.resolver)
        }
    };
    if !belongs {
        return Err(AdoptError::Address(local));
    }
    if !kept.works() {
        return Err(AdoptError::Deaf);
    }
    SockRef::from(&kept.socket).set_mark(mark)?;
    Ok(kept)
}

impl Kept {
    /// Lets a socket that was shut down listen again. It is still bound, so nobody could take its place,
    /// and whoever holds a copy accepts on it as before.
    pub fn revive(&self) {
        if let Err(error) = SockRef::from(&self.socket).listen(BACKLOG) {
            tracing::error!(listener = ?self.what.kind(), %error, "a listener cannot be revived");
        }
    }

    /// Whether the socket still does its work: a process that holds a copy can shut it down for all.
    pub fn works(&self) -> bool {
        let socket = SockRef::from(&self.socket);
        match self.what.kind() {
            Listener::DnsUdp => {
                socket.r#type().is_ok_and(|kind| kind == Type::DGRAM)
                    && socket
                        .protocol()
                        .is_ok_and(|protocol| protocol == Some(Protocol::UDP))
            }
            Listener::Outbound | Listener::InboundPlaintext | Listener::InboundHbone | Listener::DnsTcp => {
                socket.is_listener().unwrap_or(false)
                    && socket
                        .protocol()
                        .is_ok_and(|protocol| protocol == Some(Protocol::TCP))
            }
        }
    }
}

fn what(kind: Listener, v6: bool, resolver: Option<IpAddr>) -> ListenerFd {
    ListenerFd {
        kind: kind.into(),
        v6,
        resolver: resolver.map(octets).unwrap_or_default(),
    }
}

fn bound(address: SocketAddr, mark: u32, kind: Type, protocol: Protocol) -> Result<Socket, ListenError> {
    let port = address.port();
    let bind = || -> io::Result<Socket> {
        let socket = Socket::new(Domain::for_address(address), kind, Some(protocol))?;
        socket.set_nonblocking(true)?;
        socket.set_mark(mark)?;
        if address.is_ipv6() {
            socket.set_only_v6(!address.ip().is_unspecified())?;
        }
        if kind == Type::STREAM {
            // Ended connections of an earlier enrolment still have these ports for a minute. It opens the
            // port to nobody: beside a socket that listens, the kernel lets none bind, with it or without.
            socket.set_reuse_address(true)?;
            // Replies to captured connections keep the address that the application dialled.
            socket
                .set_ip_transparent_v4(true)
                .or_else(|_| socket.set_ip_transparent_v6(true))?;
        }
        socket.bind(&address.into())?;
        Ok(socket)
    };
    bind().map_err(|source| match source.kind() {
        io::ErrorKind::AddrInUse => ListenError::Taken { port, source },
        _ => ListenError::Port { port, source },
    })
}

fn stream(address: SocketAddr, mark: u32) -> Result<OwnedFd, ListenError> {
    let socket = bound(address, mark, Type::STREAM, Protocol::TCP)?;
    socket.listen(BACKLOG).map_err(|source| ListenError::Port {
        port: address.port(),
        source,
    })?;
    Ok(socket.into())
}

fn datagram(address: SocketAddr, mark: u32) -> Result<OwnedFd, ListenError> {
    Ok(bound(address, mark, Type::DGRAM, Protocol::UDP)?.into())
}

/// Which sockets ztunnel asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    pub v6: bool,
    pub datagram: bool,
    pub count: usize,
}

/// Makes unbound outbound sockets in the pod: marked, so that its rules let them pass, and transparent,
/// so that ztunnel may bind the client's address without any capability (settled D5).
pub fn outbound_sockets(netns: &Netns, mark: u32, wanted: Wanted) -> io::Result<Vec<OwnedFd>> {
    netns.enter(|| (0..wanted.count).map(|_| outbound_socket(mark, wanted)).collect())?
}

fn outbound_socket(mark: u32, wanted: Wanted) -> io::Result<OwnedFd> {
    let domain = if wanted.v6 { Domain::IPV6 } else { Domain::IPV4 };
    let kind = if wanted.datagram {
        Type::DGRAM
    } else {
        Type::STREAM
    };
    let socket = Socket::new(domain, kind.nonblocking(), None)?;
    socket.set_mark(mark)?;
    if wanted.v6 {
        socket.set_ip_transparent_v6(true)?;
    } else {
        socket.set_ip_transparent_v4(true)?;
    }
    if !wanted.datagram {
        socket.set_tcp_nodelay(true)?;
        setsockopt(&socket, sockopt::IpBindAddressNoPort, &true)?;
    }
    Ok(socket.into())
}
