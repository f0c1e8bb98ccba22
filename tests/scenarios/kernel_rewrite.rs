//! What the programs would make of a packet is what this kernel makes of it: ten thousand random
//! packets through a ClusterIP and back, byte for byte.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddrV4},
    os::fd::AsRawFd as _,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use flannel_ebpf::{
    ecn,
    frame::Bytes,
    header::{TCP, UDP},
    layout::{FlowKey, InFlow, LocalPod, MODE_VXLAN, Note, OutFlow, RemoteSubnet, TEMPLATE_LEN},
    learn::{Arrived, Left, Shown, neutralize},
    outer::INNER_IP,
    packet::Packet,
    random::{self, Random},
    rewrite,
    rows::{Fixture, IFINDEX},
    sighting::{self, Match, Way},
};
use lab::{
    capture::Capture,
    exchange::{ECHO_PORT, RECEIVE_PORT, RR_PORT, STREAM_PORT},
    kube::{CONNECTIONS_PORT, Kube, MANY_PORT, SERVICE, Side},
    namespace::Namespace,
    node::UPLINK,
    scenario::scenario,
};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, sendto, socket,
};

/// Flows, half of them TCP.
const FLOWS: u16 = 100;
/// Packets of each, each way.
const PACKETS: u16 = 61;
/// What has to be compared each way at least: the first of a flow shows the way, and a capture may
/// miss some on a busy machine.
const COMPARED: usize = 5_000;
const TCP_PORTS: [u16; 4] = [STREAM_PORT, RR_PORT, MANY_PORT, CONNECTIONS_PORT];
const UDP_PORTS: [u16; 4] = [ECHO_PORT, RR_PORT, MANY_PORT, RECEIVE_PORT];
/// IP header.
const IP: usize = 20;
/// Ethernet header.
const ETHERNET: usize = 14;

/// Random packets of all flows from `source` to `destination`, with the service's port as that of
/// the destination or the source. Each has an identification of its own, by which it is found.
fn packets(random: &mut Random, source: Ipv4Addr, destination: Ipv4Addr, way: Way) -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    for _ in 0..PACKETS {
        for flow in 0..FLOWS {
            let (protocol, ports) = if flow % 2 == 0 {
                (TCP, TCP_PORTS)
            } else {
                (UDP, UDP_PORTS)
            };
            let mut ip = loop {
                let ip = random::packet(random, source.octets(), destination.octets());
                if ip[9] == protocol {
                    break ip;
                }
            };
            let ends = [20_000 + flow, ports[usize::from(flow / 2 % 4)]].map(u16::to_be_bytes);
            let (first, second) = if way == Way::Out { (0, 1) } else { (1, 0) };
            ip[IP..IP + 2].copy_from_slice(&ends[first]);
            ip[IP + 2..IP + 4].copy_from_slice(&ends[second]);
            let id = all.len() as u16 + 1;
            ip[4..6].copy_from_slice(&id.to_be_bytes());
            // Two hops.
            ip[8] = ip[8].max(3);
            all.push(random::recomputed(ip));
        }
    }
    all
}

