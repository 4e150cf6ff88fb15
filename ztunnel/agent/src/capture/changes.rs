//! The kernel's news about one namespace.
//!
//! Every pod is looked at twice a second. A look at an empty queue is one system call, where a question
//! would be a conversation, and asking for all rules and routes a dozen of them.
//!
//! Invariant: news is not lost. Where there was more than the queue holds, that itself is news.

use nix::{
    errno::Errno,
    libc,
    sys::socket::{
        AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
    },
};
use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    sync::atomic::{AtomicBool, Ordering},
};

/// `RTNLGRP_IPV6_RULE` and `NFNLGRP_NFTABLES` as bits; older headers have no names for these.
const RTMGRP_IPV6_RULE: i32 = 1 << 18;
const NFT_GROUP: i32 = 1 << 6;

/// A subscription.
pub struct Changes {
    socket: OwnedFd,
    /// There was news that has not been dealt with.
    pending: AtomicBool,
}

impl Changes {
    /// About links, addresses, routes and routing rules of the namespace that the calling thread is in.
    pub fn of_routes() -> io::Result<Self> {
        let groups = libc::RTMGRP_LINK
            | libc::RTMGRP_IPV4_IFADDR
            | libc::RTMGRP_IPV4_ROUTE
            | libc::RTMGRP_IPV4_RULE
            | libc::RTMGRP_IPV6_IFADDR
            | libc::RTMGRP_IPV6_ROUTE
            | RTMGRP_IPV6_RULE;
        Self::watch(SockProtocol::NetlinkRoute, groups)
    }

    /// About nftables of the namespace that the calling thread is in.
    pub fn of_rules() -> io::Result<Self> {
        Self::watch(SockProtocol::NetlinkNetFilter, NFT_GROUP)
    }

    fn watch(protocol: SockProtocol, groups: i32) -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, protocol)?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, groups.cast_unsigned()))?;
        Ok(Self {
            socket,
            pending: AtomicBool::new(true),
        })
    }

    /// Whether there was any since the last call; none is left.
    pub fn seen(&self) -> bool {
        let mut seen = self.pending.swap(false, Ordering::Relaxed);
        loop {
            match recv(self.socket.as_raw_fd(), &mut [0; 16], MsgFlags::MSG_DONTWAIT) {
                Ok(_) => seen = true,
                Err(Errno::EAGAIN) => return seen,
                // ENOBUFS: there was more than the queue holds.
                Err(Errno::ENOBUFS | Errno::EINTR) => seen = true,
                Err(_) => return true,
            }
        }
    }

    /// Until what there was has been dealt with, it stays news.
    pub fn remember(&self) {
        self.pending.store(true, Ordering::Relaxed);
    }
}
