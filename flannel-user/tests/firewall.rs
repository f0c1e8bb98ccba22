//! Firewall rules in real kernels' namespaces, written by the real tools.

mod namespace;

use flannel_user::firewall::{
    Chain, Firewall, Policy, System,
    iptables::{Iptables, Variant},
    nftables::Nftables,
};
use namespace::{in_new_namespace, run, try_run};

fn policy() -> Policy {
    Policy {
        network: "10.244.0.0/16".parse().expect("a network"),
        subnet: "10.244.1.0/24".parse().expect("a network"),
        masquerade: true,
        random_fully: true,
        forward: true,
    }
}

const VARIANTS: [Variant; 2] = [Variant::Nft, Variant::Legacy];

fn program(variant: Variant) -> &'static str {
    match variant {
        Variant::Nft => "iptables-nft",
        Variant::Legacy => "iptables-legacy",
        Variant::Plain { .. } => "iptables",
    }
}

fn iptables(variant: Variant) -> Firewall {
    Firewall::Iptables(Iptables::with(variant, policy(), None))
}

fn nftables() -> Firewall {
    Firewall::Nftables(Nftables::new(policy(), None))
}

/// The kernel must have the legacy interface: a test that is skipped would count as passed.
fn need_legacy() {
    if let Err(error) = try_run("iptables-legacy -t nat -S") {
        panic!(
            "this kernel or host cannot do iptables-legacy (modules ip_tables, iptable_nat, iptable_filter; package iptables): {error}"
        );
    }
}

/// The lines of a table's listing that are about flannel.
fn listing(variant: Variant, table: &str) -> Vec<String> {
    let text = run(&format!("{} -w -t {table} -S", program(variant)));
    let ours = text.lines().filter(|line| line.contains("FLANNEL-"));
    ours.map(|line| line.trim_end().to_owned()).collect()
}

/// Contract 14.1 as listed; the first two lines in the order in which `-S` prints them.
const NAT: [&str; 8] = [
    "-N FLANNEL-POSTRTG",
    r#"-A POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG"#,
    r#"-A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 -m comment --comment "flanneld masq" -j RETURN"#,
    r#"-A FLANNEL-POSTRTG -s 10.244.1.0/24 -d 10.244.0.0/16 -m comment --comment "flanneld masq" -j RETURN"#,
    r#"-A FLANNEL-POSTRTG -s 10.244.0.0/16 -d 10.244.1.0/24 -m comment --comment "flanneld masq" -j RETURN"#,
    r#"-A FLANNEL-POSTRTG ! -s 10.244.0.0/16 -d 10.244.1.0/24 -m comment --comment "flanneld masq" -j RETURN"#,
    r#"-A FLANNEL-POSTRTG -s 10.244.0.0/16 ! -d 224.0.0.0/4 -m comment --comment "flanneld masq" -j MASQUERADE --random-fully"#,
    r#"-A FLANNEL-POSTRTG ! -s 10.244.0.0/16 -d 10.244.0.0/16 -m comment --comment "flanneld masq" -j MASQUERADE --random-fully"#,
];

/// Contract 14.2 as listed.
const FILTER: [&str; 4] = [
    "-N FLANNEL-FWD",
    r#"-A FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD"#,
    r#"-A FLANNEL-FWD -s 10.244.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT"#,
    r#"-A FLANNEL-FWD -d 10.244.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT"#,
];

/// Contract 15 as listed.
const NFT: &str = r#"table ip flannel-ipv4 {
	comment "rules for flannel-ipv4"
	chain postrtg {
		comment "chain to manage traffic masquerading by flannel"
		type nat hook postrouting priority srcnat; policy accept;
		meta mark 0x00004000 return
		ip saddr 10.244.1.0/24 ip daddr 10.244.0.0/16 return
		ip saddr 10.244.0.0/16 ip daddr 10.244.1.0/24 return
		ip saddr != 10.244.1.0/24 ip daddr 10.244.0.0/16 return
		ip saddr 10.244.0.0/16 ip daddr != 224.0.0.0/4 masquerade fully-random
		ip saddr != 10.244.0.0/16 ip daddr 10.244.0.0/16 masquerade fully-random
	}

	chain forward {
		comment "chain to accept flannel traffic"
		type filter hook forward priority filter; policy accept;
		ip saddr 10.244.0.0/16 accept
		ip daddr 10.244.0.0/16 accept
	}
}
table ip6 flannel-ipv6 {
	comment "rules for flannel-ipv6"
}
"#;

fn nft_listing() -> String {
    run("nft list ruleset")
}

