//! Short connections between the pods of a cluster, and whether classes carry them.

use std::{
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use flannel_user::{datapath::ebpf::OwnState, observe::status::Status};
use serde::Deserialize;

use crate::{
    exchange::snmp,
    kube::{CONNECTIONS_PORT, Kube, Via},
    node::{CONTROL_SOCKET, Node},
    paths,
    pod::Pod,
    task::Task,
    traffic::connections::Ending,
    wait,
};

/// How often a status is asked for while a change of it is timed.
const POLL: Duration = Duration::from_millis(3);

/// How own connections fare on a node.
///
/// # Errors
/// When its agent does not answer, or has none.
pub fn own(node: &Node) -> Result<OwnState> {
    let own = node.status()?.bypass.and_then(|bypass| bypass.own);
    own.with_context(|| format!("{} has no own connections", node.name()))
}

/// Connections that a node has opened by itself so far.
///
/// # Errors
/// When its agent does not answer.
pub fn opened(node: &Node) -> Result<u64> {
    Ok(node.status()?.packets("own_opened"))
}

/// Handshakes that a pod's servers have seen to their end.
///
/// # Errors
/// When the pod's counters cannot be read.
pub fn established(pod: &Pod) -> Result<u64> {
    let text = pod.namespace().read("/proc/thread-self/net/snmp")?;
    snmp(&text, "Tcp", "PassiveOpens").context("no PassiveOpens")
}

/// Starts a server of short connections.
///
/// # Errors
/// When the tool does not start.
pub fn serve(pod: &Pod) -> Result<Task> {
    pod.tool(&format!("connections-serve --port {CONNECTIONS_PORT}"))
}

/// Connections from the client to the server without end, dropped with the task.
///
/// # Errors
/// When the tool does not start.
pub fn rush(kube: &Kube) -> Result<Task> {
    let target = kube.target(Via::Pod, CONNECTIONS_PORT);
    kube.client().tool(&format!(
        "connections --to {target} --ending {} --count 100000000 --at-once 4 --exchanges 1 --size 64 --patience 0.2",
        Ending::ClientFin.name()
    ))
}

/// Waits until connections open without asking on both nodes.
///
/// # Errors
/// When they do not, with what the nodes do instead.
pub fn until_hot(kube: &Kube) -> Result<()> {
    let (a, b) = kube.cluster.nodes();
    let before = [opened(a)?, opened(b)?];
    wait::until_true("classes are in use", Duration::from_secs(5), || {
        Ok(opened(a)? > before[0] + 50 && opened(b)? > before[1] + 50)
    })
    .with_context(|| {
        format!(
            "{}\n{}\n{:?}",
            paths::describe(a),
            paths::describe(b),
            own(a)
        )
    })
}

/// Waits until no own connection is left on the nodes, live or over.
///
/// # Errors
/// When some stay for 15 s, with what the nodes hold.
pub fn until_own_tables_are_empty(nodes: [&Node; 2]) -> Result<()> {
    wait::until_true("the own tables are empty", Duration::from_secs(15), || {
        let [one, other] = nodes.map(|node| own(node).map(|own| own.live + own.closed));
        Ok(one? + other? == 0)
    })
    .with_context(|| format!("{:?}", nodes.map(own)))
}

/// The agent's answer.
#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Reply {
    Ok(Box<Status>),
    Error(String),
}

/// Asks a node's agent for its status again and again, without a process for each, until it says
/// what `found` looks for.
///
/// # Errors
/// When the agent does not answer, or not within `limit`.
pub fn poll_status<T: Send>(
    node: &Node,
    limit: Duration,
    found: impl Fn(&Status) -> Option<T> + Sync,
) -> Result<T> {
    node.namespace().within(|| {
        let socket = UnixStream::connect(CONTROL_SOCKET)?;
        let mut answers = BufReader::new(socket.try_clone()?);
        let mut requests = socket;
        let deadline = Instant::now() + limit;
        loop {
            requests.write_all(b"{\"do\":\"status\"}\n")?;
            let mut line = String::new();
            answers.read_line(&mut line)?;
            let status = match serde_json::from_str(&line)? {
                Reply::Ok(status) => status,
                Reply::Error(reason) => bail!("{reason}"),
            };
            if let Some(found) = found(&status) {
                return Ok(found);
            }
            if Instant::now() >= deadline {
                bail!("not within {limit:?}: {:?}", status.bypass);
            }
            thread::sleep(POLL);
        }
    })?
}
