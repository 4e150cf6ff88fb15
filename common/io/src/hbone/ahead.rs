//! Reading ahead of TLS.
//!
//! ```text
//! socket ──64 KiB a system call──▶ block ──4 KiB a call──▶ TLS
//! ```
//! The TLS library asks for 4 KiB at a time, which would be a system call each. Invariant: a tunnel holds a
//! block only while there are bytes in it; a silent one holds none.

use std::{
    cell::RefCell,
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Bytes that one system call may take: four full TLS records.
const BLOCK_BYTES: usize = 64 * 1024;

/// Blocks that a thread keeps for its tunnels.
const KEPT_BLOCKS: usize = 4;

thread_local! {
    static BLOCKS: RefCell<Vec<Box<[u8]>>> = const { RefCell::new(Vec::new()) };
}

fn take_block() -> Box<[u8]> {
    BLOCKS
        .with_borrow_mut(Vec::pop)
        .unwrap_or_else(|| vec![0; BLOCK_BYTES].into_boxed_slice())
}

fn keep_block(block: Box<[u8]>) {
    BLOCKS.with_borrow_mut(|blocks| {
        if blocks.len() < KEPT_BLOCKS {
            blocks.push(block);
        }
    });
}

/// A connection that is read a block at a time; written as it is.
pub struct ReadAhead<IO> {
    io: IO,
    ahead: Option<Ahead>,
}

/// What has been read and not yet handed on.
struct Ahead {
    block: Box<[u8]>,
    start: usize,
    end: usize,
}

impl<IO> ReadAhead<IO> {
    pub fn new(io: IO) -> Self {
        Self { io, ahead: None }
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for ReadAhead<IO> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let mut ahead = match this.ahead.take() {
            Some(ahead) => ahead,
            None => {
                let mut block = take_block();
                let mut buffer = ReadBuf::new(&mut block);
                let polled = Pin::new(&mut this.io).poll_read(cx, &mut buffer);
                let end = buffer.filled().len();
                if end == 0 {
                    // Pending, an error, or the end.
                    keep_block(block);
                    return polled;
                }
                ready!(polled)?;
                Ahead { block, start: 0, end }
            }
        };
        let count = out.remaining().min(ahead.end - ahead.start);
        out.put_slice(&ahead.block[ahead.start..ahead.start + count]);
        ahead.start += count;
        if ahead.start == ahead.end {
            keep_block(ahead.block);
        } else {
            this.ahead = Some(ahead);
        }
        Poll::Ready(Ok(()))
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for ReadAhead<IO> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().io).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().io).poll_write_vectored(cx, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    #[tokio::test]
    async fn bytes_pass_in_order_whatever_the_readers_pace_and_the_end_is_an_end() {
        let (mut near, far) = tokio::io::duplex(1 << 20);
        let sent: Vec<u8> = (0..300_000u32).map(|i| (i / 7) as u8).collect();
        near.write_all(&sent).await.unwrap();
        drop(near);
        let mut far = ReadAhead::new(far);
        let mut got = vec![];
        let mut part = [0; 4096];
        for size in (1..4096).cycle().step_by(97) {
            match far.read(&mut part[..size]).await.unwrap() {
                0 => break,
                count => got.extend_from_slice(&part[..count]),
            }
        }
        assert!(got == sent);
        assert!(far.ahead.is_none(), "nothing is held at the end");
    }

    #[tokio::test]
    async fn a_silent_connection_holds_no_block() {
        let (mut near, far) = tokio::io::duplex(1 << 10);
        let mut far = ReadAhead::new(far);
        near.write_all(b"ping").await.unwrap();
        far.read_exact(&mut [0; 4]).await.unwrap();
        let silent = tokio::time::timeout(std::time::Duration::from_millis(10), far.read(&mut [0; 4])).await;
        assert!(silent.is_err() && far.ahead.is_none());
    }
}
