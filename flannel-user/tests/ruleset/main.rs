//! What a class cannot stand for, found in the rule sets of the real kernel, each test in a
//! network namespace of its own.

mod kube_proxy;
#[path = "../namespace/mod.rs"]
mod namespace;
mod samples;

use std::{
    io::Write as _,
    os::fd::AsFd as _,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use flannel_user::datapath::ruleset::{Finding, Look, Watcher};
use namespace::{in_new_namespace, run};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use samples::{HARMLESS, HARMLESS_NFTABLES, IPTABLES, NFTABLES};

fn watcher() -> Watcher {
    Watcher::open("10.244.0.0/16".parse().expect("a network")).expect("a socket")
}

/// Looks as often as it asks for, and returns what it did in the end.
fn look(watcher: &mut Watcher) -> Look {
    loop {
        match watcher.look().expect("the rules can be read") {
            Look::Wait(pause) => std::thread::sleep(pause),
            look => return look,
        }
    }
}

fn reasons(watcher: &mut Watcher) -> Vec<String> {
    look(watcher);
    let reasons = watcher.findings().iter();
    reasons.map(|finding| finding.reason.clone()).collect()
}

fn feed(program: &str, args: &[&str], input: &str) {
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::piped())
        .spawn()
        .expect("the tool starts");
    let mut stdin = child.stdin.take().expect("piped");
    stdin.write_all(input.as_bytes()).expect("it reads");
    drop(stdin);
    assert!(
        child.wait().expect("it ends").success(),
        "{program}: {input}"
    );
}

fn iptables_is_understood(program: &'static str, through_nftables: bool) {
    in_new_namespace(move || async move {
        let mut watcher = watcher();
        assert_eq!(reasons(&mut watcher), [""; 0]);
        for (rule, expected) in IPTABLES {
            // This one becomes an expression of nftables.
            let expected = match *expected {
                "NFLOG" if through_nftables => "log",
                expected => expected,
            };
            run(&format!("{program} -A FORWARD {rule}"));
            assert_eq!(reasons(&mut watcher), [expected], "{program} {rule}");
            let named = &watcher.findings()[0];
            assert_eq!(
                (named.table.as_str(), named.chain.as_str()),
                ("filter", "FORWARD")
            );
            run(&format!("{program} -F FORWARD"));
            assert_eq!(reasons(&mut watcher), [""; 0], "{program} {rule}, removed");
        }
        for rule in HARMLESS {
            run(&format!("{program} -A {rule}"));
            assert_eq!(reasons(&mut watcher), [""; 0], "{program} {rule}");
        }
        // What is jumped to counts from the jump on, and only for what the jump lets through.
        run(&format!("{program} -N POLICY"));
        run(&format!(
            "{program} -A POLICY -m limit --limit 5/sec -j ACCEPT"
        ));
        run(&format!("{program} -A FORWARD -p udp -j POLICY"));
        assert_eq!(reasons(&mut watcher), [""; 0]);
        run(&format!("{program} -A FORWARD -p tcp -j POLICY"));
        assert_eq!(reasons(&mut watcher), ["limit"]);
        // Tables of every kind.
        for (table, chain) in [
            ("raw", "PREROUTING"),
            ("mangle", "POSTROUTING"),
            ("nat", "PREROUTING"),
            ("nat", "POSTROUTING"),
        ] {
            run(&format!("{program} -t {table} -A {chain} -p tcp --sport 7"));
            let found = |watcher: &mut Watcher| {
                look(watcher);
                let findings = watcher.findings().iter();
                findings
                    .filter(|finding| finding.table == table && finding.chain == chain)
                    .count()
            };
            assert_eq!(found(&mut watcher), 1, "{table} {chain}");
        }
    });
}

#[test]
fn iptables_nft_is_understood() {
    iptables_is_understood("iptables-nft", true);
}

#[test]
fn iptables_legacy_is_understood() {
    iptables_is_understood("iptables-legacy", false);
}

