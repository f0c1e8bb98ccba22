//! Another agent than ours, from `--peer`, on every node of a lab.

use std::{path::Path, time::Duration};

use anyhow::{Context, Result};

use super::side;
use crate::{
    agent::{Agent, AgentOptions},
    etcd::Etcd,
    lab::Lab,
    node::{SUBNET_FILE, TUNNEL},
    wait,
};

/// Where agents without `--lease-dir` keep their leases.
#[derive(Debug)]
pub struct Registry(#[expect(dead_code, reason = "kept alive")] Etcd);

/// Starts `program` with flannel's own flags on every node; through etcd unless
/// it knows the lab's lease directory.
///
/// # Errors
/// When it does not make its way to the other nodes in time; with its log.
pub fn start_everywhere(
    lab: &Lab,
    program: &Path,
    config: &str,
) -> Result<(Vec<Agent>, Option<Registry>)> {
    if side::help_of(program)?.contains("lease-dir") {
        return Ok((launch(lab, &options(program))?, None));
    }
    let etcd = Etcd::start(lab, config)?;
    let agents = start_with_etcd(lab, program, &etcd)?;
    Ok((agents, Some(Registry(etcd))))
}

/// The same with a running etcd.
///
/// # Errors
/// As [`start_everywhere`].
pub fn start_with_etcd(lab: &Lab, program: &Path, etcd: &Etcd) -> Result<Vec<Agent>> {
    let options = AgentOptions {
        etcd: Some(etcd.at()),
        ..options(program)
    };
    launch(lab, &options)
}

fn options(program: &Path) -> AgentOptions {
    AgentOptions {
        program: Some(program.to_owned()),
        plain: true,
        ..AgentOptions::default()
    }
}

fn launch(lab: &Lab, options: &AgentOptions) -> Result<Vec<Agent>> {
    let mut agents = Vec::new();
    for node in lab.nodes() {
        agents.push(Agent::launch(node, options)?);
    }
    for agent in &agents {
        let node = agent.node();
        let what = format!("the agent of {} has a way to the others", node.name());
        wait::until_true(&what, Duration::from_secs(30), || {
            let there = |path: &str| node.namespace().exists(path);
            if !there(SUBNET_FILE)? || !there(&format!("/sys/class/net/{TUNNEL}"))? {
                return Ok(false);
            }
            let routes = node.namespace().ip(&format!("route show dev {TUNNEL}"))?;
            Ok(routes.lines().count() >= lab.nodes().len() - 1)
        })
        .with_context(|| format!("its log:\n{}", agent.log()))?;
    }
    Ok(agents)
}
