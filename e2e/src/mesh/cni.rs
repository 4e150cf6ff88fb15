//! The agent's CNI socket, as a CNI plugin would use it.
//!
//! Invariant: one packet with one request, one packet with its answer, within a deadline.

use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, connect, recv, sendmsg,
    setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};
use serde_json::{Value, json};

use crate::lab::Pod;

/// The plugin itself gives up after 20 s.
const WAIT: Duration = Duration::from_secs(25);

/// Tells the agent at `socket` of a new pod; returns once its capture is verified.
pub fn add(socket: &Path, pod: &Pod) -> Result<()> {
    let request = json!({
        "cmd": "ADD",
        "uid": pod.uid(),
        "namespace": pod.spec().namespace,
        "name": pod.spec().name,
        "addresses": pod.addresses().all(),
        "host_ifindex": pod.host_ifindex(),
    });
    call(socket, &request, Some(pod.netns().as_fd())).with_context(|| format!("CNI ADD of {}", pod.name()))
}

/// Tells the agent that a pod is gone.
pub fn delete(socket: &Path, pod: &Pod) -> Result<()> {
    let request = json!({ "cmd": "DEL", "uid": pod.uid() });
    call(socket, &request, None).with_context(|| format!("CNI DEL of {}", pod.name()))
}

fn call(path: &Path, request: &Value, netns: Option<BorrowedFd<'_>>) -> Result<()> {
    let fd = dial(path)?;
    let bytes = request.to_string();
    let rights = netns.map(|netns| [netns.as_raw_fd()]);
    let control: Vec<ControlMessage<'_>> = rights.iter().map(|fds| ControlMessage::ScmRights(fds)).collect();
    let payload = [IoSlice::new(bytes.as_bytes())];
    sendmsg::<UnixAddr>(fd.as_raw_fd(), &payload, &control, MsgFlags::MSG_NOSIGNAL, None)?;
    let mut answer = vec![0; 64 << 10];
    let length = recv(fd.as_raw_fd(), &mut answer, MsgFlags::empty()).context("no answer")?;
    let answer: Value = serde_json::from_slice(&answer[..length])
        .with_context(|| String::from_utf8_lossy(&answer[..length]).into_owned())?;
    if answer["ok"] != true {
        bail!(
            "{}",
            answer["error"].as_str().unwrap_or("refused without a reason")
        );
    }
    Ok(())
}

fn dial(path: &Path) -> Result<OwnedFd> {
    let fd = socket(
        AddressFamily::Unix,
        SockType::SeqPacket,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    setsockopt(
        &fd,
        sockopt::ReceiveTimeout,
        &TimeVal::seconds(WAIT.as_secs() as i64),
    )?;
    connect(fd.as_raw_fd(), &UnixAddr::new(path)?).with_context(|| path.display().to_string())?;
    Ok(fd)
}
