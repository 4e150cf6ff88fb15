//! Accepting on a listener that the agent keeps.
//!
//! Invariant: the loop ends only with its pod or with draining. An error of `accept` pauses it; leaving it
//! would cut what is open, and spinning would starve what is open. A pod that has its share of the node's
//! descriptors has its newest connections reset.

use crate::{
    access::{Known, refused},
    connections::NoRoom,
    context::Context,
    pods::Pod,
};
use culvert_io::copy::reset;
use socket2::SockRef;
use std::{io, net::SocketAddr, sync::Arc, time::Duration};
use tokio::net::{TcpListener, TcpStream};

/// After an error such as EMFILE, which passes.
const PAUSE: Duration = Duration::from_millis(50);

/// Accepts until the pod leaves or draining begins, and hands each connection to `serve`. Of those for which
/// there is no room, `unserved` says what is known.
pub async fn accept_loop<F>(
    listener: TcpListener,
    pod: Arc<Pod>,
    context: Arc<Context>,
    serve: impl Fn(Accepted, Arc<Pod>, Arc<Context>) -> F + Copy + Send + 'static,
    unserved: impl Fn(&Accepted, &Pod, &Context) -> Known,
) where
    F: Future<Output = ()> + Send + 'static,
{
    loop {
        tokio::select! {
            biased;
            () = pod.left() => return,
            () = context.draining() => return,
            accepted = listener.accept() => match accepted.and_then(Accepted::new) {
                Ok(accepted) => {
                    let Some(place) = context.descriptors.enter(&pod.uid) else {
                        refused(&context.metrics, &unserved(&accepted, &pod, &context), &NoRoom);
                        reset(&accepted.socket);
                        continue;
                    };
                    let (of, shared) = (pod.clone(), context.clone());
                    // Boxed before it is awaited: a block that owns a future has room for it twice.
                    let start = move |accepted| {
                        let served = Box::pin(serve(accepted, of, shared));
                        async move {
                            served.await;
                            drop(place);
                        }
                    };
                    match context.workers.elsewhere() {
                        None => drop(tokio::spawn(start(accepted))),
                        Some(worker) => match accepted.leave() {
                            Ok(leaving) => drop(worker.spawn(arrive(leaving, start))),
                            Err(error) => unmoved(&error),
                        },
                    }
                }
                Err(error) => {
                    tracing::warn!(pod = %pod.name, %error, "accept failed; pausing");
                    tokio::time::sleep(PAUSE).await;
                }
            },
        }
    }
}

/// Takes up a connection that another worker has accepted.
async fn arrive<F: Future<Output = ()>>(leaving: Leaving, start: impl FnOnce(Accepted) -> F) {
    match leaving.arrive() {
        Ok(accepted) => start(accepted).await,
        Err(error) => unmoved(&error),
    }
}

fn unmoved(error: &io::Error) {
    tracing::warn!(%error, "a connection could not be given to another worker; it is reset");
}

/// An accepted connection, its addresses in their own family.
pub struct Accepted {
    pub socket: TcpStream,
    pub peer: SocketAddr,
    pub local: SocketAddr,
}

impl Accepted {
    fn new((socket, peer): (TcpStream, SocketAddr)) -> io::Result<Self> {
        socket.set_nodelay(true)?;
        // An urgent byte is a byte (RFC 6093 §3): without this the relay would lose it.
        SockRef::from(&socket).set_out_of_band_inline(true)?;
        let local = canonical(socket.local_addr()?);
        Ok(Self {
            socket,
            peer: canonical(peer),
            local,
        })
    }

    /// Leaves this worker.
    fn leave(self) -> io::Result<Leaving> {
        SockRef::from(&self.socket).set_linger(Some(Duration::ZERO))?;
        Ok(Leaving {
            socket: self.socket.into_std()?,
            peer: self.peer,
            local: self.local,
        })
    }

    /// Where a redirected connection was going; none if it was not redirected.
    pub fn original_destination(&self) -> Option<SocketAddr> {
        let socket = SockRef::from(&self.socket);
        let original = match self.local {
            SocketAddr::V4(_) => socket.original_dst_v4(),
            SocketAddr::V6(_) => socket.original_dst_v6(),
        };
        let original = canonical(original.ok()?.as_socket()?);
        (original != self.local).then_some(original)
    }
}

/// A connection on its way to another worker: closed on the way, it is reset.
struct Leaving {
    socket: std::net::TcpStream,
    peer: SocketAddr,
    local: SocketAddr,
}

impl Leaving {
    /// On the worker that takes it up.
    fn arrive(self) -> io::Result<Accepted> {
        let socket = TcpStream::from_std(self.socket)?;
        SockRef::from(&socket).set_linger(None)?;
        Ok(Accepted {
            socket,
            peer: self.peer,
            local: self.local,
        })
    }
}

/// An IPv4 address that a dual-stack socket shows as IPv6 becomes itself again.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}
