//! What kube-proxy's iptables mode and flannel write into a node's netfilter:
//! a hundred Services, forwarding by permission only, masquerade.
//!
//! The text follows kube-proxy's chains (`KUBE-SERVICES` → `KUBE-SVC-…` →
//! `KUBE-SEP-…`) and its way of committing: one `iptables-restore`, later ones
//! with `--noflush` for the chains that change.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    net::{Ipv4Addr, SocketAddrV4},
};

use anyhow::Result;
use ipnet::Ipv4Net;

use crate::{node::Node, traffic::request_response::Protocol};

/// Services in all, as many as a small cluster has.
pub const SERVICES: usize = 100;
/// Their addresses.
pub const SERVICE_NETWORK: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(10, 96, 0, 0), 16);

/// The rules of every node of a cluster.
#[derive(Debug, Clone)]
pub struct Rules {
    network: Ipv4Net,
    services: BTreeMap<Key, Vec<SocketAddrV4>>,
    masquerade: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    address: SocketAddrV4,
    udp: bool,
}

impl Key {
    fn protocol(self) -> &'static str {
        if self.udp { "udp" } else { "tcp" }
    }

    /// Sixteen letters and digits, where kube-proxy has a hash of the name.
    fn service_chain(self) -> String {
        format!(
            "KUBE-SVC-{:08X}{:04X}{:04X}",
            u32::from(*self.address.ip()),
            self.address.port(),
            u8::from(self.udp)
        )
    }

    fn endpoint_chain(self, endpoint: SocketAddrV4) -> String {
        // Both ends in the name: two Services may share an endpoint.
        let service = (u32::from(*self.address.ip()) ^ u32::from(self.address.port()) << 8)
            .rotate_left(u32::from(self.udp))
            & 0xff_ffff;
        format!(
            "KUBE-SEP-{service:06X}{:06X}{:04X}",
            u32::from(*endpoint.ip()) & 0xff_ffff,
            endpoint.port()
        )
    }
}

impl Rules {
    /// For a cluster whose pods are in `network`; all Services are others' at first.
    #[must_use]
    pub fn new(network: Ipv4Net) -> Self {
        Self {
            network,
            services: BTreeMap::new(),
            masquerade: true,
        }
    }

    /// With a Service, or with other endpoints for it; without any it rejects.
    #[must_use]
    pub fn service(
        mut self,
        address: Ipv4Addr,
        port: u16,
        protocol: Protocol,
        endpoints: &[SocketAddrV4],
    ) -> Self {
        self.services
            .insert(key(address, port, protocol), endpoints.to_vec());
        self
    }

    /// Without that Service.
    #[must_use]
    pub fn without_service(mut self, address: Ipv4Addr, port: u16, protocol: Protocol) -> Self {
        self.services.remove(&key(address, port, protocol));
        self
    }

    /// Without flannel's masquerade, for agents that keep their own.
    #[must_use]
    pub fn without_masquerade(mut self) -> Self {
        self.masquerade = false;
        self
    }

    /// Makes the rules those of `node`. The first time this sets every table anew;
    /// after that it changes the Services' chains only, as kube-proxy does, so that
    /// what others have added stays.
    ///
    /// # Errors
    /// When `iptables-restore` refuses.
    pub fn apply(&self, node: &Node) -> Result<()> {
        let namespace = node.namespace();
        let present = namespace.run(&["iptables-save", "-t", "nat"])?;
        let present: BTreeSet<&str> = present
            .lines()
            .filter_map(|line| line.strip_prefix(':')?.split_whitespace().next())
            .collect();
        if !present.contains("KUBE-SERVICES") {
            // Per namespace, and without it the bridge's port-to-port path skips the rules.
            namespace.sysctl("net.bridge.bridge-nf-call-iptables", "1")?;
            return namespace
                .run_with_input(&["iptables-restore"], &self.whole(node.subnet()?))
                .map(drop);
        }
        namespace
            .run_with_input(&["iptables-restore", "--noflush"], &self.change(&present))
            .map(drop)
    }

    /// The same for several nodes.
    ///
    /// # Errors
    /// As [`Self::apply`].
    pub fn apply_to(&self, nodes: &[&Node]) -> Result<()> {
        nodes.iter().try_for_each(|node| self.apply(node))
    }