fn table(family: &str) -> String {
    format!(
        "table {family} t {{
            set seen {{ type ipv4_addr; flags dynamic,timeout; timeout 1m; }}
            set rates {{ type ipv4_addr; flags dynamic; }}
            set names {{ type ipv4_addr; elements = {{ 10.244.1.2 }}; }}
            quota allowance {{ over 1 mbytes }}
            limit pace {{ rate 5/second }}
            counter passed {{ }}
            ct helper ftp-standard {{ type \"ftp\" protocol tcp; }}
            chain limited {{ limit rate 5/second accept; }}
            chain forward {{ type filter hook forward priority 0; }}
            chain input {{ type filter hook input priority 0; limit rate 5/second accept; }}
        }}\n"
    )
}

#[test]
fn nftables_are_understood() {
    in_new_namespace(|| async {
        let mut watcher = watcher();
        for family in ["ip", "inet"] {
            feed("nft", &["-f", "-"], &table(family));
            assert_eq!(reasons(&mut watcher), [""; 0]);
            for (rule, expected) in NFTABLES {
                feed(
                    "nft",
                    &["-f", "-"],
                    &format!("add rule {family} t forward {rule}\n"),
                );
                let found = reasons(&mut watcher);
                assert_eq!(found.first().map(String::as_str), Some(*expected), "{rule}");
                assert_eq!(watcher.findings()[0].family, family);
                feed(
                    "nft",
                    &["-f", "-"],
                    &format!("flush chain {family} t forward\n"),
                );
                assert_eq!(reasons(&mut watcher), [""; 0], "{rule}, removed");
            }
            for rule in HARMLESS_NFTABLES {
                if family == "ip" && (rule.contains("ip6") || rule.contains("nfproto")) {
                    continue;
                }
                feed(
                    "nft",
                    &["-f", "-"],
                    &format!("add rule {family} t forward {rule}\n"),
                );
                assert_eq!(reasons(&mut watcher), [""; 0], "{rule}");
            }
            run(&format!("nft delete table {family} t"));
        }
        // Pods' packets pass the bridge and devices as well.
        feed(
            "nft",
            &["-f", "-"],
            "table bridge t { chain in { type filter hook input priority 0; tcp sport 7 drop; }; }\n\
             table netdev t { chain in { type filter hook ingress device lo priority 0; limit rate 5/second drop; }; }\n\
             table arp t { chain in { type filter hook input priority 0; limit rate 5/second drop; }; }\n",
        );
        assert_eq!(reasons(&mut watcher), ["source port", "limit"]);
    });
}

#[test]
fn an_ipset_is_asked_what_it_holds() {
    in_new_namespace(|| async {
        for (name, kind) in [
            ("nets", "hash:net"),
            ("ends", "hash:ip,port"),
            ("ports", "bitmap:port range 0-1000"),
        ] {
            run(&format!("ipset create {name} {kind}"));
        }
        for program in ["iptables-nft", "iptables-legacy"] {
            let mut watcher = watcher();
            for (set, expected) in [
                ("nets src", false),
                ("nets dst", false),
                ("ends src,dst", false),
                ("ends dst,dst", false),
                ("ends src,src", true),
                ("ports dst", false),
                ("ports src", true),
            ] {
                run(&format!(
                    "{program} -A FORWARD -p tcp -m set --match-set {set} -j DROP"
                ));
                let found = reasons(&mut watcher);
                assert_eq!(
                    found.len(),
                    usize::from(expected),
                    "{program} {set}: {found:?}"
                );
                run(&format!("{program} -F FORWARD"));
            }
            run(&format!("{program} -A FORWARD -j SET --add-set nets src"));
            assert_eq!(reasons(&mut watcher), ["SET"]);
            run(&format!("{program} -F FORWARD"));
        }
    });
}

