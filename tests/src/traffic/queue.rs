//! The program behind an NFQUEUE rule: sees every packet, lets it go on.

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    sync::atomic::Ordering,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::{epoll::Epoll, ready, told_to_finish};

// linux/netfilter/nfnetlink_queue.h
const MESSAGE_PACKET: u8 = 0;
const MESSAGE_VERDICT: u8 = 1;
const MESSAGE_CONFIG: u8 = 2;
const ATTRIBUTE_CONFIG_COMMAND: u16 = 1;
const ATTRIBUTE_CONFIG_PARAMETERS: u16 = 2;
const ATTRIBUTE_PACKET_HEADER: u16 = 1;
const ATTRIBUTE_VERDICT_HEADER: u16 = 2;
const COMMAND_BIND: u8 = 1;
const COPY_META: u8 = 1;
const ACCEPT: u32 = 1;

/// Lengths of `nlmsghdr` and of `nlmsghdr` with `nfgenmsg`.
const HEADER: usize = 16;
const HEADERS: usize = HEADER + 4;

/// Arguments.
#[derive(Debug, clap::Args)]
pub struct QueueArgs {
    /// Number of the queue.
    #[arg(long, default_value_t = 0)]
    number: u16,
}

/// What passed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueReport {
    /// Packets.
    pub seen: u64,
}

/// Lets everything pass until told.
///
/// # Errors
/// When the kernel has no such queues or the socket fails.
pub fn pass_on(args: &QueueArgs) -> Result<QueueReport> {
    let socket = open().context("cannot open a netfilter socket")?;
    let command = [COMMAND_BIND, 0, 0, libc::AF_INET as u8];
    let mut parameters = 0_u32.to_be_bytes().to_vec();
    parameters.push(COPY_META);
    for (kind, value) in [
        (ATTRIBUTE_CONFIG_COMMAND, &command[..]),
        (ATTRIBUTE_CONFIG_PARAMETERS, &parameters[..]),
    ] {
        let request = message(MESSAGE_CONFIG, args.number, kind, value, libc::NLM_F_ACK);
        send(&socket, &request)?;
        acknowledged(&receive(&socket)?).context("the kernel refuses the queue")?;
    }
    let epoll = Epoll::new()?;
    epoll.add(&socket, 0)?;
    let finish = told_to_finish();
    ready()?;
    let mut report = QueueReport { seen: 0 };
    let mut readable = Vec::new();
    while !finish.load(Ordering::Relaxed) {
        epoll.wait(Duration::from_millis(20), &mut readable)?;
        if readable.is_empty() {
            continue;
        }
        for id in packets(&receive(&socket)?) {
            report.seen += 1;
            let mut verdict = ACCEPT.to_be_bytes().to_vec();
            verdict.extend(id);
            send(
                &socket,
                &message(
                    MESSAGE_VERDICT,
                    args.number,
                    ATTRIBUTE_VERDICT_HEADER,
                    &verdict,
                    0,
                ),
            )?;
        }
    }
    Ok(report)
}

fn open() -> io::Result<OwnedFd> {
    // SAFETY: no pointer is involved.
    let socket = unsafe {
        libc::socket(
            libc::AF_NETLINK,
            libc::SOCK_RAW | libc::SOCK_CLOEXEC,
            libc::NETLINK_NETFILTER,
        )
    };
    if socket < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the handle is new and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(socket) })
}

fn send(socket: &OwnedFd, bytes: &[u8]) -> io::Result<()> {
    // SAFETY: the pointer and the length describe `bytes`.
    let sent = unsafe { libc::send(socket.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), 0) };
    if sent < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn receive(socket: &OwnedFd) -> io::Result<Vec<u8>> {
    let mut buffer = vec![0; 65536];
    // SAFETY: the pointer and the length describe `buffer`.
    let length = unsafe {
        libc::recv(
            socket.as_raw_fd(),
            buffer.as_mut_ptr().cast(),
            buffer.len(),
            0,
        )
    };
    let length = usize::try_from(length).map_err(|_| io::Error::last_os_error())?;
    buffer.truncate(length);
    Ok(buffer)
}

/// One message with one attribute.
fn message(kind: u8, queue: u16, attribute: u16, value: &[u8], flags: libc::c_int) -> Vec<u8> {
    let padded = value.len().next_multiple_of(4);
    let length = (HEADERS + 4 + padded) as u32;
    let mut bytes = length.to_ne_bytes().to_vec();
    bytes.extend([kind, libc::NFNL_SUBSYS_QUEUE as u8]);
    bytes.extend(((libc::NLM_F_REQUEST | flags) as u16).to_ne_bytes());
    bytes.extend([0; 8]);
    bytes.extend([libc::AF_UNSPEC as u8, 0]);
    bytes.extend(queue.to_be_bytes());
    bytes.extend(((4 + value.len()) as u16).to_ne_bytes());
    bytes.extend(attribute.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(length as usize, 0);
    bytes
}

/// The answer to a request with `NLM_F_ACK`: an error number, 0 for none.
fn acknowledged(answer: &[u8]) -> Result<()> {
    let code = answer
        .get(HEADER..)
        .and_then(<[u8]>::first_chunk::<4>)
        .context("a short answer")?;
    let code = i32::from_ne_bytes(*code);
    ensure!(code == 0, io::Error::from_raw_os_error(-code));
    Ok(())
}

/// The identifiers of all packets in a reception, in network order as they came.
fn packets(mut bytes: &[u8]) -> Vec<[u8; 4]> {
    let mut found = Vec::new();
    while let Some(length) = bytes.first_chunk::<4>() {
        let length = u32::from_ne_bytes(*length) as usize;
        if length < HEADERS || length > bytes.len() {
            break;
        }
        let is_packet = bytes[4] == MESSAGE_PACKET && bytes[5] == libc::NFNL_SUBSYS_QUEUE as u8;
        if is_packet {
            found.extend(identifier(&bytes[HEADERS..length]));
        }
        bytes = &bytes[length.next_multiple_of(4).min(bytes.len())..];
    }
    found
}

fn identifier(mut attributes: &[u8]) -> Option<[u8; 4]> {
    loop {
        let head = attributes.first_chunk::<4>()?;
        let length = usize::from(u16::from_ne_bytes([head[0], head[1]]));
        if u16::from_ne_bytes([head[2], head[3]]) == ATTRIBUTE_PACKET_HEADER {
            return attributes.get(4..8)?.first_chunk::<4>().copied();
        }
        attributes = attributes.get(length.max(4).next_multiple_of(4)..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identifiers_are_found_behind_other_attributes() {
        let mut one = message(MESSAGE_PACKET, 3, 9, &[0; 6], 0);
        let attribute = [
            11,
            0,
            ATTRIBUTE_PACKET_HEADER as u8,
            0,
            0,
            0,
            0,
            42,
            8,
            0,
            1,
            0,
        ];
        one.extend(attribute);
        let length = one.len() as u32;
        one[..4].copy_from_slice(&length.to_ne_bytes());
        let two = [one.clone(), one].concat();
        assert_eq!(packets(&two), [[0, 0, 0, 42], [0, 0, 0, 42]]);
    }
}
