//! A cluster of any size, as its leases.

use std::{fs, io, net::Ipv4Addr, path::Path};

use ipnet::Ipv4Net;

/// All pods of the large cluster.
pub const NETWORK: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(10, 0, 0, 0), 8);
/// The network config that has room for it.
pub const CONFIG: &str = r#"{"Network":"10.0.0.0/8","SubnetLen":26,"Backend":{"Type":"vxlan"}}"#;
/// Where the nodes that do not exist would be on the underlay.
pub const UNDERLAY: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(100, 64, 0, 0), 10);

/// Length of every node's subnet.
const LENGTH: u8 = 26;
/// The upper half: real nodes take from the lower end.
const FIRST: u32 = u32::from_be_bytes([10, 128, 0, 0]);
/// Addresses in a subnet.
const STEP: u32 = 1 << (32 - LENGTH);

/// Subnet of node `number` of those that do not exist.
#[must_use]
pub fn subnet(number: u32) -> Ipv4Net {
    Ipv4Net::new_assert(Ipv4Addr::from(FIRST + number * STEP), LENGTH)
}

/// Name and JSON of its lease, as flannel writes both.
#[must_use]
pub fn lease(number: u32) -> (String, String) {
    let subnet = subnet(number);
    let node = Ipv4Addr::from(u32::from(UNDERLAY.network()) + 1 + number);
    let [_, b, c, d] = number.to_be_bytes();
    let json = format!(
        r#"{{"PublicIP":"{node}","PublicIPv6":null,"BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"02:00:00:{b:02x}:{c:02x}:{d:02x}"}}}}"#
    );
    (format!("{}-{LENGTH}", subnet.network()), json)
}

/// Writes the lease of `number` where agents look for it, whole or not at all.
///
/// # Errors
/// When the file cannot be written.
pub fn write(directory: &Path, number: u32) -> io::Result<()> {
    let (name, json) = lease(number);
    let subnets = directory.join("subnets");
    fs::create_dir_all(&subnets)?;
    let beside = subnets.join(format!(".{name}.tmp"));
    fs::write(&beside, json)?;
    fs::rename(&beside, subnets.join(name))
}

/// Removes it.
///
/// # Errors
/// When it is not there.
pub fn remove(directory: &Path, number: u32) -> io::Result<()> {
    fs::remove_file(directory.join("subnets").join(lease(number).0))
}

/// `count` pod addresses in the first `subnets` subnets, in no order that a cache could like.
#[must_use]
pub fn scattered(subnets: u32, count: u32) -> Vec<Ipv4Addr> {
    (0..count)
        .map(|index| {
            // Knuth's multiplicative hash: every subnet equally often, neighbours far apart.
            let number = index.wrapping_mul(2_654_435_761) % subnets;
            Ipv4Addr::from(u32::from(subnet(number).network()) + 2)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_hundred_thousand_nodes_have_each_their_own() {
        let mut all = BTreeSet::new();
        for number in [0, 1, 99_999] {
            let subnet = subnet(number);
            assert!(NETWORK.contains(&subnet));
            assert!(all.insert(subnet));
            assert!(all.iter().filter(|other| other.contains(&subnet)).count() == 1);
        }
        assert_eq!(lease(258).0, "10.128.64.128-26");
        assert!(lease(258).1.contains(r#""PublicIP":"100.64.1.3""#));
        assert!(lease(258).1.contains("02:00:00:00:01:02"));
    }

    #[test]
    fn scattered_addresses_stay_inside() {
        let addresses = scattered(10, 1000);
        let different: BTreeSet<_> = addresses.iter().collect();
        assert_eq!(different.len(), 10);
        assert!(
            addresses
                .iter()
                .all(|one| subnet(9).network() > *one || subnet(9).contains(one))
        );
    }
}
