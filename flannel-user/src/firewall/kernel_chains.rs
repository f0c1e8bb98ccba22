//! Which nftables tables and chains the kernel has, asked directly: an answer takes microseconds, a
//! run of nft milliseconds, and at the start of the agent every one of them counts.
//!
//! Chains of iptables-nft are among them. What stands *in* a chain only its own tool can tell.

use std::io;

use netlink_packet_core::NlasIterator;
use netlink_sys::protocols::NETLINK_NETFILTER;
use tracing::debug;

use crate::datapath::netlink::socket::NetlinkFd;

const SUBSYSTEM_NFTABLES: u8 = 10;
const NFT_MSG_GETTABLE: u8 = 1;
const NFT_MSG_GETCHAIN: u8 = 4;
const NLM_F_REQUEST_DUMP: u16 = 0x301;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLMSG_HEADER: usize = 16;
/// Family, version and resource id follow the header of a netfilter message.
const NFGEN_HEADER: usize = 4;
/// Name of the table, in messages about tables and chains alike.
const TABLE: u16 = 1;
const CHAIN_NAME: u16 = 3;
/// Without the flags in an attribute's kind.
const KIND: u16 = 0x3fff;

/// The address family of tables for IPv4.
pub(super) const IP: u8 = 2;
/// The address family of tables for IPv6.
pub(super) const IP6: u8 = 10;

/// A table, or a chain in one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Object {
    pub(super) family: u8,
    pub(super) table: String,
    /// Empty for a table.
    pub(super) chain: String,
}

/// The tables of this network namespace. None, if the kernel has no nftables.
pub(super) fn tables() -> Vec<Object> {
    dump_or_nothing(NFT_MSG_GETTABLE)
}

/// The chains of this network namespace. None, if the kernel has no nftables.
pub(super) fn chains() -> Vec<Object> {
    dump_or_nothing(NFT_MSG_GETCHAIN)
}

fn dump_or_nothing(question: u8) -> Vec<Object> {
    dump(question).unwrap_or_else(|error| {
        debug!(%error, "the kernel lists no nftables");
        Vec::new()
    })
}

fn dump(question: u8) -> io::Result<Vec<Object>> {
    let socket = NetlinkFd::asking(NETLINK_NETFILTER)?;

    let mut request = Vec::with_capacity(NLMSG_HEADER + NFGEN_HEADER);
    request.extend((NLMSG_HEADER as u32 + NFGEN_HEADER as u32).to_ne_bytes());
    request.extend(u16::from_le_bytes([question, SUBSYSTEM_NFTABLES]).to_ne_bytes());
    request.extend(NLM_F_REQUEST_DUMP.to_ne_bytes());
    // Sequence and port; then every family.
    request.extend([0; 8 + NFGEN_HEADER]);
    socket.0.send(&request, 0)?;

    let mut objects = Vec::new();
    let mut datagram = vec![0; 64 << 10];
    loop {
        let length = socket.0.recv(&mut &mut datagram[..], 0)?;
        if read(&datagram[..length], &mut objects)? {
            return Ok(objects);
        }
    }
}

/// Takes the objects out of one datagram; true after the last.
fn read(mut datagram: &[u8], objects: &mut Vec<Object>) -> io::Result<bool> {
    while let Some((length, _)) = datagram.split_first_chunk::<4>() {
        let length = u32::from_ne_bytes(*length) as usize;
        if length < NLMSG_HEADER || length > datagram.len() {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let message = &datagram[..length];
        match u16::from_ne_bytes([message[4], message[5]]) {
            NLMSG_DONE => return Ok(true),
            NLMSG_ERROR => {
                let code = message[NLMSG_HEADER..].first_chunk::<4>();
                let code = code.map_or(0, |code| i32::from_ne_bytes(*code));
                return Err(io::Error::from_raw_os_error(-code));
            }
            _ => objects.extend(object(&message[NLMSG_HEADER..])),
        }
        datagram = &datagram[((length + 3) & !3).min(datagram.len())..];
    }
    Ok(false)
}

fn object(body: &[u8]) -> Option<Object> {
    let attributes = body.get(NFGEN_HEADER..)?;
    let text = |wanted| {
        NlasIterator::new(attributes)
            .flatten()
            .find(|attribute| attribute.kind() & KIND == wanted)
            .map(|attribute| {
                let bytes = attribute.value().split(|byte| *byte == 0).next();
                String::from_utf8_lossy(bytes.unwrap_or_default()).into_owned()
            })
    };
    Some(Object {
        family: *body.first()?,
        table: text(TABLE)?,
        chain: text(CHAIN_NAME).unwrap_or_default(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u16, body: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend((NLMSG_HEADER as u32 + body.len() as u32).to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend([0; 10]);
        bytes.extend(body);
        bytes
    }

    #[test]
    fn chains_are_read_to_the_end_and_a_refusal_is_an_error() {
        let chain = [
            2, 0, 0, 0, // family
            8, 0, 1, 0, b'n', b'a', b't', 0, // table
            6, 0, 3, 0, b'F', 0, 0, 0, // name
        ];
        let kind = u16::from_le_bytes([3, SUBSYSTEM_NFTABLES]);
        let mut datagram = message(kind, &chain);
        let mut objects = Vec::new();
        assert!(!read(&datagram, &mut objects).expect("readable"));
        let expected = Object {
            family: IP,
            table: "nat".to_owned(),
            chain: "F".to_owned(),
        };
        assert_eq!(objects, [expected]);
        datagram.extend(message(NLMSG_DONE, &[0; 4]));
        assert!(read(&datagram, &mut objects).expect("readable"));
        for cut in 0..datagram.len() {
            let _ = read(&datagram[..cut], &mut objects);
        }
        let refused = message(NLMSG_ERROR, &(-libc::EPERM).to_ne_bytes());
        let error = read(&refused, &mut objects).expect_err("refused");
        assert_eq!(error.raw_os_error(), Some(libc::EPERM));
    }
}