/// Applies, and checks that nothing is left to do.
async fn settle(firewall: &mut Firewall) -> Vec<Chain> {
    let changed = firewall.apply().await.expect("applied");
    assert!(firewall.is_in_order().await.expect("listed"));
    assert_eq!(firewall.apply().await.expect("applied"), []);
    changed
}

#[test]
fn contract_14_listings_are_flannels_in_both_variants() {
    in_new_namespace(|| async {
        need_legacy();
        for variant in VARIANTS {
            let mut firewall = iptables(variant);
            assert!(!firewall.is_in_order().await.expect("listed"));
            assert_eq!(settle(&mut firewall).await, Chain::ALL);
            assert_eq!(listing(variant, "nat"), NAT, "{variant:?}");
            assert_eq!(listing(variant, "filter"), FILTER, "{variant:?}");
        }
    });
}

#[test]
fn contract_14_random_ports_can_be_turned_off_and_parts_left_out() {
    in_new_namespace(|| async {
        let less = Policy {
            random_fully: false,
            forward: false,
            ..policy()
        };
        let mut firewall = Firewall::Iptables(Iptables::with(Variant::Nft, less, None));
        assert_eq!(settle(&mut firewall).await, [Chain::Masquerade]);
        assert_eq!(
            listing(Variant::Nft, "nat"),
            NAT.map(|line| line.replace(" --random-fully", ""))
        );
        assert_eq!(listing(Variant::Nft, "filter"), [""; 0]);

        // What is switched off goes, and its jump with it.
        let other = Policy {
            masquerade: false,
            ..policy()
        };
        let mut firewall = Firewall::Iptables(Iptables::with(Variant::Nft, other, None));
        settle(&mut firewall).await;
        assert_eq!(listing(Variant::Nft, "nat"), [""; 0]);
        assert_eq!(listing(Variant::Nft, "filter"), FILTER);
    });
}

#[test]
fn contract_15_the_listing_is_flannels() {
    in_new_namespace(|| async {
        let mut firewall = nftables();
        settle(&mut firewall).await;
        assert_eq!(nft_listing(), NFT);
    });
}

#[test]
fn contract_14_rules_that_are_right_keep_their_handles_and_counters() {
    in_new_namespace(|| async {
        settle(&mut iptables(Variant::Nft)).await;
        settle(&mut nftables()).await;
        let before = run("nft -a list ruleset");
        // A restart: everything is looked at by a new process.
        assert_eq!(iptables(Variant::Nft).apply().await.expect("applied"), []);
        assert_eq!(nftables().apply().await.expect("applied"), []);
        assert_eq!(run("nft -a list ruleset"), before);

        need_legacy();
        settle(&mut iptables(Variant::Legacy)).await;
        run("iptables-legacy -t filter -A FLANNEL-FWD -c 7 70 -j RETURN");
        run("iptables-legacy -t filter -D FLANNEL-FWD 3");
        let counted = || run("iptables-legacy -t filter -L FLANNEL-FWD -v -n");
        let before = counted();
        assert_eq!(
            iptables(Variant::Legacy).apply().await.expect("applied"),
            []
        );
        assert_eq!(counted(), before);
    });
}

/// Ways to spoil a chain, for `iptables -t TABLE`.
const SPOILS: [(&str, &str); 12] = [
    ("nat", "-F FLANNEL-POSTRTG"),
    ("nat", "-F POSTROUTING"),
    ("nat", "-A FLANNEL-POSTRTG -s 10.9.9.9 -j ACCEPT"),
    ("nat", "-I FLANNEL-POSTRTG -j RETURN"),
    ("nat", "-D FLANNEL-POSTRTG 2"),
    (
        "nat",
        "-A POSTROUTING -m comment --comment x -j FLANNEL-POSTRTG",
    ),
    ("filter", "-F FORWARD"),
    ("filter", "-D FLANNEL-FWD 1"),
    ("filter", "-A FLANNEL-FWD -j DROP"),
    ("filter", "-I FLANNEL-FWD -j DROP"),
    ("filter", "-F FLANNEL-FWD"),
    ("filter", "-R FLANNEL-FWD 1 -s 10.244.0.0/16 -j ACCEPT"),
];

