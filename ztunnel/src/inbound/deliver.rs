//! Dialling the application, from the client's address.

use super::admit::Permit;
use crate::{context::CONNECT_DEADLINE, pods::Pod};
use std::{
    io,
    net::{IpAddr, SocketAddr},
};
use tokio::net::TcpStream;

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

/// Connects to where the permit leads. The application sees `client` as the source, unless that is the
/// pod itself or of another family.
pub async fn deliver(pod: &Pod, permit: &Permit, client: IpAddr) -> Result<TcpStream, DeliverError> {
    let target = permit.target();
    let socket = pod
        .sockets
        .tcp(target.is_ipv6())
        .await
        .ok_or(DeliverError::NoSocket)?;
    if client != target.ip() && client.is_ipv4() == target.is_ipv4() {
        socket.bind(SocketAddr::new(client, 0))?;
    }
    let connected = tokio::time::timeout(CONNECT_DEADLINE, socket.connect(target)).await;
    Ok(connected.map_err(|_| DeliverError::Timeout)??)
}
