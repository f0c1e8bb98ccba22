//! Which kernel modules the guest needs, with all that they need.

use std::collections::{BTreeMap, BTreeSet};

/// What nodes, pods, tunnels and filters are made of; a name that a kernel has built in, or does
/// not have, is no mistake.
pub(super) const WANTED: [&str; 15] = [
    "veth",
    "vxlan",
    "bridge",
    "br_netfilter",
    "dummy",
    "sch_ingress",
    "sch_fq",
    "sch_fq_codel",
    "cls_bpf",
    "act_bpf",
    "nf_conntrack",
    "nf_tables",
    "nft_ct",
    "nft_masq",
    "nft_chain_nat",
];

/// Paths, relative to the modules directory, of the `wanted` modules and everything they need.
pub(super) fn with_dependencies<'a>(modules_dep: &'a str, wanted: &[&str]) -> BTreeSet<&'a str> {
    let needs: BTreeMap<&str, Vec<&str>> = modules_dep
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(module, needs)| (module, needs.split_whitespace().collect()))
        .collect();
    let mut open: Vec<&str> = needs
        .keys()
        .copied()
        .filter(|path| wanted.contains(&name(path).as_str()))
        .collect();
    let mut found = BTreeSet::new();
    while let Some(path) = open.pop() {
        if found.insert(path) {
            open.extend(needs.get(path).into_iter().flatten());
        }
    }
    found
}

/// `kernel/drivers/net/vxlan/vxlan.ko.xz` is `vxlan`.
fn name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    let stem = file.split(".ko").next().unwrap_or(file);
    stem.replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_brings_what_it_needs() {
        let modules_dep = "\
kernel/drivers/net/vxlan/vxlan.ko.xz: kernel/net/ipv4/udp_tunnel.ko.xz kernel/net/ipv6/ip6_udp_tunnel.ko.xz
kernel/net/ipv4/udp_tunnel.ko.xz:
kernel/net/ipv6/ip6_udp_tunnel.ko.xz: kernel/lib/deep.ko.xz
kernel/lib/deep.ko.xz:
kernel/drivers/net/veth.ko.xz:
";
        let found = with_dependencies(modules_dep, &["vxlan", "built-in"]);
        assert_eq!(
            found.into_iter().collect::<Vec<_>>(),
            [
                "kernel/drivers/net/vxlan/vxlan.ko.xz",
                "kernel/lib/deep.ko.xz",
                "kernel/net/ipv4/udp_tunnel.ko.xz",
                "kernel/net/ipv6/ip6_udp_tunnel.ko.xz",
            ]
        );
    }
}