    /// Takes every rule away from `node`, whoever wrote it, and forwards all again.
    ///
    /// # Errors
    /// When `iptables-restore` refuses.
    pub fn remove(&self, node: &Node) -> Result<()> {
        const EMPTY: &str = "*filter\n:INPUT ACCEPT [0:0]\n:FORWARD ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\nCOMMIT\n\
             *nat\n:PREROUTING ACCEPT [0:0]\n:INPUT ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n:POSTROUTING ACCEPT [0:0]\nCOMMIT\n";
        node.namespace()
            .run_with_input(&["iptables-restore"], EMPTY)
            .map(drop)
    }

    /// Everything that a table can hold.
    fn whole(&self, subnet: Ipv4Net) -> String {
        format!(
            "{}{}",
            self.filter_table(),
            self.nat_table(&BTreeSet::new(), Some(subnet))
        )
    }

    /// The chains of Services only; those of Services that are gone are deleted.
    fn change(&self, present: &BTreeSet<&str>) -> String {
        let mut text = "*filter\n:KUBE-SERVICES - [0:0]\n".to_owned();
        self.reject_where_nobody_is(&mut text);
        text + "COMMIT\n" + &self.nat_table(present, None)
    }

    fn filter_table(&self) -> String {
        let network = self.network;
        let mut text = "\
*filter
:INPUT ACCEPT [0:0]
:FORWARD DROP [0:0]
:OUTPUT ACCEPT [0:0]
:KUBE-EXTERNAL-SERVICES - [0:0]
:KUBE-FIREWALL - [0:0]
:KUBE-FORWARD - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-PROXY-FIREWALL - [0:0]
:KUBE-SERVICES - [0:0]
:LAB-FWD - [0:0]
-A INPUT -m conntrack --ctstate NEW -m comment --comment \"kubernetes load balancer firewall\" -j KUBE-PROXY-FIREWALL
-A INPUT -m comment --comment \"kubernetes health check service ports\" -j KUBE-NODEPORTS
-A INPUT -m conntrack --ctstate NEW -m comment --comment \"kubernetes externally-visible service portals\" -j KUBE-EXTERNAL-SERVICES
-A INPUT -j KUBE-FIREWALL
-A FORWARD -m conntrack --ctstate NEW -m comment --comment \"kubernetes load balancer firewall\" -j KUBE-PROXY-FIREWALL
-A FORWARD -m comment --comment \"kubernetes forwarding rules\" -j KUBE-FORWARD
-A FORWARD -m conntrack --ctstate NEW -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A FORWARD -m conntrack --ctstate NEW -m comment --comment \"kubernetes externally-visible service portals\" -j KUBE-EXTERNAL-SERVICES
-A FORWARD -m comment --comment \"flanneld forward\" -j LAB-FWD
-A OUTPUT -m conntrack --ctstate NEW -m comment --comment \"kubernetes load balancer firewall\" -j KUBE-PROXY-FIREWALL
-A OUTPUT -m conntrack --ctstate NEW -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A OUTPUT -j KUBE-FIREWALL
-A KUBE-FIREWALL ! -s 127.0.0.0/8 -d 127.0.0.0/8 -m comment --comment \"block incoming localnet connections\" -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m comment --comment \"kubernetes forwarding rules\" -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-FORWARD -m comment --comment \"kubernetes forwarding conntrack rule\" -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
"
        .to_owned();
        self.reject_where_nobody_is(&mut text);
        for side in ["-s", "-d"] {
            add(
                &mut text,
                format_args!(
                    "-A LAB-FWD {side} {network} -m comment --comment \"flanneld forward\" -j ACCEPT"
                ),
            );
        }
        text + "COMMIT\n"
    }

    fn reject_where_nobody_is(&self, text: &mut String) {
        for (key, _) in self.services.iter().filter(|(_, ends)| ends.is_empty()) {
            let (address, protocol) = (key.address, key.protocol());
            add(
                text,
                format_args!(
                    "-A KUBE-SERVICES -d {}/32 -p {protocol} -m comment --comment \"{address} has no endpoints\" -m {protocol} --dport {} -j REJECT --reject-with icmp-port-unreachable",
                    address.ip(),
                    address.port()
                ),
            );
        }
    }

