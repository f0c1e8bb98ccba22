//! Every kind of connection works with the rules of a Kubernetes node, as on the kernel path.

use std::net::{Ipv4Addr, SocketAddrV4};

use anyhow::{Result, ensure};
use flannel_user::observe::status::Mode::Netlink;
use lab::{
    cluster::Cluster,
    exchange::{self, ECHO_PORT},
    policy::{By, Policy},
    scenario::scenario,
    services::Rules,
    traffic::{pinger::PingReport, request_response::Protocol},
};

const SERVICE: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);

#[test]
fn the_rules_hold_what_they_promise() {
    scenario(2, |lab| {
        let cluster = Cluster::start(lab, &[Netlink])?;
        let (a, b) = cluster.nodes();
        let network = a.subnet_file()?.network;
        let echo = cluster.server.at(ECHO_PORT);
        let rules = Rules::new(network).service(SERVICE, 80, Protocol::Udp, &[echo]);
        rules.apply_to(&[a, b])?;
        exchange::udp_round_trips(&cluster.client, &cluster.server, 100)?;
        let at_service = SocketAddrV4::new(SERVICE, 80);
        let through_service = || -> Result<PingReport> {
            let server = cluster
                .server
                .tool(&format!("udp-echo --port {ECHO_PORT}"))?;
            let report = cluster
                .client
                .tool(&format!(
                    "udp-ping --to {at_service} --rate 1000 --count 50"
                ))?
                .result()?;
            drop(server);
            Ok(report)
        };
        ensure!(through_service()?.lost == 0, "the Service loses datagrams");
        // A second commit changes the Services' chains and nothing else.
        rules
            .clone()
            .without_service(SERVICE, 80, Protocol::Udp)
            .apply_to(&[a, b])?;
        ensure!(
            through_service()?.received == 0,
            "a deleted Service still answers"
        );
        rules.apply_to(&[a, b])?;
        ensure!(
            through_service()?.lost == 0,
            "the Service did not come back"
        );
        for by in By::ALL {
            let policy =
                Policy::prepare(a, by, cluster.client.address(), cluster.server.address())?;
            ensure!(through_service()?.lost == 0, "{by:?} denies too early");
            policy.deny()?;
            ensure!(through_service()?.received == 0, "{by:?} does not deny");
            policy.allow()?;
            ensure!(through_service()?.lost == 0, "{by:?} does not allow again");
        }
        rules.remove(a)?;
        rules.remove(b)?;
        ensure!(through_service()?.received == 0, "rules are left");
        exchange::udp_round_trips(&cluster.client, &cluster.server, 100).map(drop)
    });
}
