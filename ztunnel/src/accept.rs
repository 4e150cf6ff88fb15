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
    serve: impl Fn(Accepted, Arc<Pod>, Arc<Context>) -> F,
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
                    let served = serve(accepted, pod.clone(), context.clone());
                    tokio::spawn(Box::pin(async move {
                        served.await;
                        drop(place);
                    }));
                }
                Err(error) => {
                    tracing::warn!(pod = %pod.name, %error, "accept failed; pausing");
                    tokio::time::sleep(PAUSE).await;
                }
            },
        }
    }
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
        socket2::SockRef::from(&socket).set_out_of_band_inline(true)?;
        let local = canonical(socket.local_addr()?);
        Ok(Self {
            socket,
            peer: canonical(peer),
            local,
        })
    }

    /// Where a redirected connection was going; none if it was not redirected.
    pub fn original_destination(&self) -> Option<SocketAddr> {
        let socket = socket2::SockRef::from(&self.socket);
        let original = match self.local {
            SocketAddr::V4(_) => socket.original_dst_v4(),
            SocketAddr::V6(_) => socket.original_dst_v6(),
        };
        let original = canonical(original.ok()?.as_socket()?);
        (original != self.local).then_some(original)
    }
}

/// An IPv4 address that a dual-stack socket shows as IPv6 becomes itself again.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}
