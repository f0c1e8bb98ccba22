//! What the agent asks of the host's firewall tools, and what it leaves behind.

mod alloc_agent;
mod namespace;

use std::{os::unix::fs::symlink, path::Path, time::Instant};

use alloc_agent::{Host, ended, stop};
use namespace::{in_new_namespace, run};

fn uplink() {
    run("ip link add uplink0 type bridge");
    run("ip addr add 192.0.2.1/24 dev uplink0");
    run("ip link set uplink0 up");
}

/// A directory for PATH with these programs of the host only.
fn only(programs: &[&str]) -> tempfile::TempDir {
    let directory = tempfile::tempdir().expect("a directory");
    for program in programs {
        let found = ["/usr/sbin", "/usr/bin", "/sbin"]
            .map(|place| Path::new(place).join(program))
            .into_iter()
            .find(|path| path.exists())
            .unwrap_or_else(|| panic!("{program} is not installed"));
        symlink(found, directory.path().join(program)).expect("linked");
    }
    directory
}

fn text(directory: &tempfile::TempDir) -> &str {
    directory.path().to_str().expect("text")
}

#[test]
fn contract_23_9_only_the_tools_in_use_are_needed() {
    in_new_namespace(|| async {
        uplink();
        let nft = only(&["nft"]);
        let host = Host::new(true);
        stop(host.start("uplink0", &["--ip-masq"], Some(text(&nft))));
        assert!(run("nft list ruleset").contains("masquerade fully-random"));

        run("nft flush ruleset");
        let iptables = only(&[
            "iptables",
            "iptables-nft",
            "iptables-nft-save",
            "iptables-nft-restore",
        ]);
        let host = Host::new(false);
        stop(host.start("uplink0", &["--ip-masq"], Some(text(&iptables))));
        assert!(run("iptables-nft -t nat -S").contains("MASQUERADE --random-fully"));

        // An image from before the names with a suffix.
        run("nft flush ruleset");
        let plain = only(&["iptables", "iptables-save", "iptables-restore"]);
        stop(host.start("uplink0", &["--ip-masq"], Some(text(&plain))));
        assert!(run("iptables -t nat -S").contains("MASQUERADE --random-fully"));
    });
}

#[test]
fn a_missing_tool_ends_the_start_with_advice_unless_nothing_is_to_be_done() {
    in_new_namespace(|| async {
        uplink();
        let none = only(&[]);
        for (nftables, tool) in [(false, "iptables"), (true, "nftables")] {
            let host = Host::new(nftables);
            let mut agent = host.spawn("uplink0", &[], Some(text(&none)));
            assert_eq!(ended(&mut agent).code(), Some(1));
            let log = host.log();
            assert!(log.contains(&format!("install {tool}")), "{log}");
        }
        let host = Host::new(false);
        let nothing = ["--iptables-forward-rules=false"];
        stop(host.start("uplink0", &nothing, Some(text(&none))));
    });
}

#[test]
fn contract_17_rules_stay_and_a_switch_of_the_config_moves_them() {
    in_new_namespace(|| async {
        uplink();
        let host = Host::new(false);
        let both = || (run("iptables -t nat -S"), run("nft list tables"));
        for nftables in [false, true, false, true] {
            host.configure(nftables);
            stop(host.start("uplink0", &["--ip-masq"], None));
            let (iptables, nft) = both();
            assert_eq!(iptables.contains("FLANNEL"), !nftables, "{iptables}");
            assert_eq!(nft.contains("flannel"), nftables, "{nft}");
        }
    });
}

#[test]
fn contract_2_each_flag_does_what_it_says() {
    in_new_namespace(|| async {
        uplink();
        let host = Host::new(false);
        let saved = || run("iptables-save");
        stop(host.start("uplink0", &["--iptables-forward-rules=false"], None));
        assert!(!saved().contains("FLANNEL"));
        stop(host.start("uplink0", &[], None));
        assert!(saved().contains("FLANNEL-FWD") && !saved().contains("FLANNEL-POSTRTG"));
        let plain = ["--ip-masq", "--ip-masq-fully-random-disable"];
        stop(host.start("uplink0", &plain, None));
        assert!(saved().contains("-j MASQUERADE\n"));
        stop(host.start("uplink0", &["--ip-masq"], None));
        assert!(saved().contains("-j MASQUERADE --random-fully\n"));

        let blackhole = ["--ip-blackhole-route", "--iptables-resync=1"];
        let agent = host.start("uplink0", &blackhole, None);
        let start = Instant::now();
        while run("ip route show type blackhole").is_empty() {
            assert!(start.elapsed().as_secs() < 5, "{}", host.log());
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        stop(agent);
    });
}
