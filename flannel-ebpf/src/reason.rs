//! Every outcome of a packet, once: counter index, direction, action, label, text.

/// What happened to a packet with that outcome.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// The program sent it on itself.
    Forwarded,
    /// Left to the kernel, untouched.
    Kernel,
    /// Freed here.
    Dropped,
}

impl Action {
    /// The word in status and metrics.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Forwarded => "forwarded",
            Self::Kernel => "kernel",
            Self::Dropped => "dropped",
        }
    }
}

/// Which hook saw the packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// `from_pod`: from a local pod towards a peer.
    Out,
    /// `from_uplink`: from a peer towards a local pod.
    In,
    /// `to_uplink`: what the stack made of a pod's packet.
    LearnOut,
    /// `to_pod`: what the stack made of a peer's packet.
    LearnIn,
    /// `from_pod` and `from_uplink`, counted beside the packet's outcome: connections that bypass
    /// from their SYN on.
    Own,
}

impl Direction {
    /// The word in status and metrics.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Out => "out",
            Self::In => "in",
            Self::LearnOut => "learn out",
            Self::LearnIn => "learn in",
            Self::Own => "own",
        }
    }
}

macro_rules! reasons {
    ($($name:ident: $direction:ident, $action:ident, $label:literal, $text:literal;)*) => {
        /// The outcome of one packet at one hook; the discriminant is its counter's index.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u32)]
        pub enum Reason {
            $(#[doc = $text] $name,)*
        }

        impl Reason {
            /// Every outcome, in order of its index.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// What happens to the packet.
            #[inline(always)]
            #[must_use]
            pub const fn action(self) -> Action {
                match self { $(Self::$name => Action::$action,)* }
            }

            /// The hook that can end so.
            #[must_use]
            pub const fn direction(self) -> Direction {
                match self { $(Self::$name => Direction::$direction,)* }
            }

            /// A short stable name for status and metrics.
            #[must_use]
            pub const fn label(self) -> &'static str {
                match self { $(Self::$name => $label,)* }
            }

            /// The outcome in a sentence.
            #[must_use]
            pub const fn text(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }
        }
    };
}

