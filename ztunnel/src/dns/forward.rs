//! A query on its way to the resolver that was asked, and the reply back.
//!
//! Invariant: a reply is taken from that resolver's address alone, on a port and under an id of this
//! query's own, and only if it repeats the question. Anything else that comes is waited past.

use super::{DnsError, question::Question, read_framed, write_framed};
use std::{net::SocketAddr, time::Duration};
use tokio::net::{TcpSocket, UdpSocket};

/// How long the resolver may take: as long as clients wait before they ask again.
const PATIENCE: Duration = Duration::from_secs(5);

/// Largest datagram there is.
const MAX_UDP_REPLY: usize = 65_535;

/// Asks by UDP on a socket that nobody has used.
pub async fn by_udp(
    socket: UdpSocket,
    resolver: SocketAddr,
    query: &[u8],
    question: &Question,
) -> Result<Vec<u8>, DnsError> {
    socket.connect(resolver).await?;
    let (query, id) = under_new_id(query);
    socket.send(&query).await?;
    let mut reply = vec![0; MAX_UDP_REPLY];
    let received = async {
        loop {
            let length = socket.recv(&mut reply).await?;
            if reply[..length].starts_with(&id) && question.is_answered_by(&reply[..length]) {
                return Ok::<_, DnsError>(length);
            }
        }
    };
    let length = tokio::time::timeout(PATIENCE, received)
        .await
        .map_err(|_| DnsError::Timeout)??;
    reply.truncate(length);
    Ok(under_id(reply, question.id()))
}

/// Asks by TCP, for answers that do not fit a datagram.
pub async fn by_tcp(
    socket: TcpSocket,
    resolver: SocketAddr,
    query: &[u8],
    question: &Question,
) -> Result<Vec<u8>, DnsError> {
    let (query, id) = under_new_id(query);
    let asked = async {
        let mut stream = socket.connect(resolver).await?;
        write_framed(&mut stream, &query).await?;
        loop {
            let reply = read_framed(&mut stream).await?;
            if reply.starts_with(&id) && question.is_answered_by(&reply) {
                return Ok::<_, DnsError>(reply);
            }
        }
    };
    let reply = tokio::time::timeout(PATIENCE, asked)
        .await
        .map_err(|_| DnsError::Timeout)??;
    Ok(under_id(reply, question.id()))
}

/// The query under an id that nobody can guess, whatever the application's own ids are like.
fn under_new_id(query: &[u8]) -> (Vec<u8>, [u8; 2]) {
    let id: u16 = rand::random();
    (under_id(query.to_vec(), id), id.to_be_bytes())
}

fn under_id(mut message: Vec<u8>, id: u16) -> Vec<u8> {
    for (byte, new) in message.iter_mut().zip(id.to_be_bytes()) {
        *byte = new;
    }
    message
}

#[cfg(test)]
mod tests;
