//! A roll-out takes time: nodes that still run the original flannel are full
//! members of the cluster.

use anyhow::ensure;
use flannel_user::observe::status::Mode::{self, Ebpf, Netlink};
use lab::{
    agent::{Agent, AgentOptions},
    cluster::{introduce, path_of},
    exchange,
    original::{self, OriginalFlannel},
    paths::{Packets, Path, PathWatch},
    scenario::scenario,
};

#[test]
fn an_original_node_and_one_in_ebpf_mode_understand_each_other() {
    both_ways(Ebpf);
}

#[test]
fn an_original_node_and_one_in_netlink_mode_understand_each_other() {
    both_ways(Netlink);
}

fn both_ways(mode: Mode) {
    scenario(2, |lab| {
        let (ours, theirs) = lab.pair();
        let original = OriginalFlannel::start(theirs, original::subnet(77))?;
        original.publish_lease()?;
        let mut agent = Agent::start(ours, &AgentOptions::in_mode(mode))?;
        let status = agent.wait_for_peers(1)?;
        ensure!(
            status.peers[0].vtep_mac == original.identity().vtep_mac.to_string(),
            "{status:?}"
        );
        original.learn_from_agent(ours)?;
        let (client, server) = (ours.add_pod()?, theirs.add_pod()?);
        introduce(&client)?;
        client.ping(&server.address().to_string(), 3)?;
        let (mine, kernel) = ((ours, path_of(mode)), (theirs, Path::Kernel));

        let watch = PathWatch::start(&[ours, theirs])?;
        exchange::udp_round_trips(&client, &server, 1000)?;
        watch.expect_exchange(mine, kernel, 1000, 1000)?;

        let watch = PathWatch::start(&[ours, theirs])?;
        exchange::udp_round_trips(&server, &client, 1000)?;
        watch.expect_exchange(mine, kernel, 1000, 1000)?;

        let bytes = 300_000_000;
        for direction in ["up", "down", "both"] {
            let watch = PathWatch::start(&[ours, theirs])?;
            exchange::stream(&client, &server, direction, bytes)?;
            watch.expect_exchange(mine, kernel, Packets::AtLeast(100), Packets::AtLeast(100))?;
        }
        let watch = PathWatch::start(&[ours, theirs])?;
        exchange::datagrams(&server, &client, 4000, 300, "")?;
        exchange::datagrams(&client, &server, 4000, 300, "")?;
        watch.expect_exchange((ours, Path::Kernel), kernel, 900, 900)
    });
}

#[test]
fn a_lease_that_appears_and_disappears_is_followed() {
    scenario(3, |lab| {
        let mut agents = Vec::new();
        for node in [&lab[0], &lab[1]] {
            agents.push(Agent::start(node, &AgentOptions::in_mode(Ebpf))?);
        }
        for agent in &mut agents {
            agent.wait_for_peers(1)?;
        }
        let late = OriginalFlannel::start(&lab[2], original::subnet(77))?;
        late.publish_lease()?;
        for agent in &mut agents {
            agent.wait_for_peers(2)?;
            late.learn_from_agent(agent.node())?;
        }
        let (client, server) = (lab[0].add_pod()?, lab[2].add_pod()?);
        introduce(&client)?;
        client.ping(&server.address().to_string(), 1)?;
        let watch = PathWatch::start(&[&lab[0], &lab[2]])?;
        exchange::udp_round_trips(&client, &server, 200)?;
        watch.expect_exchange((&lab[0], Path::Ebpf), (&lab[2], Path::Kernel), 200, 200)?;
        std::fs::remove_file(lab.lease_dir().join("subnets").join("10.244.77.0-24"))?;
        for agent in &mut agents {
            agent.wait_for_peers(1)?;
            let routes = agent.node().namespace().ip("route show")?;
            ensure!(!routes.contains("10.244.77.0"), "{routes}");
        }
        Ok(())
    });
}
