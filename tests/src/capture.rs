//! What is on the underlay: tcpdump's capture, and the VXLAN packets in it.

use std::{
    collections::BTreeSet,
    fs,
    io::{BufRead, BufReader},
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::{Child, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use flannel_ebpf::rows::checksum;
use flannel_user::mac::MacAddr;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{namespace::Namespace, wait};

/// A running tcpdump.
#[derive(Debug)]
pub struct Capture {
    child: Child,
    file: PathBuf,
}

impl Capture {
    /// Captures what `filter` (as for tcpdump) lets through on `interface`.
    ///
    /// # Errors
    /// When tcpdump does not start.
    pub fn start(
        namespace: &Namespace,
        interface: &str,
        filter: &str,
        directory: &Path,
    ) -> Result<Self> {
        let file = tempfile::Builder::new()
            .suffix(".pcap")
            .tempfile_in(directory)?
            .into_temp_path()
            .keep()?;
        let mut command = namespace.command("tcpdump");
        command
            .args(["-i", interface, "--immediate-mode", "-U", "-n"])
            .args(["-Z", "root", "-B", "16384"])
            .arg("-w")
            .arg(&file)
            .args(filter.split_whitespace())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let mut child = namespace.spawn(command)?;
        let mut said = BufReader::new(child.stderr.take().context("tcpdump without stderr")?);
        let mut line = String::new();
        while !line.contains("listening on") {
            line.clear();
            ensure!(said.read_line(&mut line)? > 0, "tcpdump did not start");
        }
        // Its summary at the end must not fail for want of a reader.
        std::thread::spawn(move || std::io::copy(&mut said, &mut std::io::sink()));
        Ok(Self { child, file })
    }

    /// Stops it and gives every VXLAN packet.
    ///
    /// # Errors
    /// When the file is not a capture.
    pub fn stop(self) -> Result<Vec<VxlanPacket>> {
        let bytes = self.written()?;
        frames(&bytes)?
            .into_iter()
            .filter_map(|frame| VxlanPacket::parse(frame).transpose())
            .collect()
    }

    /// Stops it and gives every frame as it is.
    ///
    /// # Errors
    /// When the file is not a capture.
    pub fn stop_raw(self) -> Result<Vec<Vec<u8>>> {
        let bytes = self.written()?;
        Ok(frames(&bytes)?.into_iter().map(<[u8]>::to_vec).collect())
    }

    fn written(mut self) -> Result<Vec<u8>> {
        // Time to write down what has passed already.
        std::thread::sleep(Duration::from_millis(200));
        kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGINT)?;
        let child = &mut self.child;
        wait::until("tcpdump ends", Duration::from_secs(5), || {
            Ok(child.try_wait()?)
        })?;
        Ok(fs::read(&self.file)?)
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_file(&self.file);
    }
}

/// Outer header and inner start of one packet on the wire.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct VxlanPacket {
    /// All that a fast path has to make as the kernel does.
    pub outer: Outer,
    /// Outer IP identification: any value is right while DF is clear and nothing is fragmented.
    pub identification: u16,
    /// Outer IP length in bytes, Ethernet header not included.
    pub length: u16,
    /// Outer UDP checksum: 0 on the fast path, the named deviation.
    pub udp_checksum: u16,
    /// The inner packet's header.
    pub inner: Inner,
}

/// Every field of the outer header that has to equal the kernel's.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Outer {
    /// Ethernet source and destination.
    pub macs: (MacBytes, MacBytes),
    /// IP version and header length.
    pub version_and_length: u8,
    /// Type of service with the ECN bits.
    pub tos: u8,
    /// What the IP length is more than the inner frame.
    pub overhead: i32,
    /// Flags and fragment offset.
    pub fragment_field: u16,
    /// Time to live.
    pub ttl: u8,
    /// IP source and destination.
    pub addresses: (Ipv4Addr, Ipv4Addr),
    /// The IP checksum is right.
    pub checksum_is_right: bool,
    /// UDP source and destination.
    pub ports: (u16, u16),
    /// What the UDP length is more than the inner frame.
    pub udp_overhead: i32,
    /// The eight bytes of VXLAN.
    pub vxlan: [u8; 8],
}

