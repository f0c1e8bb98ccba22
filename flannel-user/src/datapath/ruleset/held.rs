//! What of a rule a class stands for, by name.

/// What a part of a rule depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    /// On nothing but what a class holds.
    Held,
    /// On a property of the packet that a class does not hold.
    Varies,
    /// On what went before, or it acts on every packet: it counts even where a later condition of
    /// the rule does not hold.
    Counts,
}

/// A match of iptables. Those with options that matter are looked into elsewhere.
pub(super) fn of_match(name: &str) -> Part {
    match name {
        // Looked into: addrtype, conntrack, multiport, set, tcp.
        "addrtype" | "conntrack" | "multiport" | "set" | "tcp" => Part::Held,
        "comment" | "state" | "mark" | "connmark" | "connlabel" | "iprange" | "devgroup"
        | "physdev" | "pkttype" | "dscp" | "tos" | "realm" | "rpfilter" | "policy" | "cluster"
        | "helper" => Part::Held,
        // Counters; nobody expects what bypasses in them.
        "nfacct" => Part::Held,
        // A forwarded packet has no socket.
        "owner" | "cgroup" => Part::Held,
        // Their protocol rules TCP out by itself.
        "udp" | "udplite" | "icmp" | "icmp6" | "sctp" | "dccp" | "ah" | "esp" | "ipcomp" => {
            Part::Held
        }
        "limit" | "hashlimit" | "connlimit" | "quota" | "quota2" | "statistic" | "recent"
        | "rateest" | "connbytes" => Part::Counts,
        _ => Part::Varies,
    }
}

/// A target of iptables.
pub(super) fn of_target(name: &str) -> Part {
    match name {
        "" | "ACCEPT" | "DROP" | "RETURN" | "REJECT" | "MARK" | "CONNMARK" | "SECMARK"
        | "CONNSECMARK" | "MASQUERADE" | "SNAT" | "DNAT" | "REDIRECT" | "NETMAP" | "NOTRACK"
        | "CHECKSUM" | "CLASSIFY" | "TRACE" | "TPROXY" => Part::Held,
        // They change the packet, and what the stack changes is never bypassed.
        "TCPMSS" | "TCPOPTSTRIP" | "DSCP" | "TOS" | "TTL" | "ECN" => Part::Held,
        // Looked into: a helper reads connections.
        "CT" => Part::Held,
        _ => Part::Counts,
    }
}

/// An expression of nftables, apart from those that load a field.
pub(super) fn of_expression(name: &str) -> Part {
    match name {
        "cmp" | "bitwise" | "byteorder" | "immediate" | "range" | "lookup" | "counter" | "last"
        | "nat" | "masq" | "redir" | "reject" | "notrack" | "rt" | "tproxy" | "fwd"
        | "flow_offload" => Part::Held,
        "limit" | "quota" | "connlimit" | "numgen" | "queue" | "log" | "dynset" | "dup"
        | "synproxy" | "objref" => Part::Counts,
        _ => Part::Varies,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nobody_knows_is_not_held() {
        assert_eq!(of_match("geoip"), Part::Varies);
        assert_eq!(of_target("DELUDE"), Part::Counts);
        assert_eq!(of_expression("osf"), Part::Varies);
    }
}
