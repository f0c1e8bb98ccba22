//! Connections that end in every way, and what they leave behind on both sides.

use anyhow::{Result, ensure};

use crate::{
    conntrack::{self, Census, Refusals, check_alike},
    kube::Kube,
    traffic::connections::{ConnectionsReport, Ending},
};

/// Runs connections for each way in which both ends know of the end; gives how many did not go as
/// meant, counted at either end.
///
/// # Errors
/// When a tool failed, or wrong data came.
pub fn in_every_orderly_way(
    what: &str,
    run: impl Fn(Ending) -> Result<(ConnectionsReport, ConnectionsReport)>,
) -> Result<u64> {
    let mut troubles = 0;
    for ending in Ending::ORDERLY {
        let (client, server) = run(ending)?;
        println!(
            "{what} {ending:?}: {:.0}/s, client {} as meant, {} not; server {}, {}",
            client.established as f64 / client.seconds,
            client.ended,
            client.troubles(),
            server.ended,
            server.troubles()
        );
        ensure!(
            client.corrupt + server.corrupt == 0,
            "wrong data: {client:?} {server:?}"
        );
        troubles += client.troubles() + server.troubles();
    }
    Ok(troubles)
}

/// Seconds until agents have told connection tracking how the last connection ended.
pub const SETTLED: f64 = 3.0;

/// Seconds that an orderly end is remembered. A reset that is kept as long shows which state the entry of
/// its connection ends in.
pub const REMEMBERED: u32 = 120;

/// Has both nodes keep an entry for so many seconds after a reset.
///
/// # Errors
/// When a node's kernel does not take it.
pub fn keep_resets(kube: &Kube, seconds: u32) -> Result<()> {
    let (a, b) = kube.cluster.nodes();
    for node in [a, b] {
        let key = "net.netfilter.nf_conntrack_tcp_timeout_close";
        node.namespace().sysctl(key, &seconds.to_string())?;
    }
    Ok(())
}

/// Demands that every entry which conntrack calls established after all has ended goes as soon as one
/// that was reset, within [`REMEMBERED`].
///
/// # Errors
/// Names one that lives on.
pub fn check_doubts(kube: &Kube) -> Result<()> {
    let (a, b) = kube.cluster.nodes();
    for node in [a, b] {
        for line in conntrack::open(node.namespace())? {
            let mut words = line.split_whitespace().skip(4);
            let (left, state) = (words.next().unwrap_or("?"), words.next());
            ensure!(
                state != Some("ESTABLISHED")
                    || left.parse().is_ok_and(|left: u32| left <= REMEMBERED),
                "{} keeps a connection that was reset: {line}",
                node.name()
            );
        }
    }
    Ok(())
}

/// What is left on both nodes and in both pods.
#[derive(Debug)]
pub struct Left {
    /// Connections that did not go as meant.
    pub troubles: u64,
    /// Connection tracking of each node.
    pub entries: [Census; 2],
    /// TCP sockets of each pod.
    pub sockets: [Census; 2],
    /// What connection tracking of each node refused.
    pub refusals: [Refusals; 2],
}

impl Left {
    /// Counts it now.
    ///
    /// # Errors
    /// When a kernel does not tell.
    pub fn now(kube: &Kube, troubles: u64) -> Result<Self> {
        let (a, b) = kube.cluster.nodes();
        let (client, server) = (kube.client().namespace(), kube.server().namespace());
        Ok(Self {
            troubles,
            entries: [
                conntrack::census(a.namespace())?,
                conntrack::census(b.namespace())?,
            ],
            sockets: [conntrack::sockets(client)?, conntrack::sockets(server)?],
            refusals: [Refusals::now(a.namespace())?, Refusals::now(b.namespace())?],
        })
    }

    /// Demands that no more connections failed than in `reference`, and that the pods' sockets
    /// are alike.
    ///
    /// # Errors
    /// Names what differs.
    pub fn check_pods(&self, reference: &Self) -> Result<()> {
        ensure!(
            self.troubles <= reference.troubles,
            "{} connections did not go as meant, {} on the kernel path",
            self.troubles,
            reference.troubles
        );
        for (index, name) in ["client", "server"].into_iter().enumerate() {
            check_alike(
                &format!("sockets of the {name}"),
                &without_time_wait(&reference.sockets[index]),
                &without_time_wait(&self.sockets[index]),
                2,
            )?;
        }
        Ok(())
    }
}

/// Which end keeps that state is chance where both FINs cross.
fn without_time_wait(census: &Census) -> Census {
    let rows = census.iter().filter(|(kind, _)| *kind != "TIME_WAIT");
    rows.map(|(kind, count)| (kind.clone(), *count)).collect()
}