    /// With a subnet the whole table, else what changes with the Services.
    fn nat_table(&self, present: &BTreeSet<&str>, subnet: Option<Ipv4Net>) -> String {
        let services = self.all_services();
        let mut chains = BTreeSet::new();
        let mut rules = String::new();
        for (key, endpoints) in &services {
            if !endpoints.is_empty() {
                self.service_rules(*key, endpoints, &mut chains, &mut rules);
            }
        }
        let mut text = "*nat\n".to_owned();
        if subnet.is_some() {
            text += ":PREROUTING ACCEPT [0:0]\n:INPUT ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n\
                     :POSTROUTING ACCEPT [0:0]\n:LAB-POSTRTG - [0:0]\n";
        }
        for fixed in [
            "KUBE-MARK-MASQ",
            "KUBE-NODEPORTS",
            "KUBE-POSTROUTING",
            "KUBE-SERVICES",
        ] {
            add(&mut text, format_args!(":{fixed} - [0:0]"));
        }
        for chain in &chains {
            add(&mut text, format_args!(":{chain} - [0:0]"));
        }
        let stale: Vec<&&str> = present
            .iter()
            .filter(|name| name.starts_with("KUBE-SVC-") || name.starts_with("KUBE-SEP-"))
            .filter(|name| !chains.contains(**name))
            .collect();
        for chain in &stale {
            // Named, it is flushed; after that nothing refers to it and it can go.
            add(&mut text, format_args!(":{chain} - [0:0]"));
        }
        if let Some(subnet) = subnet {
            text += "\
-A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A OUTPUT -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A POSTROUTING -m comment --comment \"kubernetes postrouting rules\" -j KUBE-POSTROUTING
";
            if self.masquerade {
                self.masquerade_rules(subnet, &mut text);
            }
        }
        text += "\
-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --xor-mark 0x4000
-A KUBE-POSTROUTING -m comment --comment \"kubernetes service traffic requiring SNAT\" -j MASQUERADE --random-fully
";
        text += &rules;
        text += "-A KUBE-SERVICES -m comment --comment \"kubernetes service nodeports; NOTE: this must be the last rule in this chain\" -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS\n";
        for chain in &stale {
            add(&mut text, format_args!("-X {chain}"));
        }
        text + "COMMIT\n"
    }

    /// The seven rules of flannel.
    fn masquerade_rules(&self, subnet: Ipv4Net, text: &mut String) {
        let network = self.network;
        let comment = "-m comment --comment \"flanneld masq\"";
        add(
            text,
            format_args!("-A POSTROUTING {comment} -j LAB-POSTRTG"),
        );
        for (what, then) in [
            ("-m mark --mark 0x4000/0x4000".to_owned(), "RETURN"),
            (format!("-s {subnet} -d {network}"), "RETURN"),
            (format!("-s {network} -d {subnet}"), "RETURN"),
            (format!("! -s {network} -d {subnet}"), "RETURN"),
            (
                format!("-s {network} ! -d 224.0.0.0/4"),
                "MASQUERADE --random-fully",
            ),
            (
                format!("! -s {network} -d {network}"),
                "MASQUERADE --random-fully",
            ),
        ] {
            add(
                text,
                format_args!("-A LAB-POSTRTG {what} {comment} -j {then}"),
            );
        }
    }

    /// Ours in the middle of the others': a packet passes half of the list.
    fn all_services(&self) -> Vec<(Key, Vec<SocketAddrV4>)> {
        let others = SERVICES.saturating_sub(self.services.len());
        let mut all: Vec<_> = (0..others).map(|number| self.other(number)).collect();
        let ours = self
            .services
            .iter()
            .map(|(key, endpoints)| (*key, endpoints.clone()));
        all.splice(others / 2..others / 2, ours);
        all
    }

    /// A Service that nobody asks, with endpoints that do not exist.
    fn other(&self, number: usize) -> (Key, Vec<SocketAddrV4>) {
        let low = u8::try_from(number % 250).expect("below 250") + 1;
        let key = Key {
            address: SocketAddrV4::new(Ipv4Addr::new(10, 96, 200, low), 80),
            udp: number % 10 == 9,
        };
        let last = u32::from(self.network.broadcast()) - 0x100;
        let endpoints = (0..1 + number as u32 % 3)
            .map(|end| SocketAddrV4::new(Ipv4Addr::from(last - u32::from(low) - end), 8080))
            .collect();
        (key, endpoints)
    }

