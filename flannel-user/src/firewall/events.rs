//! Changes of nftables as the kernel tells them; rules of iptables-nft are among them.
//!
//! Busy hosts change rules all the time (kube-proxy above all), so an event is looked at just far
//! enough to see whether it concerns a chain that ours hang on.

use std::io;

use netlink_packet_core::NlasIterator;
use netlink_sys::{Socket, protocols::NETLINK_NETFILTER};
use tokio::{io::unix::AsyncFd, sync::mpsc};
use tracing::warn;

use crate::datapath::netlink::socket::NetlinkFd;

/// Receive buffer in bytes. If it overflows all the same, everything is looked at.
const RECEIVE_BUFFER: usize = 1 << 20;
const GROUP_NFTABLES: u32 = 7;
const SUBSYSTEM_NFTABLES: u8 = 10;
const NLMSG_HEADER: usize = 16;
/// Family, version and resource id follow the header of a netfilter message.
const NFGEN_HEADER: usize = 4;

const NEWTABLE: u8 = 0;
const DELTABLE: u8 = 2;
const NEWCHAIN: u8 = 3;
const DELCHAIN: u8 = 5;
const NEWRULE: u8 = 6;
const DELRULE: u8 = 8;

/// Name of the table, in messages about tables, chains and rules alike.
const TABLE: u16 = 1;
const RULE_CHAIN: u16 = 2;
const CHAIN_NAME: u16 = 3;
/// The flags in an attribute's kind.
const KIND: u16 = 0x3fff;

/// Chains whose changes concern us, in whatever table.
const CHAINS: [&[u8]; 4] = [
    b"FLANNEL-POSTRTG",
    b"FLANNEL-FWD",
    b"POSTROUTING",
    b"FORWARD",
];
/// Tables whose coming and going concerns us.
const TABLES: [&[u8]; 2] = [b"nat", b"filter"];
/// Our own tables: everything in them concerns us.
const OURS: &[u8] = b"flannel-";

/// Starts listening in the network namespace of the calling thread. Many changes become one
/// wake-up.
///
/// # Errors
/// The socket's. Must be called within a tokio runtime.
pub(super) fn listen() -> io::Result<mpsc::Receiver<()>> {
    let socket = Socket::new(NETLINK_NETFILTER)?;
    let socket = NetlinkFd::listening(socket, RECEIVE_BUFFER, &[GROUP_NFTABLES])?.register()?;
    let (sender, receiver) = mpsc::channel(1);
    tokio::spawn(forward(socket, sender));
    Ok(receiver)
}

async fn forward(socket: AsyncFd<NetlinkFd>, sender: mpsc::Sender<()>) {
    let mut datagram = vec![0; 64 << 10];
    loop {
        let ready = tokio::select! {
            ready = socket.readable() => ready,
            () = sender.closed() => return,
        };
        let received = ready.map(|mut guard| {
            guard.try_io(|socket| {
                let socket = socket.get_ref();
                socket.0.recv(&mut &mut datagram[..], 0)
            })
        });
        let wakes = match received {
            Err(error) => {
                warn!(%error, "nftables events end: the runtime is shutting down");
                return;
            }
            Ok(Err(_would_block)) => false,
            Ok(Ok(Ok(length))) => concerns_us(&datagram[..length]),
            // Events were lost: anything may have changed.
            Ok(Ok(Err(_))) => true,
        };
        if wakes {
            // A full channel means that somebody is about to look anyway.
            let _ = sender.try_send(());
        }
    }
}

/// True if any message in the datagram is about a chain that matters.
fn concerns_us(mut datagram: &[u8]) -> bool {
    while let Some((length, _)) = datagram.split_first_chunk::<4>() {
        let length = u32::from_ne_bytes(*length) as usize;
        if length < NLMSG_HEADER || length > datagram.len() {
            return false;
        }
        if message_concerns_us(&datagram[..length]) == Some(true) {
            return true;
        }
        datagram = &datagram[((length + 3) & !3).min(datagram.len())..];
    }
    false
}

fn message_concerns_us(message: &[u8]) -> Option<bool> {
    let [kind, subsystem] = u16::from_ne_bytes(message.get(4..6)?.try_into().ok()?).to_le_bytes();
    if subsystem != SUBSYSTEM_NFTABLES {
        return None;
    }
    let attributes = message.get(NLMSG_HEADER + NFGEN_HEADER..)?;
    let text = |wanted| {
        NlasIterator::new(attributes)
            .flatten()
            .find(|attribute| attribute.kind() & KIND == wanted)
            .map(|attribute| {
                attribute
                    .value()
                    .split(|byte| *byte == 0)
                    .next()
                    .unwrap_or(&[])
                    .to_vec()
            })
    };
    let table = text(TABLE)?;
    if table.starts_with(OURS) {
        return Some(true);
    }
    let is_among = |chain: Option<Vec<u8>>| chain.is_some_and(|chain| CHAINS.contains(&&chain[..]));
    match kind {
        NEWTABLE | DELTABLE => Some(TABLES.contains(&&table[..])),
        NEWCHAIN | DELCHAIN => Some(is_among(text(CHAIN_NAME))),
        NEWRULE | DELRULE => Some(is_among(text(RULE_CHAIN))),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u8, attributes: &[(u16, &str)]) -> Vec<u8> {
        let mut body = vec![2, 0, 0, 0];
        for (kind, text) in attributes {
            let length = 5 + text.len();
            body.extend((length as u16).to_ne_bytes());
            body.extend(kind.to_ne_bytes());
            body.extend(text.bytes());
            body.resize(body.len() + 1 + (4 - length % 4) % 4, 0);
        }
        let mut bytes = Vec::new();
        bytes.extend((NLMSG_HEADER as u32 + body.len() as u32).to_ne_bytes());
        bytes.extend(u16::from_le_bytes([kind, SUBSYSTEM_NFTABLES]).to_ne_bytes());
        bytes.extend([0; 10]);
        bytes.extend(body);
        bytes
    }

    #[test]
    fn only_what_ours_hangs_on_wakes() {
        let rows = [
            (
                message(DELRULE, &[(TABLE, "nat"), (RULE_CHAIN, "FLANNEL-POSTRTG")]),
                true,
            ),
            (
                message(NEWRULE, &[(TABLE, "filter"), (RULE_CHAIN, "FORWARD")]),
                true,
            ),
            (
                message(NEWRULE, &[(TABLE, "nat"), (RULE_CHAIN, "KUBE-SERVICES")]),
                false,
            ),
            (
                message(DELCHAIN, &[(TABLE, "filter"), (CHAIN_NAME, "FLANNEL-FWD")]),
                true,
            ),
            (
                message(NEWCHAIN, &[(TABLE, "nat"), (CHAIN_NAME, "KUBE-SEP-1")]),
                false,
            ),
            (message(DELTABLE, &[(TABLE, "nat")]), true),
            (message(DELTABLE, &[(TABLE, "mangle")]), false),
            (
                message(DELRULE, &[(TABLE, "flannel-ipv4"), (RULE_CHAIN, "forward")]),
                true,
            ),
            (message(15, &[(TABLE, "xxx")]), false),
        ];
        for (datagram, expected) in &rows {
            assert_eq!(concerns_us(datagram), *expected, "{datagram:?}");
        }
        let all: Vec<u8> = rows
            .iter()
            .rev()
            .flat_map(|(bytes, _)| bytes.clone())
            .collect();
        assert!(concerns_us(&all));
        for cut in 0..all.len() {
            let _ = concerns_us(&all[..cut]);
        }
    }
}
