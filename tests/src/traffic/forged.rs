//! VXLAN packets made by hand: with an outer header of one's choice, or from
//! someone who is no peer at all.

use std::{
    net::{Ipv4Addr, SocketAddrV4, UdpSocket},
    thread,
    time::Duration,
};

use anyhow::Result;
use flannel_ebpf::rows::checksum;
use flannel_user::mac::MacAddr;
use serde::{Deserialize, Serialize};

use super::{datagrams, ready, socket};

/// Where kernels receive VXLAN.
const VXLAN_PORT: u16 = 8472;
/// Ethernet, IPv4, UDP.
const INNER_HEADERS: usize = 14 + 20 + 8;

/// Arguments. The payload is that of `udp-send`.
#[derive(Debug, clap::Args)]
pub struct ForgeArgs {
    /// The node to send to.
    #[arg(long)]
    node: Ipv4Addr,
    /// Outer source; has to be an address of the sender.
    #[arg(long, default_value_t = Ipv4Addr::UNSPECIFIED)]
    outer_from: Ipv4Addr,
    /// Outer type of service.
    #[arg(long, default_value_t = 0)]
    outer_tos: u8,
    /// VXLAN network identifier.
    #[arg(long, default_value_t = 1)]
    vni: u32,
    /// Inner Ethernet source.
    #[arg(long)]
    inner_source_mac: MacAddr,
    /// Inner Ethernet destination: the receiver's tunnel device.
    #[arg(long)]
    inner_destination_mac: MacAddr,
    /// Inner source.
    #[arg(long)]
    from: Ipv4Addr,
    /// Inner destination and UDP port.
    #[arg(long)]
    to: SocketAddrV4,
    /// Inner type of service.
    #[arg(long, default_value_t = 0)]
    tos: u8,
    /// Inner time to live.
    #[arg(long, default_value_t = 63)]
    ttl: u8,
    /// How many.
    #[arg(long, default_value_t = 1)]
    count: u64,
    /// Number of the first one.
    #[arg(long, default_value_t = 0)]
    first: u64,
    /// Bytes of inner payload.
    #[arg(long, default_value_t = 64)]
    size: usize,
}

/// What was sent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForgeReport {
    /// Packets.
    pub sent: u64,
}

/// Sends.
///
/// # Errors
/// When the socket fails.
pub fn send(args: &ForgeArgs) -> Result<ForgeReport> {
    let sender = UdpSocket::bind((args.outer_from, 0))?;
    socket::set_option(
        &sender,
        libc::IPPROTO_IP,
        libc::IP_TOS,
        args.outer_tos.into(),
    )?;
    ready()?;
    for number in args.first..args.first + args.count {
        sender.send_to(&packet(args, number), (args.node, VXLAN_PORT))?;
        thread::sleep(Duration::from_micros(500));
    }
    Ok(ForgeReport { sent: args.count })
}

/// VXLAN header and inner frame.
fn packet(args: &ForgeArgs, number: u64) -> Vec<u8> {
    let payload = datagrams::payload(number, args.size);
    let mut bytes = Vec::with_capacity(8 + INNER_HEADERS + payload.len());
    bytes.extend([0x08, 0, 0, 0]);
    bytes.extend((args.vni << 8).to_be_bytes());
    bytes.extend(args.inner_destination_mac.0);
    bytes.extend(args.inner_source_mac.0);
    bytes.extend([0x08, 0x00]);
    bytes.extend(ipv4_header(args, 8 + payload.len()));
    // UDP without checksum, which IPv4 allows.
    bytes.extend(40_000_u16.to_be_bytes());
    bytes.extend(args.to.port().to_be_bytes());
    bytes.extend(length_field(8 + payload.len()));
    bytes.extend([0, 0]);
    bytes.extend(payload);
    bytes
}

fn length_field(length: usize) -> [u8; 2] {
    u16::try_from(length)
        .expect("forged packets are small")
        .to_be_bytes()
}

fn ipv4_header(args: &ForgeArgs, payload: usize) -> [u8; 20] {
    let mut header = [0; 20];
    header[0] = 0x45;
    header[1] = args.tos;
    header[2..4].copy_from_slice(&length_field(20 + payload));
    header[8] = args.ttl;
    header[9] = 17;
    header[12..16].copy_from_slice(&args.from.octets());
    header[16..20].copy_from_slice(&args.to.ip().octets());
    let checksum = checksum(&header);
    header[10..12].copy_from_slice(&checksum);
    header
}