#[test]
fn contract_14_4_missing_foreign_and_doubled_rules_are_repaired() {
    in_new_namespace(|| async {
        need_legacy();
        for variant in VARIANTS {
            let tool = program(variant);
            // Rules of others must survive every repair, in their places.
            run(&format!(
                "{tool} -t nat -A POSTROUTING -s 10.1.0.0/16 -j RETURN"
            ));
            run(&format!(
                "{tool} -t filter -A FORWARD -s 10.1.0.0/16 -j DROP"
            ));
            let mut firewall = iptables(variant);
            settle(&mut firewall).await;
            for (table, spoil) in SPOILS {
                run(&format!("{tool} -t {table} {spoil}"));
                let foreign_jump = spoil.contains("--comment x");
                let changed = settle(&mut firewall).await;
                assert_eq!(changed.is_empty(), foreign_jump, "{variant:?} {spoil}");
                if foreign_jump {
                    // Not in a chain of ours: not ours to judge.
                    run(&format!("{tool} -t {table} {}", spoil.replace("-A", "-D")));
                }
                assert_eq!(listing(variant, "nat"), NAT, "{variant:?} {spoil}");
                assert_eq!(listing(variant, "filter"), FILTER, "{variant:?} {spoil}");
            }
            let masq = [
                "-m",
                "comment",
                "--comment",
                "flanneld masq",
                "-j",
                "FLANNEL-POSTRTG",
            ];
            for _ in 0..3 {
                let status = std::process::Command::new(tool)
                    .args(["-t", "nat", "-I", "POSTROUTING"])
                    .args(masq)
                    .status();
                assert!(status.expect("it runs").success());
            }
            assert_eq!(settle(&mut firewall).await, [Chain::Masquerade]);
            assert_eq!(listing(variant, "nat"), NAT, "{variant:?}");
        }
    });
}

#[test]
fn contract_14_4_a_wrong_order_is_noticed() {
    in_new_namespace(|| async {
        need_legacy();
        for variant in VARIANTS {
            let mut firewall = iptables(variant);
            settle(&mut firewall).await;
            let rule = FILTER[2].replace("-A FLANNEL-FWD", "");
            let tool = program(variant);
            run(&format!("{tool} -D FLANNEL-FWD 1"));
            let script = format!("*filter\n-A FLANNEL-FWD{rule}\nCOMMIT\n");
            let file = tempfile::NamedTempFile::new().expect("a file");
            std::fs::write(file.path(), script).expect("written");
            run(&format!(
                "{tool}-restore --noflush {}",
                file.path().display()
            ));
            assert_eq!(listing(variant, "filter")[2], FILTER[3]);
            assert_eq!(settle(&mut firewall).await, [Chain::Forward]);
            assert_eq!(listing(variant, "filter"), FILTER);
        }
    });
}

#[test]
fn contract_23_8_nftables_rules_are_repaired() {
    in_new_namespace(|| async {
        let mut firewall = nftables();
        settle(&mut firewall).await;
        for spoil in [
            "flush ruleset",
            "delete table ip flannel-ipv4",
            "flush chain ip flannel-ipv4 postrtg",
            "add rule ip flannel-ipv4 forward counter drop",
            "insert rule ip flannel-ipv4 forward ip saddr 10.9.9.9 accept",
            "add chain ip flannel-ipv4 forward { policy drop ; }",
            "add rule ip flannel-ipv4 forward ip saddr 10.244.0.0/16 accept",
        ] {
            run(&format!("nft {spoil}"));
            assert!(!settle(&mut firewall).await.is_empty(), "{spoil}");
            let text = nft_listing();
            let mut sorted: Vec<_> = text.lines().collect();
            let mut expected: Vec<_> = NFT.lines().collect();
            // A chain that was made anew stands at another place in the table.
            sorted.sort_unstable();
            expected.sort_unstable();
            assert_eq!(sorted, expected, "{spoil}");
        }
    });
}

#[test]
fn contract_14_5_and_15_4_a_switch_leaves_nothing_of_the_other() {
    in_new_namespace(|| async {
        need_legacy();
        for variant in VARIANTS {
            settle(&mut iptables(variant)).await;
            // Where the original puts it by mistake, and the other family.
            let tool = program(variant);
            run(&format!("{tool} -t nat -N FLANNEL-FWD"));
            let six = tool.replace("iptables", "ip6tables");
            run(&format!("{six} -t nat -N FLANNEL-POSTRTG"));
            run(&format!("{six} -t nat -A POSTROUTING -j FLANNEL-POSTRTG"));
        }
        let mut firewall = nftables();
        settle(&mut firewall).await;
        assert_eq!(firewall.clean_other().await.expect("cleaned"), 6);
        for variant in VARIANTS {
            assert_eq!(listing(variant, "nat"), [""; 0], "{variant:?}");
            assert_eq!(listing(variant, "filter"), [""; 0], "{variant:?}");
        }
        for tool in ["ip6tables-nft", "ip6tables-legacy"] {
            assert!(!run(&format!("{tool} -t nat -S")).contains("FLANNEL"));
        }
        assert!(nft_listing().contains(NFT));
        assert_eq!(firewall.clean_other().await.expect("cleaned"), 0);

        let mut firewall = iptables(Variant::Nft);
        settle(&mut firewall).await;
        assert_eq!(firewall.clean_other().await.expect("cleaned"), 2);
        assert!(!nft_listing().contains("flannel-"));
        assert_eq!(listing(Variant::Nft, "nat"), NAT);
        assert_eq!(firewall.clean_other().await.expect("cleaned"), 0);
    });
}

