//! What the machine can do today: a relay that does nothing but copy, and the cipher alone.
//!
//! A figure of the mesh means little without these of the same run (settled D27).

use std::fs;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::sync::mpsc;
use std::time::Duration;

use anyhow::{Context, Result};
use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use culvert_e2e::lab::Endpoint;
use tokio::net::{TcpListener as AsyncListener, TcpStream};

use crate::cost::cpu_of_this_thread;

/// Copies each connection to the next hop, on one thread.
pub struct Relay {
    pub address: IpAddr,
    schedstat: String,
}

impl Relay {
    pub fn start(place: &Endpoint, next: IpAddr, ports: &[u16]) -> Result<Self> {
        let listeners = ports
            .iter()
            .map(|port| Ok((place.listen(*port)?, SocketAddr::new(next, *port))))
            .collect::<Result<Vec<_>>>()?;
        let (report, reported) = mpsc::channel();
        place.spawn_inside("relay", move || {
            let thread = fs::read_link("/proc/thread-self")?;
            report.send(format!("/proc/{}/schedstat", thread.display()))?;
            tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?
                .block_on(async {
                    for (listener, next) in listeners {
                        tokio::spawn(relay(listener, next));
                    }
                    std::future::pending::<Result<()>>().await
                })
        })?;
        Ok(Self {
            address: place.addresses().v4.into(),
            schedstat: reported.recv().context("the relay did not start")?,
        })
    }

    pub fn cpu(&self) -> Result<Duration> {
        crate::cost::cpu_in(&self.schedstat)
    }
}

async fn relay(listener: TcpListener, next: SocketAddr) -> Result<()> {
    listener.set_nonblocking(true)?;
    let listener = AsyncListener::from_std(listener)?;
    loop {
        let (mut client, _) = listener.accept().await?;
        tokio::spawn(async move {
            client.set_nodelay(true)?;
            let mut server = TcpStream::connect(next).await?;
            server.set_nodelay(true)?;
            tokio::io::copy_bidirectional_with_sizes(&mut client, &mut server, 64 << 10, 64 << 10).await
        });
    }
}

/// Seconds of CPU that sealing 1 GB in records of 16 KiB takes.
pub fn aes_gcm() -> Result<f64> {
    let key = LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &[7; 32])?);
    let mut record = vec![0x5a; 16 << 10];
    let rounds = (512 << 20) / record.len();
    let start = cpu_of_this_thread()?;
    for number in 0..rounds {
        let mut nonce = [0; NONCE_LEN];
        nonce[..8].copy_from_slice(&(number as u64).to_le_bytes());
        let nonce = Nonce::assume_unique_for_key(nonce);
        let tag = key.seal_in_place_separate_tag(nonce, Aad::empty(), &mut record)?;
        let _ = std::hint::black_box(tag);
    }
    let took = cpu_of_this_thread()? - start;
    Ok(took.as_secs_f64() / (rounds * record.len()) as f64 * 1e9)
}
