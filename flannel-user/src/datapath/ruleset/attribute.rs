//! Netlink attributes as pairs of kind and value, without a copy.

use netlink_packet_core::{NLA_HEADER_SIZE, NlasIterator};

/// The attributes in `bytes`; what is cut ends them.
pub(super) fn attributes(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    NlasIterator::new(bytes).flatten().map(|attribute| {
        let kind = attribute.kind();
        let length = usize::from(attribute.length());
        (kind, &attribute.into_inner()[NLA_HEADER_SIZE..length])
    })
}

/// The first attribute of a kind.
pub(super) fn attribute(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes)
        .find(|(found, _)| *found == kind)
        .map(|(_, value)| value)
}

/// A name that ends with a zero byte.
pub(super) fn text(value: &[u8]) -> &str {
    let end = value.iter().position(|byte| *byte == 0);
    str::from_utf8(&value[..end.unwrap_or(value.len())]).unwrap_or("?")
}

/// A number in network byte order.
pub(super) fn number(value: &[u8]) -> Option<u32> {
    Some(u32::from_be_bytes(*value.first_chunk()?))
}

/// A number attribute of a kind.
pub(super) fn number_of(bytes: &[u8], kind: u16) -> Option<u32> {
    number(attribute(bytes, kind)?)
}

/// Appends an attribute.
pub(super) fn append(bytes: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let length = (NLA_HEADER_SIZE + value.len()) as u16;
    bytes.extend(length.to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_appended_is_found() {
        let mut bytes = Vec::new();
        append(&mut bytes, 1, b"filter\0");
        append(&mut bytes, 3, &7_u32.to_be_bytes());
        assert_eq!(attribute(&bytes, 1).map(text), Some("filter"));
        assert_eq!(number_of(&bytes, 3), Some(7));
        assert_eq!(number_of(&bytes, 1), Some(0x6669_6c74));
        assert_eq!(attribute(&bytes, 2), None);
        for cut in 0..bytes.len() {
            let _ = attributes(&bytes[..cut]).count();
        }
    }
}
