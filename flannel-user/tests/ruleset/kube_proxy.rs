//! Rules as kube-proxy writes them.

use std::fmt::Write as _;

/// The part of kube-proxy's iptables mode in which packets go by chance or by memory.
pub(crate) fn iptables(services: usize) -> String {
    let mut chains = String::new();
    let mut rules = String::new();
    for number in 0..services {
        let address = format!("10.96.{}.{}", number / 250, number % 250 + 1);
        write!(chains, ":KUBE-SVC-{number} - [0:0]\n:KUBE-EXT-{number} - [0:0]\n:KUBE-SEP-{number}A - [0:0]\n:KUBE-SEP-{number}B - [0:0]\n").expect("a string");
        let comment = format!("-m comment --comment \"default/s{number} -> here\"");
        for rule in [
            format!(
                "KUBE-SERVICES -d {address}/32 -p tcp {comment} -m tcp --dport 80 -j KUBE-SVC-{number}"
            ),
            format!(
                "KUBE-NODEPORTS -p tcp {comment} -m tcp --dport {} -j KUBE-EXT-{number}",
                30_000 + number
            ),
            format!("KUBE-EXT-{number} {comment} -j KUBE-MARK-MASQ"),
            format!("KUBE-EXT-{number} -j KUBE-SVC-{number}"),
            format!(
                "KUBE-SVC-{number} ! -s 10.244.0.0/16 -d {address}/32 -p tcp {comment} -m tcp --dport 80 -j KUBE-MARK-MASQ"
            ),
            format!(
                "KUBE-SVC-{number} {comment} -m recent --rcheck --seconds 10800 --reap --name KUBE-SEP-{number}A --mask 255.255.255.255 --rsource -j KUBE-SEP-{number}A"
            ),
            format!(
                "KUBE-SVC-{number} {comment} -m statistic --mode random --probability 0.50000000000 -j KUBE-SEP-{number}A"
            ),
            format!("KUBE-SVC-{number} {comment} -j KUBE-SEP-{number}B"),
            format!("KUBE-SEP-{number}A -s 10.244.1.2/32 {comment} -j KUBE-MARK-MASQ"),
            format!(
                "KUBE-SEP-{number}A -p tcp {comment} -m recent --set --name KUBE-SEP-{number}A --mask 255.255.255.255 --rsource -m tcp -j DNAT --to-destination 10.244.1.2:8080"
            ),
            format!(
                "KUBE-SEP-{number}B -p tcp {comment} -m tcp -j DNAT --to-destination 10.244.2.2:8080"
            ),
        ] {
            writeln!(rules, "-A {rule}").expect("a string");
        }
    }
    format!(
        "*nat\n:PREROUTING ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n:POSTROUTING ACCEPT [0:0]\n\
         :KUBE-SERVICES - [0:0]\n:KUBE-NODEPORTS - [0:0]\n:KUBE-MARK-MASQ - [0:0]\n:KUBE-POSTROUTING - [0:0]\n{chains}\
         -A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n\
         -A OUTPUT -j KUBE-SERVICES\n-A POSTROUTING -j KUBE-POSTROUTING\n\
         -A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000\n\
         -A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN\n\
         -A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0\n\
         -A KUBE-POSTROUTING -j MASQUERADE --random-fully\n\
         {rules}\
         -A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS\nCOMMIT\n\
         *filter\n:FORWARD DROP [0:0]\n:KUBE-FORWARD - [0:0]\n:KUBE-SERVICES - [0:0]\n\
         -A FORWARD -j KUBE-FORWARD\n-A FORWARD -m conntrack --ctstate NEW -j KUBE-SERVICES\n\
         -A FORWARD -s 10.244.0.0/16 -j ACCEPT\n-A FORWARD -d 10.244.0.0/16 -j ACCEPT\n\
         -A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP\n\
         -A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT\n\
         -A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n\
         -A KUBE-SERVICES -d 10.96.0.77/32 -p tcp -m tcp --dport 80 -j REJECT\nCOMMIT\n"
    )
}

/// The same as kube-proxy's nftables mode writes it.
pub(crate) const NFTABLES: &str = "table ip kube-proxy {
    map service-ips { type ipv4_addr . inet_proto . inet_service : verdict;
        elements = { 10.96.0.1 . tcp . 80 : goto service }; }
    map service-nodeports { type inet_proto . inet_service : verdict;
        elements = { tcp . 30080 : goto external }; }
    set affinity { type ipv4_addr; flags dynamic,timeout; timeout 3h; }
    chain endpoint { ip saddr 10.244.1.2 jump mark-for-masquerade
        update @affinity { ip saddr } meta l4proto tcp dnat to 10.244.1.2:8080; }
    chain other { meta l4proto tcp dnat to 10.244.2.2:8080; }
    chain service { ip daddr 10.96.0.1 tcp dport 80 ip saddr != 10.244.0.0/16 jump mark-for-masquerade
        ip saddr @affinity goto endpoint
        numgen random mod 2 vmap { 0 : goto endpoint, 1 : goto other }; }
    chain external { jump mark-for-masquerade
        goto service; }
    chain mark-for-masquerade { meta mark set meta mark | 0x4000; }
    chain masquerading { meta mark & 0x4000 == 0 return
        meta mark set meta mark ^ 0x4000
        masquerade fully-random; }
    chain services { ip daddr . meta l4proto . th dport vmap @service-ips
        fib daddr type local meta l4proto . th dport vmap @service-nodeports; }
    chain nat-prerouting { type nat hook prerouting priority dstnat; jump services; }
    chain nat-postrouting { type nat hook postrouting priority srcnat; jump masquerading; }
    chain firewall { ip daddr 10.96.0.7 reject; }
    chain filter-forward { type filter hook forward priority -110; ct state new jump firewall; }
}\n";
