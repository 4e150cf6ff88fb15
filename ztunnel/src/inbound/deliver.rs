//! Dialling the application, from the client's address.

use super::admit::Permit;
use crate::{context::CONNECT_DEADLINE, pods::Pod};
use socket2::SockRef;
use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::atomic::{AtomicU16, Ordering},
};
use tokio::net::{TcpSocket, TcpStream};

/// Why the application was not reached.
#[derive(Debug, thiserror::Error)]
pub enum DeliverError {
    #[error("the agent gave no socket in time")]
    NoSocket,
    #[error("application did not accept within {} s", CONNECT_DEADLINE.as_secs())]
    Timeout,
    #[error("application: {0}")]
    Connect(#[from] io::Error),
}

/// Ports that Linux gives to clients unless told otherwise: no server of the pod expects them free.
const PORTS: std::ops::Range<u16> = 32_768..61_000;

/// Ports that are tried before the kernel is asked to find one.
const TRIES: usize = 3;

/// The source ports of a pod's deliveries, in turn.
///
/// A port that the kernel finds must be free of every connection of the last minute, since we close first
/// and it keeps our end in TIME-WAIT: at a thousand short connections a second its search grows long, and
/// then it finds none. A port that is named may follow such a connection at once, as both ends have
/// timestamps (RFC 6191).
pub struct Ports(AtomicU16);

impl Default for Ports {
    fn default() -> Self {
        Self(AtomicU16::new(rand::random_range(PORTS)))
    }
}

impl Ports {
    fn next(&self) -> u16 {
        let number = self.0.fetch_add(1, Ordering::Relaxed);
        PORTS.start + number % (PORTS.end - PORTS.start)
    }
}

/// Connects to where the permit leads. The application sees `client` as the source, unless that is the
/// pod itself or of another family.
pub async fn deliver(pod: &Pod, permit: &Permit, client: IpAddr) -> Result<TcpStream, DeliverError> {
    let target = permit.target();
    let from_client = client != target.ip() && client.is_ipv4() == target.is_ipv4();
    for left in (0..=TRIES).rev() {
        let socket = pod
            .sockets
            .tcp(target.is_ipv6())
            .await
            .ok_or(DeliverError::NoSocket)?;
        unpaced(&socket);
        socket2::SockRef::from(&socket).set_out_of_band_inline(true)?;
        let named = left > 0 && from_client;
        if from_client {
            let port = if named { pod.ports.next() } else { 0 };
            socket.set_reuseaddr(named)?;
            match socket.bind(SocketAddr::new(client, port)) {
                Err(error) if named && is_taken(&error) => continue,
                bound => bound?,
            }
        }
        match tokio::time::timeout(CONNECT_DEADLINE, socket.connect(target)).await {
            Ok(Err(error)) if named && is_taken(&error) => {}
            Ok(connected) => return Ok(connected?),
            Err(_) => return Err(DeliverError::Timeout),
        }
    }
    Err(io::Error::from(io::ErrorKind::AddrInUse).into())
}

/// The way to the application is a few copies inside this machine. What the host may have chosen for its
/// network (BBR paces each segment by a timer) costs there and gains nothing; Reno needs no right to use.
fn unpaced(socket: &TcpSocket) {
    // A kernel without it keeps its default.
    let _ = SockRef::from(socket).set_tcp_congestion(b"reno");
}

/// Something listens on the port, or an open connection to the same target has it.
fn is_taken(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::AddrInUse | io::ErrorKind::AddrNotAvailable
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_go_round_and_stay_where_clients_have_theirs() {
        let ports = Ports(AtomicU16::new(u16::MAX - 2));
        let mut seen = std::collections::HashSet::new();
        for _ in 0..200_000 {
            let port = ports.next();
            assert!(PORTS.contains(&port));
            seen.insert(port);
        }
        assert_eq!(seen.len(), PORTS.len());
    }
}