/// What there is to see of the inner packet.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Inner {
    /// Ethernet source and destination.
    pub macs: (MacBytes, MacBytes),
    /// Ethernet type.
    pub ethertype: u16,
    /// Type of service with the ECN bits.
    pub tos: u8,
    /// Time to live.
    pub ttl: u8,
    /// IP protocol.
    pub protocol: u8,
    /// IP source and destination.
    pub addresses: (Ipv4Addr, Ipv4Addr),
    /// The IP checksum is right.
    pub checksum_is_right: bool,
}

/// Six bytes that sort.
pub type MacBytes = [u8; 6];

impl VxlanPacket {
    /// `None` for anything but VXLAN in IPv4.
    fn parse(frame: &[u8]) -> Result<Option<Self>> {
        let word = |at: usize| u16::from_be_bytes([frame[at], frame[at + 1]]);
        if frame.len() < 14 + 20 + 8 + 8 + 14 + 20 || word(12) != 0x0800 || frame[23] != 17 {
            return Ok(None);
        }
        let ip = 14;
        let udp = ip + usize::from(frame[ip] & 0x0f) * 4;
        let vxlan = udp + 8;
        let inner = vxlan + 8;
        let inner_ip = inner + 14;
        ensure!(frame.len() >= inner_ip + 20, "a truncated packet");
        let on_wire = i32::try_from(frame.len() - inner)?;
        Ok(Some(Self {
            outer: Outer {
                macs: macs(frame),
                version_and_length: frame[ip],
                tos: frame[ip + 1],
                overhead: i32::from(word(ip + 2)) - on_wire,
                fragment_field: word(ip + 6),
                ttl: frame[ip + 8],
                addresses: addresses(&frame[ip..]),
                checksum_is_right: checksum_is_right(&frame[ip..udp]),
                ports: (word(udp), word(udp + 2)),
                udp_overhead: i32::from(word(udp + 4)) - on_wire,
                vxlan: *frame[vxlan..].first_chunk().context("VXLAN header")?,
            },
            identification: word(ip + 4),
            length: word(ip + 2),
            udp_checksum: word(udp + 6),
            inner: Inner {
                macs: macs(&frame[inner..]),
                ethertype: word(inner + 12),
                tos: frame[inner_ip + 1],
                ttl: frame[inner_ip + 8],
                protocol: frame[inner_ip + 9],
                addresses: addresses(&frame[inner_ip..]),
                checksum_is_right: checksum_is_right(&frame[inner_ip..inner_ip + 20]),
            },
        }))
    }

    /// Whether it goes from pod to pod by UDP.
    #[must_use]
    pub fn is_udp_between(&self, from: Ipv4Addr, to: Ipv4Addr) -> bool {
        self.inner.protocol == 17 && self.inner.addresses == (from, to)
    }
}

/// All different outer headers of some packets.
#[must_use]
pub fn outer_headers<'a>(packets: impl IntoIterator<Item = &'a VxlanPacket>) -> BTreeSet<Outer> {
    packets
        .into_iter()
        .map(|packet| packet.outer.clone())
        .collect()
}

fn macs(frame: &[u8]) -> (MacBytes, MacBytes) {
    let mac = |at: usize| *frame[at..].first_chunk().expect("a whole Ethernet header");
    (mac(6), mac(0))
}

fn addresses(ip: &[u8]) -> (Ipv4Addr, Ipv4Addr) {
    let address = |at: usize| Ipv4Addr::new(ip[at], ip[at + 1], ip[at + 2], ip[at + 3]);
    (address(12), address(16))
}

fn checksum_is_right(header: &[u8]) -> bool {
    checksum(header) == [0, 0]
}

/// The frames of a little-endian pcap file.
fn frames(mut bytes: &[u8]) -> Result<Vec<&[u8]>> {
    let number = |bytes: &[u8]| -> Option<u32> { Some(u32::from_le_bytes(*bytes.first_chunk()?)) };
    ensure!(
        number(bytes) == Some(0xa1b2_c3d4),
        "this is not a capture with microseconds in this machine's byte order"
    );
    bytes = &bytes[24..];
    let mut frames = Vec::new();
    while let Some(header) = bytes.first_chunk::<16>() {
        let length = number(&header[8..]).context("a record header")? as usize;
        let Some(frame) = bytes[16..].get(..length) else {
            break; // tcpdump was stopped while writing
        };
        frames.push(frame);
        bytes = &bytes[16 + length..];
    }
    Ok(frames)
}

/// Text of a MAC address in a capture.
#[must_use]
pub fn mac_text(bytes: MacBytes) -> String {
    MacAddr(bytes).to_string()
}