#[test]
fn contract_14_5_rules_of_the_previous_network_go() {
    in_new_namespace(|| async {
        need_legacy();
        let past = Policy {
            network: "10.77.0.0/16".parse().expect("a network"),
            subnet: "10.77.3.0/24".parse().expect("a network"),
            ..policy()
        };
        let elsewhere = Some(past.network);
        for variant in VARIANTS {
            settle(&mut Firewall::Iptables(Iptables::with(variant, past, None))).await;
            settle(&mut Firewall::Iptables(Iptables::with(
                variant,
                policy(),
                elsewhere,
            )))
            .await;
            assert_eq!(listing(variant, "nat"), NAT);
            assert_eq!(listing(variant, "filter"), FILTER);
            // Another subnet of the same network.
            let moved = Policy {
                subnet: "10.244.9.0/24".parse().expect("a network"),
                ..policy()
            };
            settle(&mut Firewall::Iptables(Iptables::with(
                variant, moved, None,
            )))
            .await;
            settle(&mut iptables(variant)).await;
            assert_eq!(listing(variant, "nat"), NAT);
            // Gone for good: the next switch below starts clean.
            run(&format!("{} -t nat -F", program(variant)));
        }
        run("nft flush ruleset");
        settle(&mut Firewall::Nftables(Nftables::new(past, None))).await;
        settle(&mut Firewall::Nftables(Nftables::new(policy(), elsewhere))).await;
        assert_eq!(nft_listing(), NFT);
    });
}

#[test]
fn contract_17_two_agents_share_the_chains_in_peace() {
    in_new_namespace(|| async {
        let theirs = Policy {
            network: "10.77.0.0/16".parse().expect("a network"),
            subnet: "10.77.3.0/24".parse().expect("a network"),
            ..policy()
        };
        let pairs = [
            (
                iptables(Variant::Nft),
                Firewall::Iptables(Iptables::with(Variant::Nft, theirs, None)),
            ),
            (nftables(), Firewall::Nftables(Nftables::new(theirs, None))),
        ];
        for (mut one, mut other) in pairs {
            settle(&mut one).await;
            settle(&mut other).await;
            assert!(one.is_in_order().await.expect("listed"));
            assert_eq!(settle(&mut one).await, []);
            assert_eq!(settle(&mut other).await, []);
        }
    });
}

#[test]
fn contract_14_the_variant_with_the_kubelets_chains_is_chosen() {
    in_new_namespace(|| async {
        need_legacy();
        let chosen = || async {
            match Firewall::open(System::Iptables, policy(), None).await {
                Ok(Firewall::Iptables(iptables)) => iptables.variant(),
                other => panic!("{other:?}"),
            }
        };
        let default = run("iptables --version").contains("nf_tables");
        assert_eq!(chosen().await == Variant::Nft, default, "the host's own");
        run("iptables-legacy -t mangle -N KUBE-KUBELET-CANARY");
        assert_eq!(chosen().await, Variant::Legacy);
        run("iptables-nft -t mangle -N KUBE-IPTABLES-HINT");
        assert_eq!(chosen().await, Variant::Nft);
    });
}

#[test]
fn with_nothing_to_install_nothing_is_touched() {
    in_new_namespace(|| async {
        let nothing = Policy {
            masquerade: false,
            forward: false,
            ..policy()
        };
        let firewall = Firewall::open(System::Iptables, nothing, None).await;
        let mut firewall = firewall.expect("no tool is needed");
        assert!(matches!(firewall, Firewall::None));
        settle(&mut firewall).await;
        assert_eq!(nft_listing(), "");
        let firewall = Firewall::open(System::Nftables, nothing, None).await;
        settle(&mut firewall.expect("nft is there")).await;
        let text = nft_listing();
        assert!(text.contains("flannel-ipv4") && text.contains("flannel-ipv6"));
        assert!(!text.contains("chain"));
    });
}
