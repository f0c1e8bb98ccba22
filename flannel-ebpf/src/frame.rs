//! One packet: the BPF context in the kernel, a byte slice in tests.

use crate::header::Header;

/// A packet from its Ethernet header on.
pub trait Frame {
    /// The `T` at `offset` bytes after the start; `None` past the end of what
    /// can be read directly.
    fn at<T: Header>(&self, offset: usize) -> Option<&T>;

    /// What the kernel knows of the packet beside its bytes.
    fn meta(&self) -> Meta;

    /// Up to 16 bytes at `offset`, data in pages included; zeros where `len` is less or the
    /// packet ends.
    fn start(&self, offset: usize, len: u32) -> [u8; 16];
}

/// The packet's metadata.
#[derive(Clone, Copy, Debug, Default)]
pub struct Meta {
    /// Whole length in bytes from the Ethernet header on, data in pages included.
    pub len: u32,
    /// Interface it came in by.
    pub ifindex: u32,
    /// Payload bytes of one segment when segmentation is still to be done, else 0.
    pub gso_size: u32,
    /// `PACKET_HOST` is 0; anything else is not for this host.
    pub packet_type: u32,
    /// A VLAN tag was taken off into the metadata.
    pub vlan: bool,
}

/// Packets are at least bytes.
#[derive(Clone, Copy)]
pub struct Bytes<'a> {
    /// The packet from its Ethernet header on.
    pub bytes: &'a [u8],
    /// Its metadata; `len` counts even where it disagrees with `bytes`.
    pub meta: Meta,
}

impl<'a> Bytes<'a> {
    /// A packet without offloads, received on interface `ifindex`.
    #[must_use]
    pub fn plain(bytes: &'a [u8], ifindex: u32) -> Self {
        let meta = Meta {
            len: bytes.len() as u32,
            ifindex,
            ..Meta::default()
        };
        Self { bytes, meta }
    }
}

impl Frame for Bytes<'_> {
    fn at<T: Header>(&self, offset: usize) -> Option<&T> {
        let window = self.bytes.get(offset..offset.checked_add(T::LEN)?)?;
        // SAFETY: `window` holds `T::LEN` bytes; `Header` promises alignment 1 and no invalid value.
        Some(unsafe { &*window.as_ptr().cast::<T>() })
    }

    fn meta(&self) -> Meta {
        self.meta
    }

    fn start(&self, offset: usize, len: u32) -> [u8; 16] {
        let mut start = [0; 16];
        let end = self.bytes.len().min(offset + len.min(16) as usize);
        if let Some(bytes) = self.bytes.get(offset..end) {
            start[..bytes.len()].copy_from_slice(bytes);
        }
        start
    }
}
