//! Outbound sockets, ready-made by the agent in the pod's namespace.
//!
//! ```text
//! agent ──batches──▶ Sockets ──take──▶ connect
//!          ◀──WantSockets, when few are left──┘
//! ```
//! Invariant: ztunnel makes no socket for a pod's traffic; without one from the agent nothing is dialled.

use culvert_core::ids::PodUid;
use culvert_proto::agent::{FromZtunnel, SocketKind, WantSockets, from_ztunnel::Message};
use parking_lot::Mutex;
use std::{collections::VecDeque, os::fd::OwnedFd, time::Duration};
use tokio::{
    net::{TcpSocket, UdpSocket},
    sync::{Notify, mpsc},
};

/// Most sockets that are asked for at once: what one message carries.
pub const MAX_BATCH: u32 = 64;
/// How long until an agent that had none is asked again.
const ASK_AGAIN: Duration = Duration::from_millis(200);
/// How long a connection waits for a socket.
const PATIENCE: Duration = Duration::from_secs(5);

/// A pod's stock of sockets.
pub struct Sockets {
    uid: PodUid,
    requests: mpsc::UnboundedSender<FromZtunnel>,
    shelves: [Shelf; 4],
    /// Sockets asked for at once.
    batch: u32,
}

#[derive(Default)]
struct Shelf {
    state: Mutex<Stock>,
    arrived: Notify,
}

#[derive(Default)]
struct Stock {
    sockets: VecDeque<OwnedFd>,
    asked: u32,
}

fn index(kind: SocketKind, v6: bool) -> usize {
    usize::from(kind == SocketKind::Udp) * 2 + usize::from(v6)
}

impl Sockets {
    /// Asks for `batch` at once, and again when a third of that is left.
    pub fn new(uid: PodUid, requests: mpsc::UnboundedSender<FromZtunnel>, batch: u32) -> Self {
        Self {
            uid,
            requests,
            shelves: Default::default(),
            batch,
        }
    }

    /// Puts a batch from the agent on its shelf.
    pub fn stock(&self, kind: SocketKind, v6: bool, sockets: Vec<OwnedFd>) {
        let shelf = &self.shelves[index(kind, v6)];
        let mut state = shelf.state.lock();
        // One batch is asked for at a time, and an agent that could not make it all has said so by this.
        state.asked = 0;
        state.sockets.extend(sockets);
        let empty = state.sockets.is_empty();
        drop(state);
        if !empty {
            shelf.arrived.notify_waiters();
        }
    }

    /// The agent has restarted: what was asked for will not come.
    pub fn forget_requests(&self) {
        for shelf in &self.shelves {
            shelf.state.lock().asked = 0;
            shelf.arrived.notify_waiters();
        }
    }

    async fn take(&self, kind: SocketKind, v6: bool) -> Option<OwnedFd> {
        match self.take_now(kind, v6) {
            Some(socket) => Some(socket),
            None => Box::pin(tokio::time::timeout(PATIENCE, self.take_later(kind, v6)))
                .await
                .ok(),
        }
    }

    /// Waits for one. An answer without sockets wakes nobody: then this asks again.
    async fn take_later(&self, kind: SocketKind, v6: bool) -> OwnedFd {
        let shelf = &self.shelves[index(kind, v6)];
        loop {
            let arrived = shelf.arrived.notified();
            if let Some(socket) = self.take_now(kind, v6) {
                return socket;
            }
            let _ = tokio::time::timeout(ASK_AGAIN, arrived).await;
        }
    }

    /// One from the shelf, if there is one; asks for more when few are left.
    fn take_now(&self, kind: SocketKind, v6: bool) -> Option<OwnedFd> {
        let mut state = self.shelves[index(kind, v6)].state.lock();
        let socket = state.sockets.pop_front();
        let ask = state.sockets.len() <= self.batch as usize / 3 && state.asked == 0;
        if ask {
            state.asked = self.batch;
        }
        drop(state);
        if ask {
            let want = WantSockets {
                uid: self.uid.to_string(),
                v6,
                count: self.batch,
                kind: kind.into(),
            };
            // Nobody listens while the agent is away; its return asks anew.
            let _ = self.requests.send(FromZtunnel {
                message: Some(Message::WantSockets(want)),
            });
        }
        socket
    }

    /// A UDP socket of the pod, unbound.
    pub async fn udp(&self, v6: bool) -> Option<UdpSocket> {
        let socket = self.take(SocketKind::Udp, v6).await?;
        UdpSocket::from_std(std::net::UdpSocket::from(socket)).ok()
    }

    /// A TCP socket of the pod, unbound; none if the agent gives none in time.
    pub async fn tcp(&self, v6: bool) -> Option<TcpSocket> {
        let socket = self.take(SocketKind::Tcp, v6).await?;
        Some(TcpSocket::from_std_stream(std::net::TcpStream::from(socket)))
    }
}