    fn service_rules(
        &self,
        key: Key,
        endpoints: &[SocketAddrV4],
        chains: &mut BTreeSet<String>,
        rules: &mut String,
    ) {
        let (address, port, protocol) = (key.address.ip(), key.address.port(), key.protocol());
        let service = key.service_chain();
        let comment = format!("-m comment --comment \"default/s-{address}:{port} cluster IP\"");
        add(
            rules,
            format_args!(
                "-A KUBE-SERVICES -d {address}/32 -p {protocol} {comment} -m {protocol} --dport {port} -j {service}"
            ),
        );
        // The cluster's own pods keep their address, all others get the node's.
        add(
            rules,
            format_args!(
                "-A {service} ! -s {} -d {address}/32 -p {protocol} {comment} -m {protocol} --dport {port} -j KUBE-MARK-MASQ",
                self.network
            ),
        );
        for (index, endpoint) in endpoints.iter().enumerate() {
            let chain = key.endpoint_chain(*endpoint);
            let left = endpoints.len() - index;
            let choice = if left > 1 {
                format!(
                    "-m statistic --mode random --probability {:.11} ",
                    1.0 / left as f64
                )
            } else {
                String::new()
            };
            add(
                rules,
                format_args!(
                    "-A {service} -m comment --comment \"default/s-{address}:{port} -> {endpoint}\" {choice}-j {chain}"
                ),
            );
            add(
                rules,
                format_args!("-A {chain} -s {}/32 -j KUBE-MARK-MASQ", endpoint.ip()),
            );
            add(
                rules,
                format_args!(
                    "-A {chain} -p {protocol} -m {protocol} -j DNAT --to-destination {endpoint}"
                ),
            );
            chains.insert(chain);
        }
        chains.insert(service);
    }
}

fn key(address: Ipv4Addr, port: u16, protocol: Protocol) -> Key {
    Key {
        address: SocketAddrV4::new(address, port),
        udp: protocol == Protocol::Udp,
    }
}

fn add(text: &mut String, line: std::fmt::Arguments<'_>) {
    writeln!(text, "{line}").expect("a string takes everything");
}

#[cfg(test)]
mod tests {
    use super::*;

    const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);

    fn network() -> Ipv4Net {
        "10.244.0.0/16".parse().expect("a network")
    }

    fn endpoint(last: u8) -> SocketAddrV4 {
        SocketAddrV4::new(Ipv4Addr::new(10, 244, 2, last), 8080)
    }

    #[test]
    fn a_hundred_services_however_many_are_ours() {
        let rules = Rules::new(network());
        for rules in [
            rules.clone(),
            rules.service(ADDRESS, 80, Protocol::Tcp, &[endpoint(2)]),
        ] {
            let text = rules.whole("10.244.1.0/24".parse().expect("a network"));
            let jumps = text
                .lines()
                .filter(|line| line.contains("-j KUBE-SVC-"))
                .count();
            assert_eq!(jumps, SERVICES);
        }
    }

    #[test]
    fn endpoints_share_evenly() {
        let rules = Rules::new(network()).service(
            ADDRESS,
            80,
            Protocol::Tcp,
            &[endpoint(2), endpoint(3), endpoint(4)],
        );
        let text = rules.change(&BTreeSet::new());
        let of_service = format!("-A {} ", key(ADDRESS, 80, Protocol::Tcp).service_chain());
        let shares: Vec<_> = text
            .lines()
            .filter(|line| line.starts_with(&of_service) && line.contains("KUBE-SEP-"))
            .map(|line| line.split("--probability ").nth(1).map(|rest| &rest[..7]))
            .collect();
        assert_eq!(shares, [Some("0.33333"), Some("0.50000"), None]);
    }

    #[test]
    fn chains_of_what_is_gone_are_deleted() {
        let with = Rules::new(network()).service(ADDRESS, 80, Protocol::Udp, &[endpoint(2)]);
        let chain = key(ADDRESS, 80, Protocol::Udp).service_chain();
        let present = BTreeSet::from([chain.as_str(), "PREROUTING", "KUBE-SERVICES"]);
        assert!(!with.change(&present).contains("-X "));
        let text = with
            .without_service(ADDRESS, 80, Protocol::Udp)
            .change(&present);
        assert!(text.contains(&format!("\n-X {chain}\n")), "{text}");
        assert!(!text.contains("-X PREROUTING"));
    }

    #[test]
    fn a_service_without_endpoints_rejects() {
        let rules = Rules::new(network()).service(ADDRESS, 80, Protocol::Tcp, &[]);
        let text = rules.change(&BTreeSet::new());
        assert!(text.contains("-A KUBE-SERVICES -d 10.96.0.10/32 -p tcp"));
        assert!(text.contains("-j REJECT"));
    }
}
