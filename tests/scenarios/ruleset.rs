//! What the reader of rule sets makes of a node's rules.

use anyhow::{Result, ensure};
use flannel_user::datapath::ruleset::{Finding, Watcher};
use ipnet::Ipv4Net;
use lab::{
    kube::{Kube, Side},
    node::Node,
    scenario::scenario,
};

fn findings(node: &Node, network: Ipv4Net) -> Result<Vec<Finding>> {
    node.namespace().within(|| -> Result<_> {
        let mut watcher = Watcher::open(network)?;
        watcher.look()?;
        Ok(watcher.findings().to_vec())
    })?
}

#[test]
fn the_rules_of_a_kubernetes_node_leave_classes_alone() {
    scenario(2, |lab| {
        let kube = Kube::start(lab, Side::Netlink)?;
        for node in lab.nodes() {
            let network = node.status()?.node.network;
            let found = findings(node, network)?;
            ensure!(found.is_empty(), "{}: {found:#?}", node.name());
            // And it does look.
            let rule = ["-A", "FORWARD", "-p", "tcp", "--sport", "7", "-j", "DROP"];
            let line: Vec<&str> = std::iter::once("iptables").chain(rule).collect();
            node.namespace().run(&line)?;
            let found = findings(node, network)?;
            let [finding] = &found[..] else {
                anyhow::bail!("one finding, not {found:#?}");
            };
            ensure!(finding.reason == "source port", "{finding}");
        }
        drop(kube);
        Ok(())
    });
}
