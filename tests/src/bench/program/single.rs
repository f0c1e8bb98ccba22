//! Single runs of a program by `BPF_PROG_TEST_RUN`, on packets made by hand.

use std::{net::Ipv4Addr, path::Path};

use anyhow::{Context, Result, bail, ensure};
use aya::programs::{SchedClassifier, TestRun as _, TestRunOptions};
use flannel_ebpf::layout::FROM_POD;
use flannel_user::mac::MacAddr;

use super::pinned;
use crate::{
    bench::{packet, stats::Summary},
    ends::Ends,
    node::{BRIDGE, UPLINK},
    pod::Pod,
    traffic::{request_response::ServeReport, timing::AskReport},
};

/// Single runs in a batch; the median of each batch is one value.
const RUNS: usize = 2000;
/// Batches.
const BATCHES: usize = 7;
/// Batches that may be thrown away, because a flow's verdict ran out meanwhile.
const SPARE: usize = 20;
/// `TC_ACT_REDIRECT`: the program forwarded.
const REDIRECT: u32 = 7;
/// Offset of `ifindex` in the kernel's `struct __sk_buff` (include/uapi/linux/bpf.h).
const IFINDEX: usize = 40;

/// Nanoseconds of runs that forward the same packet of `client` to `server` again and
/// again: `from_pod` on the client's node, `from_uplink` on the server's.
///
/// # Errors
/// When the program leaves such a packet to the kernel although its flow is known.
pub(super) fn weigh(program: &str, client: &Pod, server: &Pod) -> Result<Summary> {
    let mut batches = Vec::new();
    for _ in 0..BATCHES + SPARE {
        // A learned verdict holds for seconds only, and from half of that on every few
        // packets one asks the stack: each batch is of a flow that was just seen.
        introduce_flow(client, server)?;
        if let Some(batch) = batch(program, client, server)? {
            batches.push(Summary::of(&batch).context("no runs")?.median);
        }
        if batches.len() == BATCHES {
            break;
        }
    }
    ensure!(
        batches.len() == BATCHES,
        "{program} left a packet to the kernel that it should forward, in {} of {} batches",
        BATCHES + SPARE - batches.len(),
        BATCHES + SPARE
    );
    Summary::of(&batches).context("no batches")
}

/// Real requests and responses in the flow of the packets made by hand: a fast
/// path that learns has to have seen it.
fn introduce_flow(client: &Pod, server: &Pod) -> Result<()> {
    let (from, to) = packet::PORTS;
    let (asked, served): (AskReport, ServeReport) = Ends::start(
        client.namespace(),
        (server.namespace(), server.at(to)),
        "rr-serve --protocol udp",
        &format!("rr --protocol udp --from-port {from} --seconds 0.05"),
    )?
    .result()?;
    served.check(asked.all_transactions)
}

/// `None` where a packet was left to the kernel.
fn batch(program: &str, client: &Pod, server: &Pod) -> Result<Option<Vec<f64>>> {
    // The client's node sends, the server's receives: the packet of one is the other's.
    let sent = outgoing(client, server)?;
    let (node, given, interface) = if program == FROM_POD {
        (client.node(), sent, client.interface())
    } else {
        let Some(encapsulated) = encapsulate(client, &sent)? else {
            return Ok(None);
        };
        let mac = server.node().mac(UPLINK)?;
        let arriving = packet::addressed_to(encapsulated, mac.0);
        (server.node(), arriving, UPLINK)
    };
    let pin = pinned(node.namespace(), program)?;
    let index = node.interface_index(interface)?;
    let runs = node
        .namespace()
        .within(|| repeat(&pin, &given, index, RUNS))??;
    Ok(runs.map(|runs| runs.nanoseconds))
}

/// A datagram of the client's as the host side of its veth receives it.
fn outgoing(client: &Pod, server: &Pod) -> Result<Vec<u8>> {
    let (own, gateway) = macs(client)?;
    Ok(packet::datagram(
        (own, client.address()),
        (gateway, server.address()),
        64,
    ))
}

/// MAC addresses of a pod and of its gateway.
fn macs(pod: &Pod) -> Result<([u8; 6], [u8; 6])> {
    let own: MacAddr = pod
        .namespace()
        .ip("-o link show dev eth0")?
        .split_whitespace()
        .skip_while(|word| *word != "link/ether")
        .nth(1)
        .context("the pod's eth0 has no MAC address")?
        .parse()?;
    Ok((own.0, pod.node().mac(BRIDGE)?.0))
}

/// What `from_pod` makes of a packet, if it takes it.
fn encapsulate(client: &Pod, given: &[u8]) -> Result<Option<Vec<u8>>> {
    let node = client.node();
    let pin = pinned(node.namespace(), FROM_POD)?;
    let index = node.interface_index(client.interface())?;
    let runs = node
        .namespace()
        .within(|| repeat(&pin, given, index, 1))??;
    Ok(runs.map(|runs| runs.last_packet))
}

struct Runs {
    nanoseconds: Vec<f64>,
    last_packet: Vec<u8>,
}

/// `None` as soon as the program leaves a packet to the kernel.
fn repeat(pin: &Path, given: &[u8], interface: u32, count: usize) -> Result<Option<Runs>> {
    let program = SchedClassifier::from_pin(pin)?;
    let mut context = [0; IFINDEX + 4];
    context[IFINDEX..].copy_from_slice(&interface.to_ne_bytes());
    let mut nanoseconds = Vec::with_capacity(count);
    let mut last_packet = vec![0; given.len() + 256];
    for _ in 0..count {
        last_packet.resize(given.len() + 256, 0);
        let result = program.test_run(TestRunOptions {
            data_in: Some(given),
            data_out: Some(&mut last_packet),
            ctx_in: Some(&context),
            ..TestRunOptions::default()
        })?;
        if result.return_value != REDIRECT {
            return Ok(None);
        }
        last_packet.truncate(result.data_size_out as usize);
        nanoseconds.push(result.duration.as_nanos() as f64);
    }
    Ok(Some(Runs {
        nanoseconds,
        last_packet,
    }))
}

/// Nanoseconds of `from_pod` for packets to the given destinations, one each, at
/// the sending node as it is now: what a lookup costs that no cache knows.
///
/// # Errors
/// When a packet is not forwarded.
pub fn random_destinations(client: &Pod, given: &[Vec<u8>]) -> Result<Summary> {
    let node = client.node();
    let pin = pinned(node.namespace(), FROM_POD)?;
    let index = node.interface_index(client.interface())?;
    let mut batches = Vec::new();
    for _ in 0..BATCHES {
        let all = node.namespace().within(|| {
            let mut all = Vec::with_capacity(given.len());
            for packet in given {
                let Some(runs) = repeat(&pin, packet, index, 1)? else {
                    bail!("a packet to a peer's subnet was left to the kernel");
                };
                all.extend(runs.nanoseconds);
            }
            Ok::<_, anyhow::Error>(all)
        })??;
        batches.push(Summary::of(&all).context("no packets")?.median);
    }
    Summary::of(&batches).context("no batches")
}

/// First packets of connections of `client` to any addresses, for [`random_destinations`].
///
/// # Errors
/// When the pod's addresses cannot be read.
pub fn openings_to(client: &Pod, destinations: &[Ipv4Addr]) -> Result<Vec<Vec<u8>>> {
    let (own, gateway) = macs(client)?;
    Ok(destinations
        .iter()
        .map(|to| packet::opening((own, client.address()), (gateway, *to)))
        .collect())
}
