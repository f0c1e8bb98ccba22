//! A packet as the programs rewrite it, over plain bytes: `kernel::apply` without the kernel.
//!
//! The headers and the IP checksum come from the same functions as there; what
//! the kernel's `bpf_l4_csum_replace` does with the checksum of TCP and UDP is
//! written down here. So the result can be compared with a full recomputation, and
//! with what the stack makes of the same packet.

use crate::{
    checksum,
    frame::Bytes,
    header,
    layout::{InFlow, OutFlow, Verdict},
    learned,
    packet::Packet,
};

/// Length of the IP header; there are no options.
const IP: usize = 20;

/// Which end of the flow is translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FarEnd {
    Destination,
    Source,
}

/// The frame that leaves by the uplink for this IP packet; `ident` is the outer identification.
/// `None` where it is no packet of a flow.
#[must_use]
pub fn sent(flow: &OutFlow, ip: &[u8], ident: u16) -> Option<Vec<u8>> {
    let packet = Packet::read(&Bytes::plain(ip, 0), 0)?;
    let mut frame = learned::outer_headers(flow, &packet, ident).to_vec();
    frame.extend(rewritten(
        &flow.verdict,
        ip,
        &packet,
        packet.tos,
        FarEnd::Destination,
    )?);
    Some(frame)
}

/// The IP packet that the pod gets for this one from inside the tunnel; `tos` is its TOS byte
/// after the outer header was taken off. `None` where it is no packet of a flow.
#[must_use]
pub fn delivered(flow: &InFlow, ip: &[u8], tos: u8) -> Option<Vec<u8>> {
    let packet = Packet::read(&Bytes::plain(ip, 0), 0)?;
    rewritten(&flow.verdict, ip, &packet, tos, FarEnd::Source)
}

fn rewritten(
    verdict: &Verdict,
    ip: &[u8],
    packet: &Packet,
    tos: u8,
    far: FarEnd,
) -> Option<Vec<u8>> {
    let mut bytes = ip.to_vec();
    let (ttl, check) = learned::next_hop(verdict, packet, tos);
    bytes[1] = tos;
    bytes[8] = ttl;
    bytes[10..12].copy_from_slice(&check);
    if verdict.translated == 0 {
        return Some(bytes);
    }
    let (address, port, check, zero_stays) = match (far, packet.key.protocol) {
        (FarEnd::Destination, header::TCP) => (16, IP + 2, IP + 16, false),
        (FarEnd::Destination, _) => (16, IP + 2, IP + 6, true),
        (FarEnd::Source, header::TCP) => (12, IP, IP + 16, false),
        (FarEnd::Source, _) => (12, IP, IP + 6, true),
    };
    replace(&mut bytes, check, address, &verdict.far, zero_stays)?;
    replace(&mut bytes, check, port, &verdict.far_port, zero_stays)?;
    Some(bytes)
}