#[test]
fn only_changes_are_read() {
    in_new_namespace(|| async {
        let mut watcher = watcher();
        assert_eq!(look(&mut watcher), Look::Read);
        assert_eq!(look(&mut watcher), Look::Unchanged);
        run("nft add table ip t");
        assert_eq!(look(&mut watcher), Look::Read);
        assert_eq!(look(&mut watcher), Look::Unchanged);
        // A tool that reads only takes no lock, and nobody else's lock makes us read.
        run("iptables-legacy -A FORWARD -j ACCEPT");
        assert_eq!(look(&mut watcher), Look::Read);
        assert_eq!(look(&mut watcher), Look::Unchanged);
        run("iptables-legacy-save");
        assert_eq!(look(&mut watcher), Look::Unchanged);
        // The last rule goes, then comes another of the same size.
        for rule in ["-s 10.244.1.2", "-s 10.244.1.3"] {
            run("iptables-legacy -F FORWARD");
            run(&format!("iptables-legacy -A FORWARD {rule} -j ACCEPT"));
            assert_eq!(look(&mut watcher), Look::Read, "{rule}");
        }
    });
}

#[test]
fn a_run_of_legacy_iptables_is_an_event() {
    in_new_namespace(|| async {
        let mut watcher = watcher();
        look(&mut watcher);
        let started = Instant::now();
        run("iptables-legacy -A FORWARD -m limit --limit 5/sec -j ACCEPT");
        let descriptor = watcher.descriptor().expect("/run can be written");
        let mut wanted = [PollFd::new(descriptor.as_fd(), PollFlags::POLLIN)];
        let ready = poll(&mut wanted, PollTimeout::from(1000_u16)).expect("polled");
        assert_eq!(ready, 1);
        assert_eq!(reasons(&mut watcher), ["limit"]);
        assert!(started.elapsed() < Duration::from_millis(200));
    });
}

#[test]
fn kube_proxy_is_no_reason_and_a_rule_among_its_own_is() {
    in_new_namespace(|| async {
        for program in ["iptables-nft", "iptables-legacy"] {
            let mut watcher = watcher();
            feed(&format!("{program}-restore"), &[], &kube_proxy::iptables(5));
            assert_eq!(reasons(&mut watcher), [""; 0], "{program}");
            run(&format!(
                "{program} -t nat -A KUBE-SERVICES -d 10.244.2.3 -p tcp --dport 80 -j KUBE-SVC-3"
            ));
            let found = reasons(&mut watcher);
            assert!(found.len() >= 2, "{program}: {found:?}");
            feed(
                &format!("{program}-restore"),
                &[],
                "*nat\nCOMMIT\n*filter\nCOMMIT\n",
            );
        }
    });
}

#[test]
fn kube_proxy_with_nftables_is_no_reason() {
    in_new_namespace(|| async {
        let mut watcher = watcher();
        feed("nft", &["-f", "-"], kube_proxy::NFTABLES);
        assert_eq!(reasons(&mut watcher), [""; 0]);
        run("nft add element ip kube-proxy service-ips { 10.244.2.3 . tcp . 80 : goto service }");
        let mut found = reasons(&mut watcher);
        found.sort();
        assert_eq!(
            found,
            [
                "numgen",
                "set that packets change",
                "set that packets change"
            ]
        );
    });
}

#[test]
fn twenty_thousand_rules_are_read_at_once() {
    in_new_namespace(|| async {
        let services = 1820;
        for program in ["iptables-nft", "iptables-legacy"] {
            let mut watcher = watcher();
            feed(
                &format!("{program}-restore"),
                &[],
                &kube_proxy::iptables(services),
            );
            assert_eq!(look(&mut watcher), Look::Read);
            assert_eq!(watcher.findings(), [] as [Finding; 0]);
            let (rules, took) = watcher.effort();
            assert!(rules > 20_000, "{rules}");
            let started = Instant::now();
            for _ in 0..100 {
                // Another test may hold the lock of iptables, which there is one of.
                let again = watcher.look().expect("a look");
                assert!(again != Look::Read, "{again:?}");
            }
            let idle = started.elapsed() / 100;
            println!("{program}: {rules} rules read in {took:?}; a look at no change {idle:?}");
            assert!(took < Duration::from_secs(3), "{took:?}");
            feed(
                &format!("{program}-restore"),
                &[],
                "*nat\nCOMMIT\n*filter\nCOMMIT\n",
            );
        }
    });
}
