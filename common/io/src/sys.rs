//! System calls that no crate offers safely: the only `unsafe` of the project.
//!
//! Invariant: every function here is safe to call with any argument; what makes it sound stands beside
//! each block.

#![expect(
    unsafe_code,
    reason = "the one module for system calls without a safe wrapper"
)]

use nix::{
    libc,
    sys::socket::{ControlMessage, MsgFlags, SockFlag, accept4, sendmsg},
};
use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};
use tokio::io::{Interest, unix::AsyncFd};

/// Most descriptors that one message carries.
pub const MAX_FDS: usize = 64;

/// `SO_NETNS_COOKIE`: names the network namespace that a socket lives in, uniquely until reboot.
const SO_NETNS_COOKIE: libc::c_int = 71;

/// `ioctl` that opens the network namespace of a socket.
const SIOCGSKNS: libc::c_ulong = 0x894C;

/// The cookie of the network namespace that `socket` lives in.
pub fn netns_cookie(socket: impl AsFd) -> io::Result<u64> {
    let mut cookie = 0u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes to `cookie`, which lives until the call returns,
    // and the borrow keeps the descriptor open.
    let rc = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if rc == 0 {
        Ok(cookie)
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Opens the network namespace that `socket` lives in. Needs CAP_NET_ADMIN over it.
pub fn netns_of(socket: impl AsFd) -> io::Result<OwnedFd> {
    // SAFETY: this ioctl takes no argument and touches no memory of ours; the borrow keeps the
    // descriptor open.
    let fd = unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), SIOCGSKNS) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Accepts a connection; non-blocking and closed on exec.
pub fn accept(listener: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let fd = accept4(
        listener.as_raw_fd(),
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
    )?;
    // SAFETY: the kernel has just made this descriptor for us, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Gives the system back what the calling thread has freed; for programs whose allocator is mimalloc, which
/// otherwise does so as it goes on allocating.
pub fn give_memory_back() {
    // SAFETY: any thread may call it at any time: it takes no memory of ours and visits the free pages of
    // the calling thread's heap, which is made at its first use.
    unsafe { libmimalloc_sys::mi_collect(true) }
}

/// Registers a descriptor with the runtime that this runs in.
pub fn register(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` returns the same open descriptor for as long as it lives, and it is moved into
    // the registration, which ends before the descriptor is closed.
    Ok(unsafe { AsyncFd::register_with_interest(fd, interest) }?)
}

/// Sends one packet with descriptors.
pub fn send_with_fds(socket: BorrowedFd<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control: &[_] = if raw.is_empty() { &[] } else { &rights };
    let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
    let sent = sendmsg::<()>(
        socket.as_raw_fd(),
        &[io::IoSlice::new(bytes)],
        control,
        flags,
        None,
    )?;
    if sent == bytes.len() {
        Ok(())
    } else {
        Err(io::ErrorKind::WriteZero.into())
    }
}

/// Room for [`MAX_FDS`] descriptors in one control message.
const CONTROL_BYTES: usize = 512;

/// A control buffer, aligned as its headers need.
#[repr(C, align(8))]
struct Control([u8; CONTROL_BYTES]);

/// Receives one packet and its descriptors, which are closed on exec. No byte at all is the peer's end.
///
/// # Errors
/// `InvalidData` if the packet or its descriptors did not fit; what had arrived of them is closed.
pub fn recv_with_fds(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut part = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    let mut control = Control([0; CONTROL_BYTES]);
    // SAFETY: all zeros is a legal msghdr.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.0.as_mut_ptr().cast();
    message.msg_controllen = CONTROL_BYTES;
    let flags = libc::MSG_CMSG_CLOEXEC | libc::MSG_DONTWAIT;
    // SAFETY: `message` points at `part` and `control`, which live until the call returns and whose
    // lengths are those of what they point at.
    let received = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, flags) };
    let received = usize::try_from(received).map_err(|_| io::Error::last_os_error())?;
    let mut fds = vec![];
    // SAFETY: the kernel has filled `control` with whole headers and set `msg_controllen`; the macros
    // stay inside it. The payload of SCM_RIGHTS is an array of descriptors that are ours from now on,
    // each taken once; it may be unaligned, so it is read as such.
    unsafe {
        let mut header = libc::CMSG_FIRSTHDR(&raw const message);
        while !header.is_null() {
            if (*header).cmsg_level == libc::SOL_SOCKET && (*header).cmsg_type == libc::SCM_RIGHTS {
                let bytes = (*header).cmsg_len - libc::CMSG_LEN(0) as usize;
                let data = libc::CMSG_DATA(header).cast::<RawFd>();
                for index in 0..bytes / size_of::<RawFd>() {
                    fds.push(OwnedFd::from_raw_fd(data.add(index).read_unaligned()));
                }
            }
            header = libc::CMSG_NXTHDR(&raw const message, header);
        }
    }
    if message.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0 {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "the packet or its descriptors did not fit",
        ));
    }
    Ok((received, fds))
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
    use std::net::TcpListener;

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )
        .unwrap()
    }

    #[test]
    fn a_packet_arrives_with_its_descriptors() {
        let (a, b) = pair();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        send_with_fds(a.as_fd(), b"two", &[listener.as_fd(), listener.as_fd()]).unwrap();
        let mut buffer = [0; 16];
        let (length, fds) = recv_with_fds(b.as_fd(), &mut buffer).unwrap();
        assert_eq!((&buffer[..length], fds.len()), (&b"two"[..], 2));
        let copy = TcpListener::from(fds.into_iter().next().unwrap());
        assert_eq!(copy.local_addr().unwrap(), listener.local_addr().unwrap());
        drop(a);
        assert_eq!(recv_with_fds(b.as_fd(), &mut buffer).unwrap().0, 0);
    }

    #[test]
    fn t57_what_does_not_fit_is_refused_and_closed() {
        let (a, b) = pair();
        send_with_fds(a.as_fd(), &[7; 32], &[]).unwrap();
        assert_eq!(
            recv_with_fds(b.as_fd(), &mut [0; 16]).unwrap_err().kind(),
            io::ErrorKind::InvalidData
        );
        let many = vec![a.as_fd(); 200];
        send_with_fds(a.as_fd(), b"flood", &many).unwrap();
        let before = std::fs::read_dir("/proc/self/fd").unwrap().count();
        assert!(recv_with_fds(b.as_fd(), &mut [0; 16]).is_err());
        // Other tests open and close descriptors meanwhile; a leak of this one would be over a hundred.
        assert!(std::fs::read_dir("/proc/self/fd").unwrap().count() < before + 50);
    }

    #[test]
    fn sockets_of_one_namespace_have_one_cookie() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let other = TcpListener::bind("127.0.0.1:0").unwrap();
        assert_ne!(netns_cookie(&listener).unwrap(), 0);
        assert_eq!(netns_cookie(&listener).unwrap(), netns_cookie(&other).unwrap());
    }
}
