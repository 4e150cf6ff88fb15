//! The accepting end of tunnels in the hands of somebody else.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::Result;
use rustls::{ServerConfig, ServerConnection, StreamOwned};

use super::Svid;

/// How often a thread looks whether it shall end.
const LOOK: Duration = Duration::from_millis(20);

/// Accepts tunnels with an SVID that may be wrong, says the same to all, and answers nothing.
#[derive(Debug)]
pub struct Impostor {
    heard: Arc<Heard>,
    accepting: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Heard {
    over: AtomicBool,
    connections: AtomicU64,
    bytes: AtomicU64,
}

impl Impostor {
    /// Serves `listener` until dropped.
    pub fn start(listener: TcpListener, svid: &Svid, says: Vec<u8>) -> Result<Self> {
        let config = Arc::new(svid.server()?);
        let heard = Arc::<Heard>::default();
        listener.set_nonblocking(true)?;
        let all = heard.clone();
        let accepting = thread::spawn(move || {
            let mut serving = Vec::new();
            while !all.over.load(Ordering::Relaxed) {
                let Ok((socket, _)) = listener.accept() else {
                    thread::sleep(LOOK);
                    continue;
                };
                all.connections.fetch_add(1, Ordering::Relaxed);
                let (config, says, heard) = (config.clone(), says.clone(), all.clone());
                serving.push(thread::spawn(move || serve(socket, config, &says, &heard)));
            }
            for one in serving {
                // A connection that broke is what this is for.
                let _ = one.join();
            }
        });
        Ok(Self {
            heard,
            accepting: Some(accepting),
        })
    }

    /// Connections that came.
    pub fn connections(&self) -> u64 {
        self.heard.connections.load(Ordering::Relaxed)
    }

    /// Bytes that came inside of TLS.
    pub fn bytes(&self) -> u64 {
        self.heard.bytes.load(Ordering::Relaxed)
    }
}

impl Drop for Impostor {
    fn drop(&mut self) {
        self.heard.over.store(true, Ordering::Relaxed);
        if let Some(accepting) = self.accepting.take() {
            let _ = accepting.join();
        }
    }
}

fn serve(socket: TcpStream, config: Arc<ServerConfig>, says: &[u8], heard: &Heard) -> io::Result<()> {
    socket.set_nonblocking(false)?;
    socket.set_read_timeout(Some(LOOK))?;
    let mut session = ServerConnection::new(config).map_err(io::Error::other)?;
    session.writer().write_all(says)?;
    let mut tls = StreamOwned::new(session, socket);
    let mut buffer = [0; 4096];
    while !heard.over.load(Ordering::Relaxed) {
        match tls.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => {
                heard.bytes.fetch_add(count as u64, Ordering::Relaxed);
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
