//! Does this network namespace have IPsec policies?

use std::io;

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_XFRM};

const XFRM_MSG_NEWSPDINFO: u16 = 0x24;
const XFRM_MSG_GETSPDINFO: u16 = 0x25;
const XFRMA_SPD_INFO: u16 = 1;
const NLM_F_REQUEST: u16 = 1;
const HEADER: usize = 16;

/// Asks how many IPsec policies the network namespace of the first call has.
#[derive(Default)]
pub(super) struct Policies {
    socket: Option<Socket>,
}

impl Policies {
    /// Their number, of all directions; 0 where the kernel has no IPsec.
    pub(super) fn count(&mut self) -> u64 {
        self.ask().unwrap_or_else(|_| {
            // What an unlucky request has left must not be taken for the next one's answer.
            self.socket = None;
            0
        })
    }

    fn ask(&mut self) -> io::Result<u64> {
        let socket = match &mut self.socket {
            Some(socket) => socket,
            None => self.socket.insert(open()?),
        };
        let mut request = Vec::with_capacity(HEADER + 4);
        request.extend((HEADER as u32 + 4).to_ne_bytes());
        request.extend(XFRM_MSG_GETSPDINFO.to_ne_bytes());
        request.extend(NLM_F_REQUEST.to_ne_bytes());
        request.extend([0; 8]);
        request.extend(u32::MAX.to_ne_bytes());
        socket.send(&request, 0)?;
        let mut answer = [0; 4096];
        let length = socket.recv(&mut &mut answer[..], 0)?;
        Ok(counted(&answer[..length]))
    }
}

fn open() -> io::Result<Socket> {
    let mut socket = Socket::new(NETLINK_XFRM)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    Ok(socket)
}

/// The policies that an answer counts: in, out and forwarded.
fn counted(answer: &[u8]) -> u64 {
    let word = |at: usize| {
        let bytes = answer.get(at..at + 4)?.try_into().ok()?;
        Some(u32::from_ne_bytes(bytes))
    };
    let half = |at: usize| {
        let bytes = answer.get(at..at + 2)?.try_into().ok()?;
        Some(u16::from_ne_bytes(bytes))
    };
    if half(4) != Some(XFRM_MSG_NEWSPDINFO) {
        return 0;
    }
    let mut at = HEADER + 4;
    while let (Some(length), Some(kind)) = (half(at), half(at + 2)) {
        if kind == XFRMA_SPD_INFO {
            return (0..3)
                .filter_map(|index| word(at + 4 + index * 4))
                .map(u64::from)
                .sum();
        }
        if length < 4 {
            break;
        }
        at += (usize::from(length) + 3) & !3;
    }
    0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policies_of_all_directions_are_counted() {
        let mut answer = Vec::new();
        answer.extend(48u32.to_ne_bytes());
        answer.extend(XFRM_MSG_NEWSPDINFO.to_ne_bytes());
        answer.extend([0; 10]);
        answer.extend(0u32.to_ne_bytes());
        answer.extend(28u16.to_ne_bytes());
        answer.extend(XFRMA_SPD_INFO.to_ne_bytes());
        for count in [1u32, 2, 3, 50, 50, 50] {
            answer.extend(count.to_ne_bytes());
        }
        assert_eq!(counted(&answer), 6);
        for cut in 0..answer.len() {
            assert!(counted(&answer[..cut]) <= 6);
        }
    }

    #[test]
    fn a_namespace_without_policies_has_none() {
        let mut policies = Policies::default();
        assert_eq!(policies.count(), 0);
        assert_eq!(policies.count(), 0, "by the same socket");
    }
}