reasons! {
    Encapsulated: Out, Forwarded, "encapsulated", "encapsulated and sent to the peer";
    OutFastPathOff: Out, Kernel, "out_fast_path_off", "the fast path is switched off";
    OutNotIpv4: Out, Kernel, "out_not_ipv4", "not an untagged IPv4 packet (ARP, IPv6, VLAN)";
    OutMalformed: Out, Kernel, "out_malformed", "headers are cut short or their lengths disagree";
    OutIpOptions: Out, Kernel, "out_ip_options", "carries IP options";
    OutFragment: Out, Kernel, "out_fragment", "is an IP fragment";
    OutMulticast: Out, Kernel, "out_multicast", "multicast or broadcast destination";
    OutUnlearned: Out, Kernel, "out_unlearned", "the stack has not yet shown often enough what it does with this flow";
    OutProbe: Out, Kernel, "out_probe", "asks the stack whether the verdict still holds";
    OutStale: Out, Kernel, "out_stale", "the verdict is too old, or something changed since";
    OutBoundary: Out, Kernel, "out_boundary", "opens or ends a TCP connection, which conntrack must see";
    OutOtherDscp: Out, Kernel, "out_other_dscp", "another DSCP than the verdict's";
    OutPodInKernel: Out, Kernel, "out_pod_in_kernel", "this pod stays with the kernel: shaped, filtered by others, or excluded";
    OutHeld: Out, Kernel, "out_held", "nothing bypasses the stack at present; status says why";
    OutConntrack: Out, Kernel, "out_conntrack", "TCP stays with the kernel: its conntrack settings would end a flow that comes back";
    OutNotRemote: Out, Kernel, "out_not_remote", "the destination is in no peer's subnet";
    OutPeerInKernel: Out, Kernel, "out_peer_in_kernel", "the kernel carries this peer (no route to it at present)";
    OutNotForGateway: Out, Kernel, "out_not_for_gateway", "the frame is not addressed to the pod's gateway";
    OutForeignSource: Out, Kernel, "out_foreign_source", "the source is not the address of this veth's pod";
    OutProtocol: Out, Kernel, "out_protocol", "neither TCP nor UDP";
    OutTtl: Out, Kernel, "out_ttl", "the TTL ends here; the kernel answers";
    OutOverMtu: Out, Kernel, "out_over_mtu", "larger than the pod MTU; the kernel fragments or answers";
    OutGso: Out, Kernel, "out_gso", "segmentation offload of a kind the programs do not carry";
    OutNoRoom: Out, Kernel, "out_no_room", "the kernel refused room for the outer headers";
    OutLost: Out, Dropped, "out_lost", "the packet changed under the program after encapsulation";
    Decapsulated: In, Forwarded, "decapsulated", "decapsulated and delivered into the pod";
    InFastPathOff: In, Kernel, "in_fast_path_off", "the fast path is switched off";
    InNotTunnel: In, Kernel, "in_not_tunnel", "not a VXLAN packet on our port";
    InNotForHost: In, Kernel, "in_not_for_host", "the frame is not addressed to this host";
    InOtherAddress: In, Kernel, "in_other_address", "the outer destination is not our tunnel address";
    InOuterForm: In, Kernel, "in_outer_form", "outer fragment, outer IP options or lengths that disagree";
    InVxlanFlags: In, Kernel, "in_vxlan_flags", "VXLAN flags other than the plain identifier bit";
    InOtherVni: In, Kernel, "in_other_vni", "another VXLAN network identifier";
    InOtherVtep: In, Kernel, "in_other_vtep", "the inner frame is not addressed to our tunnel device";
    InNotIpv4: In, Kernel, "in_not_ipv4", "the inner packet is not untagged IPv4";
    InMalformed: In, Kernel, "in_malformed", "inner headers are cut short or their lengths disagree";
    InIpOptions: In, Kernel, "in_ip_options", "carries IP options";
    InFragment: In, Kernel, "in_fragment", "is an IP fragment";
    InMulticast: In, Kernel, "in_multicast", "multicast or broadcast destination";
    InForged: In, Dropped, "in_forged", "no known peer can have sent it: the outer source does not own the inner source";
    InForgedPassed: In, Kernel, "in_forged_passed", "no known peer can have sent it; left to the kernel as --forged-vxlan pass asks";
    InUnlearned: In, Kernel, "in_unlearned", "the stack has not yet shown often enough what it does with this flow";
    InProbe: In, Kernel, "in_probe", "a copy that asks the stack whether the verdict still holds; the packet itself was delivered";
    InStale: In, Kernel, "in_stale", "the verdict is too old, or something changed since";
    InBoundary: In, Kernel, "in_boundary", "opens or ends a TCP connection, which conntrack must see";
    InOtherDscp: In, Kernel, "in_other_dscp", "another DSCP than the verdict's";
    InHeld: In, Kernel, "in_held", "nothing bypasses the stack at present; status says why";
    InConntrack: In, Kernel, "in_conntrack", "TCP stays with the kernel: its conntrack settings would end a flow that comes back";
    InSourceUnknown: In, Kernel, "in_source_unknown", "the inner source is in no peer's subnet, the outer source is a peer";
    InNotLocalPod: In, Kernel, "in_not_local_pod", "the inner destination is no pod that the programs know";
    InProtocol: In, Kernel, "in_protocol", "neither TCP nor UDP";
    InTtl: In, Kernel, "in_ttl", "the TTL ends here; the kernel answers";
    InOverMtu: In, Kernel, "in_over_mtu", "larger than the pod's MTU; the kernel fragments or answers";
    InUdpGso: In, Kernel, "in_udp_gso", "UDP with segmentation offload, which no kernel so far survives after decapsulation";
    InEcn: In, Kernel, "in_ecn", "congestion marked outside, not ECN-capable inside: the kernel drops it (RFC 6040)";
    InNoRoom: In, Kernel, "in_no_room", "the kernel refused to take the outer headers off";
    InLost: In, Dropped, "in_lost", "the packet changed under the program after decapsulation";
    LearnOutConfirmed: LearnOut, Kernel, "learn_out_confirmed", "the stack let it leave as the verdict says: the verdict holds on";
    LearnOutCounted: LearnOut, Kernel, "learn_out_counted", "the stack let it leave; not often enough in a row for a verdict";
    LearnOutLearned: LearnOut, Kernel, "learn_out_learned", "the stack let it leave the same way often enough: a verdict is made";
    LearnOutChanged: LearnOut, Kernel, "learn_out_changed", "the stack let it leave otherwise than the verdict says: the verdict is withdrawn";
    LearnOutUnmatched: LearnOut, Kernel, "learn_out_unmatched", "no note of this packet: not from here, another CPU, or changed beyond what can be repeated";
    LearnOutOtherTos: LearnOut, Kernel, "learn_out_other_tos", "the stack changed the TOS byte: not repeatable";
    LearnOutOtherTtl: LearnOut, Kernel, "learn_out_other_ttl", "the stack took other than one hop from the TTL: not repeatable";
    LearnOutAmbiguous: LearnOut, Kernel, "learn_out_ambiguous", "two packets alike but for their far ends: neither is believed";
    LearnOutOldGeneration: LearnOut, Kernel, "learn_out_old_generation", "something changed while it was in the stack: does not count";
    LearnOutExcluded: LearnOut, Kernel, "learn_out_excluded", "an address or port that is never bypassed";
    LearnOutNotPeer: LearnOut, Kernel, "learn_out_not_peer", "the tunnel end is not the peer that owns the far pod";
    LearnOutNotPod: LearnOut, Kernel, "learn_out_not_pod", "the local end is not a pod that may be bypassed";
    LearnOutNoRoom: LearnOut, Kernel, "learn_out_no_room", "the flow table took no more";
    LearnInConfirmed: LearnIn, Kernel, "learn_in_confirmed", "the stack let it arrive as the verdict says: the verdict holds on";
    LearnInCounted: LearnIn, Kernel, "learn_in_counted", "the stack let it arrive; not often enough in a row for a verdict";
    LearnInLearned: LearnIn, Kernel, "learn_in_learned", "the stack let it arrive the same way often enough: a verdict is made";
    LearnInChanged: LearnIn, Kernel, "learn_in_changed", "the stack let it arrive otherwise than the verdict says: the verdict is withdrawn";
    LearnInUnmatched: LearnIn, Kernel, "learn_in_unmatched", "no note of this packet: not from here, another CPU, or changed beyond what can be repeated";
    LearnInOtherTos: LearnIn, Kernel, "learn_in_other_tos", "the stack changed the TOS byte: not repeatable";
    LearnInOtherTtl: LearnIn, Kernel, "learn_in_other_ttl", "the stack took other than one hop from the TTL: not repeatable";
    LearnInAmbiguous: LearnIn, Kernel, "learn_in_ambiguous", "two packets alike but for their far ends: neither is believed";
    LearnInOldGeneration: LearnIn, Kernel, "learn_in_old_generation", "something changed while it was in the stack: does not count";
    LearnInExcluded: LearnIn, Kernel, "learn_in_excluded", "an address or port that is never bypassed";
    LearnInNotPeer: LearnIn, Kernel, "learn_in_not_peer", "no peer owns its source";
    LearnInNotPod: LearnIn, Kernel, "learn_in_not_pod", "the local end is not a pod that may be bypassed";
    LearnInNoRoom: LearnIn, Kernel, "learn_in_no_room", "the flow table took no more";
    OwnOpened: Own, Forwarded, "own_opened", "a SYN opened a connection that bypasses the stack from it on";
    OwnNoClass: Own, Kernel, "own_no_class", "a SYN took the stack: it has not yet let such connections pass often enough";
    OwnChanged: Own, Kernel, "own_changed", "a SYN took the stack: something changed since such a connection passed";
    OwnProbe: Own, Kernel, "own_probe", "a SYN asks the stack whether such connections still pass";
    OwnPending: Own, Kernel, "own_pending", "a SYN took the stack: another one is asking there and is not through yet";
    OwnUnanswered: Own, Kernel, "own_unanswered", "a SYN took the stack: no answer to the last one that asked has passed";
    OwnHalfOpen: Own, Kernel, "own_half_open", "a SYN took the stack: too many such connections have not got past their handshake";
    OwnPaused: Own, Kernel, "own_paused", "a SYN took the stack: the agent lets no connection open at present; status says why";
    OwnExcluded: Own, Kernel, "own_excluded", "a SYN took the stack: a pod, address or port that is never bypassed";
    OwnTranslated: Own, Kernel, "own_translated", "a SYN took the stack: the pod reaches this server through a Service too, so the kernel chooses ports";
    OwnFull: Own, Kernel, "own_full", "a SYN took the stack: the table of own connections took no more";
    OwnEnding: Own, Kernel, "own_ending", "a SYN took the stack: the entry of its tuple is about to be deleted, or the kernel has the tuple";
    OwnRecalled: Own, Kernel, "own_recalled", "a packet of an own connection that only the kernel can carry: the connection is handed over";
    OwnQuoted: Own, Kernel, "own_quoted", "an ICMP error about an own connection: the connection is handed over";
    OwnWhole: Own, Forwarded, "own_whole", "a packet of an own connection came in pieces, was made whole by the kernel and delivered";
    OwnClashed: Own, Dropped, "own_clashed", "a SYN through a Service met an own connection on the same port: dropped once, sent again it gets another port";
}