/// Writes `new` at `at`; the checksum at `check` follows as with `bpf_l4_csum_replace`: with
/// `zero_stays`, 0 means that there is none, and a sum that comes out as 0 is written 0xffff.
fn replace(bytes: &mut [u8], check: usize, at: usize, new: &[u8], zero_stays: bool) -> Option<()> {
    let place = at..at + new.len();
    let words = |bytes: &[u8]| -> u32 {
        let pairs = bytes.chunks_exact(2);
        pairs
            .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
            .sum()
    };
    let inverted = |bytes: &[u8]| -> u32 {
        let pairs = bytes.chunks_exact(2);
        pairs
            .map(|pair| u32::from(!u16::from_be_bytes([pair[0], pair[1]])))
            .sum()
    };
    let delta = inverted(bytes.get(place.clone())?) + words(new);
    bytes[place].copy_from_slice(new);
    let field: &mut [u8; 2] = bytes.get_mut(check..)?.first_chunk_mut()?;
    if zero_stays && *field == [0; 2] {
        return Some(());
    }
    *field = checksum::shifted(*field, delta);
    if zero_stays && *field == [0; 2] {
        *field = [0xff; 2];
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use bytemuck::Zeroable as _;

    use super::*;
    use crate::{
        ecn,
        header::{TCP, UDP},
        layout::{Note, TEMPLATE_LEN},
        learn::{Arrived, Left, Shown, neutralize},
        outer::INNER_IP,
        random::{Random, packet, recomputed, sum},
        rows::{self, Fixture},
        sighting::{self, Match, Way},
    };

    /// As many packets as the issue asks for.
    const ROUNDS: u64 = 1_000_000;
    fn note(frame: &[u8], at: usize) -> Note {
        let frame = Bytes::plain(frame, rows::IFINDEX);
        let packet = Packet::read(&frame, at).expect("a packet of a flow");
        let note = sighting::note(&frame, at, &packet).expect("whole headers");
        Note {
            at: 7,
            ifindex: rows::IFINDEX,
            ..note
        }
    }

    /// A note of something else than what `leaving` is: one byte of what must not change differs.
    fn other(random: &mut Random, frame: &[u8], at: usize, way: Way) -> Note {
        let mut frame = frame.to_vec();
        let l4 = at + IP;
        let pod = if way == Way::Out { (12, 0) } else { (16, 2) };
        let tcp = frame[at + 9] == TCP;
        let mut places = vec![
            at + 4,
            at + pod.0,
            at + pod.0 + 3,
            l4 + pod.1,
            l4 + pod.1 + 1,
        ];
        if tcp {
            places.extend([l4 + 4, l4 + 7, l4 + 8, l4 + 11, l4 + 14, l4 + 15]);
        }
        let start = l4 + if tcp { 20 } else { 8 };
        places.extend(start..frame.len().min(start + 16));
        let place = places[random.below(places.len() as u64)];
        frame[place] ^= 1 + random.below(255) as u8;
        note(&frame, at)
    }

    fn framed(ip: &[u8]) -> Vec<u8> {
        let mut frame = vec![0; 14];
        frame.extend(ip);
        frame
    }

    /// What a pod sends: matcher and rewriting against the stack, which computes everything anew.
    fn out(random: &mut Random, fixture: &Fixture) {
        let (pod, _) = rows::pods().into_iter().next().expect("a pod");
        let (_, _, remote) = rows::remotes()[0];
        let mut destination = [0; 4];
        random.fill(&mut destination);
        let far = [10, 244, 2, random.below(256) as u8];
        if random.below(4) == 0 {
            destination = far;
        }
        let ip = packet(random, pod, destination);
        let mut stack = ip.clone();
        stack[8] -= 1;
        stack[16..20].copy_from_slice(&far);
        if random.below(4) != 0 {
            random.fill(&mut stack[IP + 2..IP + 4]);
        }
        let stack = recomputed(stack);

        // The headers around it, with every field that the kernel may choose.
        let mut outer = [0; TEMPLATE_LEN];
        random.fill(&mut outer);
        outer[12..15].copy_from_slice(&[8, 0, 0x45]);
        outer[15] = outer[15] & 0xfc | if ip[1] & 3 == 3 { 2 } else { ip[1] & 3 };
        let length = (stack.len() + 50) as u16;
        outer[16..18].copy_from_slice(&length.to_be_bytes());
        outer[23] = UDP;
        outer[30..34].copy_from_slice(&remote.node);
        outer[38..40].copy_from_slice(&(length - 20).to_be_bytes());
        outer[40..42].fill(0);
        outer[24..26].fill(0);
        let check = !checksum::fold(sum(&outer[14..34]));
        outer[24..26].copy_from_slice(&check.to_be_bytes());
        let mut frame = outer.to_vec();
        frame.extend(&stack);

        let noted = note(&framed(&ip), 14);
        let leaving = note(&frame, INNER_IP);
        assert_eq!(sighting::compare(&noted, &leaving, Way::Out), Match::Same);
        let place = |note| sighting::trail_place(note, Way::Out, 5);
        assert_eq!(place(&noted), place(&leaving));
        let stranger = other(random, &frame, INNER_IP, Way::Out);
        assert_eq!(sighting::compare(&noted, &stranger, Way::Out), Match::None);

        let mut template = outer;
        neutralize(&mut template);
        let left = Left {
            far: leaving.key.dst,
            far_port: leaving.key.dport,
            uplink: 3,
            mark: 0,
            priority: 0,
            template: &template,
        };
        let mut flow = OutFlow::zeroed();
        left.entry(&noted, fixture, 1, &mut flow).expect("an entry");
        let ident = u16::from_be_bytes([outer[18], outer[19]]);
        assert_eq!(sent(&flow, &ip, ident).as_ref(), Some(&frame), "{ip:02x?}");
    }

    /// The same for what a pod gets.
    fn inbound(random: &mut Random, fixture: &Fixture) {
        let (pod, local) = rows::pods().into_iter().next().expect("a pod");
        let source = [10, 244, 2, random.below(256) as u8];
        let ip = packet(random, source, pod);
        let mut stack = ip.clone();
        let outside = random.below(4) as u8;
        let Some(tos) = ecn::inner_tos(outside, ip[1]) else {
            return;
        };
        stack[8] -= 1;
        if random.below(4) != 0 {
            random.fill(&mut stack[12..16]);
            random.fill(&mut stack[IP..IP + 2]);
        }
        let noted = note(&framed(&ip), 14);
        let leaving = Note {
            at: 7,
            ..note(&framed(&recomputed(stack.clone())), 14)
        };
        assert_eq!(sighting::compare(&noted, &leaving, Way::In), Match::Same);
        let place = |note| sighting::trail_place(note, Way::In, 5);
        assert_eq!(place(&noted), place(&leaving));
        let stranger = other(random, &framed(&stack), 14, Way::In);
        assert_eq!(sighting::compare(&noted, &stranger, Way::In), Match::None);

        stack[1] = tos;
        let stack = recomputed(stack);
        let arrived = Arrived {
            far: leaving.key.src,
            far_port: leaving.key.sport,
            pod: local.ifindex,
            macs: [0; 12],
        };
        let mut flow = InFlow::zeroed();
        arrived
            .entry(&Shown::by(&noted), fixture, 1, &mut flow)
            .expect("an entry");
        assert_eq!(
            delivered(&flow, &ip, tos).as_ref(),
            Some(&stack),
            "{ip:02x?}"
        );
    }

    #[test]
    fn a_million_packets_equal_full_recomputation() {
        // Two halves, so that it takes half the time where there are two CPUs.
        std::thread::scope(|scope| {
            for half in [1_u64, 2] {
                scope.spawn(move || {
                    let fixture = Fixture::default();
                    let mut random = Random::new(half << 32);
                    for _ in 0..ROUNDS / 4 {
                        out(&mut random, &fixture);
                        inbound(&mut random, &fixture);
                    }
                });
            }
        });
    }
}