/// Sends whole IP packets from `namespace`.
fn send(namespace: &Namespace, packets: &[Vec<u8>]) -> Result<()> {
    namespace.within(|| -> Result<()> {
        let raw = socket(
            AddressFamily::Inet,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::Raw,
        )?;
        for (number, ip) in packets.iter().enumerate() {
            let to = SocketAddrV4::new(Ipv4Addr::new(ip[16], ip[17], ip[18], ip[19]), 0);
            sendto(
                raw.as_raw_fd(),
                ip,
                &SockaddrIn::from(to),
                MsgFlags::empty(),
            )?;
            // No queue on the way holds thousands.
            if number % 25 == 24 {
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        Ok(())
    })?
}

fn id(ip: &[u8]) -> u16 {
    u16::from_be_bytes([ip[4], ip[5]])
}

fn note(frame: &[u8], at: usize) -> Option<Note> {
    let frame = Bytes::plain(frame, IFINDEX);
    let packet = Packet::read(&frame, at)?;
    let note = sighting::note(&frame, at, &packet)?;
    Some(Note {
        at: 1,
        ifindex: IFINDEX,
        ..note
    })
}

/// The tables as the agent of the client's node fills them.
fn tables(client: Ipv4Addr, server: Ipv4Addr, peer: Ipv4Addr) -> Fixture {
    let mut tables = Fixture::default();
    let pod = LocalPod {
        ifindex: IFINDEX,
        mtu: 1450,
        mac: [0; 6],
        gateway_mac: [0; 6],
        flags: 0,
    };
    tables.pods = BTreeMap::from([(client.octets(), pod)]);
    let remote = RemoteSubnet {
        node: peer.octets(),
        next_hop: peer.octets(),
        vni: tables.node.vni,
        vtep_mac: [0; 6],
        mode: MODE_VXLAN,
        _pad: 0,
    };
    tables.remotes = vec![(server.octets(), 32, remote)];
    tables
}

/// What a pod sent against what left the node; how many were compared.
fn compare_out(sent: &[Vec<u8>], left: &[Vec<u8>], tables: &Fixture) -> Result<usize> {
    let by_id: BTreeMap<u16, &Vec<u8>> = sent.iter().map(|ip| (id(ip), ip)).collect();
    let mut flows: BTreeMap<FlowKey, OutFlow> = BTreeMap::new();
    let mut compared = 0;
    for frame in left {
        let mut frame = frame.clone();
        // The programs leave the outer UDP checksum away: the named deviation.
        frame[40..42].fill(0);
        let ip = by_id.get(&id(&frame[INNER_IP..])).context("never sent")?;
        let noted = note(ip, 0).context("a packet of a flow")?;
        let leaving = note(&frame, INNER_IP).context("a packet of a flow")?;
        ensure!(
            sighting::compare(&noted, &leaving, Way::Out) == Match::Same,
            "{ip:02x?} is not found in {frame:02x?}"
        );
        let ident = u16::from_be_bytes([frame[18], frame[19]]);
        if let Some(flow) = flows.get(&noted.key) {
            let ours = rewrite::sent(flow, ip, ident).context("a packet of a flow")?;
            ensure!(ours == frame, "ours {ours:02x?}\nthe kernel's {frame:02x?}");
            compared += 1;
            continue;
        }
        let mut template: [u8; TEMPLATE_LEN] = *frame.first_chunk().context("headers")?;
        neutralize(&mut template);
        let way = Left {
            far: leaving.key.dst,
            far_port: leaving.key.dport,
            uplink: 1,
            mark: 0,
            priority: 0,
            template: &template,
        };
        let mut flow: OutFlow = bytemuck::Zeroable::zeroed();
        way.entry(&noted, tables, 1, &mut flow)
            .map_err(|reason| anyhow::anyhow!("no entry: {reason:?}"))?;
        ensure!(flow.verdict.translated == 1, "{ip:02x?} was not translated");
        flows.insert(noted.key, flow);
    }
    Ok(compared)
}

/// What came by the tunnel against what the pod got.
fn compare_in(came: &[Vec<u8>], got: &[Vec<u8>], tables: &Fixture) -> Result<usize> {
    let by_id: BTreeMap<u16, &Vec<u8>> = came
        .iter()
        .map(|frame| (id(&frame[INNER_IP..]), frame))
        .collect();
    let mut flows: BTreeMap<FlowKey, InFlow> = BTreeMap::new();
    let mut compared = 0;
    for pod_frame in got {
        let theirs = &pod_frame[ETHERNET..];
        let frame = by_id.get(&id(theirs)).context("never came")?;
        let ip = &frame[INNER_IP..];
        let tos = ecn::inner_tos(frame[ETHERNET + 1], ip[1]).context("congestion outside")?;
        let noted = note(ip, 0).context("a packet of a flow")?;
        let arrived = note(theirs, 0).context("a packet of a flow")?;
        ensure!(
            sighting::compare(&noted, &arrived, Way::In) == Match::Same,
            "{ip:02x?} is not found in {theirs:02x?}"
        );
        if let Some(flow) = flows.get(&noted.key) {
            let ours = rewrite::delivered(flow, ip, tos).context("a packet of a flow")?;
            ensure!(
                ours == theirs,
                "ours {ours:02x?}\nthe kernel's {theirs:02x?}"
            );
            compared += 1;
            continue;
        }
        let way = Arrived {
            far: arrived.key.src,
            far_port: arrived.key.sport,
            pod: IFINDEX,
            macs: [0; 12],
        };
        let mut flow: InFlow = bytemuck::Zeroable::zeroed();
        way.entry(&Shown::by(&noted), tables, 1, &mut flow)
            .map_err(|reason| anyhow::anyhow!("no entry: {reason:?}"))?;
        ensure!(flow.verdict.translated == 1, "{ip:02x?} was not translated");
        flows.insert(noted.key, flow);
    }
    Ok(compared)
}

#[test]
fn ten_thousand_packets_are_what_this_kernel_makes_of_them() {
    scenario(2, |lab| {
        let kube = Kube::start(lab, Side::Netlink)?;
        let (a, b) = kube.cluster.nodes();
        for node in [a, b] {
            // Random sequence numbers are nobody's window.
            let liberal = "net.netfilter.nf_conntrack_tcp_be_liberal";
            node.namespace().sysctl(liberal, "1")?;
        }
        let (client, server) = (kube.client(), kube.server());
        for pod in [client, server] {
            // Nobody answers what nobody asked.
            pod.namespace()
                .run(&["iptables", "-A", "INPUT", "-j", "DROP"])?;
        }
        let mut random = Random::new(4);
        let out = packets(&mut random, client.address(), SERVICE, Way::Out);
        let back = packets(&mut random, server.address(), client.address(), Way::In);
        let tables = tables(client.address(), server.address(), b.public_ip());

        let directory = lab.scratch();
        let wire = Capture::start(a.namespace(), UPLINK, "udp port 8472", directory)?;
        let filter = format!("src host {SERVICE}");
        let pod = Capture::start(client.namespace(), "eth0", &filter, directory)?;
        send(client.namespace(), &out)?;
        send(server.namespace(), &back)?;
        let (wire, got) = (wire.stop_raw()?, pod.stop_raw()?);

        let between = |from: Ipv4Addr, to: Ipv4Addr| -> Vec<Vec<u8>> {
            let ends = [from.octets(), to.octets()].concat();
            wire.iter()
                .filter(|frame| frame.get(INNER_IP + 12..INNER_IP + 20) == Some(&ends[..]))
                .cloned()
                .collect()
        };
        let left = between(client.address(), server.address());
        let came = between(server.address(), client.address());
        println!(
            "{} of {} sent, {} of {} came, {} were delivered",
            left.len(),
            out.len(),
            came.len(),
            back.len(),
            got.len()
        );
        let outward = compare_out(&out, &left, &tables)?;
        let inward = compare_in(&came, &got, &tables)?;
        println!("{outward} compared on the way out, {inward} on the way in");
        ensure!(
            outward >= COMPARED && inward >= COMPARED,
            "only {outward} were compared on the way out and {inward} on the way in"
        );
        Ok(())
    });
}
