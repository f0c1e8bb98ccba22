//! The agent's part of the firewall: which rules, in which packet filter, from when on.

use anyhow::Context as _;
use ipnet::Ipv4Net;
use tracing::{info, warn};

use super::Options;
use crate::{
    firewall::{
        self, Firewall, Policy, System,
        watch::{Resync, Watch},
    },
    network::NetworkConfig,
    subnet_file::Previous,
};

fn packet_filter(network: &NetworkConfig) -> System {
    if network.enable_nftables {
        System::Nftables
    } else {
        System::Iptables
    }
}

fn policy(options: &Options, network: &NetworkConfig, subnet: Ipv4Net) -> Policy {
    Policy {
        network: network.network,
        subnet,
        masquerade: options.ip_masq,
        random_fully: options.random_fully,
        forward: options.forward_rules,
    }
}

/// What can be known before anything on this host is changed.
pub(super) fn check(options: &Options, network: &NetworkConfig) -> anyhow::Result<()> {
    // No lease yet: whether there are rules at all does not depend on the subnet.
    let policy = policy(options, network, network.network);
    Ok(firewall::check_bridge_netfilter(
        packet_filter(network),
        &policy,
    )?)
}

/// Installs the rules, removes what another run left in the other packet filter, and keeps it so
/// from here on.
pub(super) async fn set_up(
    options: &Options,
    network: &NetworkConfig,
    subnet: Ipv4Net,
    previous: &Previous,
) -> anyhow::Result<()> {
    let policy = policy(options, network, subnet);
    let mut firewall = Firewall::open(packet_filter(network), policy, previous.network).await?;
    let watch = Watch::new(
        &firewall,
        Resync {
            period: options.firewall_period,
            blackhole: options.blackhole_route.then_some(subnet),
        },
    );
    let changed = firewall.apply().await.context("install firewall rules")?;
    info!(?changed, "firewall rules are in order");
    if let Err(error) = firewall.clean_other().await {
        warn!(
            error = &error as &dyn std::error::Error,
            "rules of the packet filter not in use may be left"
        );
    }
    tokio::spawn(watch.keep(firewall));
    Ok(())
}