impl Reason {
    /// How many outcomes there are: the size of the counter map.
    pub const COUNT: u32 = Self::ALL.len() as u32;

    /// Index of the counter.
    #[inline(always)]
    #[must_use]
    pub const fn index(self) -> u32 {
        self as u32
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn indices_are_dense_and_labels_unique() {
        let labels: BTreeSet<_> = Reason::ALL.iter().map(|reason| reason.label()).collect();
        assert_eq!(labels.len(), Reason::ALL.len());
        for (index, reason) in Reason::ALL.iter().enumerate() {
            assert_eq!(reason.index() as usize, index);
            assert!(!reason.text().is_empty());
        }
    }

    #[test]
    fn the_table_in_the_documentation_is_this_one() {
        let documented: Vec<&str> = include_str!("../../docs/datapath.md")
            .lines()
            .skip_while(|line| *line != "## Outcomes")
            .skip(1)
            .take_while(|line| !line.starts_with("## "))
            .filter(|line| line.starts_with("| `"))
            .collect();
        let known: Vec<String> = Reason::ALL
            .iter()
            .map(|reason| {
                let (label, direction) = (reason.label(), reason.direction().label());
                let (action, text) = (reason.action().label(), reason.text());
                format!("| `{label}` | {direction} | {action} | {text} |")
            })
            .collect();
        assert_eq!(
            documented,
            known,
            "docs/datapath.md, section Outcomes, should hold these rows:\n{}\n",
            known.join("\n")
        );
    }

    #[test]
    fn each_direction_forwards_in_exactly_one_way() {
        for direction in [Direction::Out, Direction::In] {
            let forwards = Reason::ALL.iter().filter(|reason| {
                reason.direction() == direction && reason.action() == Action::Forwarded
            });
            assert_eq!(forwards.count(), 1);
        }
    }
}
