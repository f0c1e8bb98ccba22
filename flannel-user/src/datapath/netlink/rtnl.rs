//! A routing netlink socket that speaks in batches.
//!
//! Ten thousand peers are thirty thousand requests. One request per system call and one
//! answer awaited each would take seconds; here the requests of a batch leave in one send, only the
//! last asks for an acknowledgement, and the kernel, which handles a send in order before it
//! returns, answers with the failures and that one acknowledgement.
//!
//! The socket belongs to the network namespace of the thread that opened it, for ever.

use std::io;

use netlink_packet_core::{
    ErrorMessage, NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkDeserializable, NetlinkHeader,
    NetlinkMessage, NetlinkPayload, NetlinkSerializable,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use tokio::io::unix::AsyncFd;

use super::socket::NetlinkFd;

/// Requests per send: about 50 kB, well below the default send buffer of 208 kB, and even
/// if every one of them fails the answers fit the receive buffer below.
const BATCH: usize = 512;

/// Questions per send. Each answer is a message of its own, which costs some 8 kB of the buffer.
const QUESTIONS: usize = 256;

/// Receive buffer in bytes. An answer costs about 1 kB of it.
const RECEIVE_BUFFER: usize = 4 << 20;

/// Bytes per receive; the kernel fills at most 32 kB per part of a dump.
const DATAGRAM: usize = 64 << 10;

/// How often a dump is repeated that the kernel marked as torn by a concurrent change.
const TORN_DUMP_RETRIES: usize = 3;

/// Ports tried before the kernel may choose one.
const PORTS_TRIED: usize = 8;

const NLM_F_DUMP_INTR: u16 = 0x10;
const NLMSGERR_ATTR_MSG: u16 = 1;
const NLMSG_HEADER: usize = 16;

/// Why a request got no good answer.
#[derive(Debug, thiserror::Error)]
pub enum RtnlError {
    /// The kernel refused; `hint` is its own sentence where it gave one.
    #[error("{}{}", .source, .hint.as_deref().map(|hint| format!(" ({hint})")).unwrap_or_default())]
    Refused {
        /// The kernel's error number.
        source: io::Error,
        /// The kernel's explanation (extended acknowledgement).
        hint: Option<String>,
    },
    /// The socket itself failed. `ENOBUFS` means that answers were lost.
    #[error("cannot {action} the routing netlink socket")]
    Socket {
        /// What was tried: open, write to, read from.
        action: &'static str,
        /// The operating system's reason.
        #[source]
        source: io::Error,
    },
    /// The answer is no netlink message.
    #[error("the kernel's answer cannot be read: {0}")]
    Malformed(String),
}

impl RtnlError {
    /// The kernel's error number, 0 when the socket gave none.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            Self::Refused { source, .. } | Self::Socket { source, .. } => {
                source.raw_os_error().unwrap_or(0)
            }
            Self::Malformed(_) => 0,
        }
    }

    /// The object named in the request does not exist (any more).
    #[must_use]
    pub fn is_gone(&self) -> bool {
        matches!(
            self.errno(),
            libc::ENOENT | libc::ESRCH | libc::ENODEV | libc::EADDRNOTAVAIL | libc::ENXIO
        )
    }
}

/// One request and the flags it needs besides `REQUEST` and `ACK`.
#[derive(Debug, Clone)]
pub struct Request<M = RouteNetlinkMessage> {
    /// What is asked.
    pub message: M,
    /// `NLM_F_CREATE`, `NLM_F_REPLACE`, `NLM_F_EXCL`, …
    pub flags: u16,
}

/// A routing netlink socket with strict checking, so that filters in dump
/// requests are honoured and namespaces can be named in them.
#[derive(Debug)]
pub struct Rtnl {
    socket: AsyncFd<NetlinkFd>,
    port: u32,
    sequence: u32,
    datagram: Vec<u8>,
}

impl Rtnl {
    /// Opens a socket in the network namespace of the calling thread.
    ///
    /// # Errors
    /// The system's reason. Must be called within a tokio runtime.
    pub fn open() -> Result<Self, RtnlError> {
        let open = || -> io::Result<(AsyncFd<NetlinkFd>, u32)> {
            let mut socket = Socket::new(NETLINK_ROUTE)?;
            let port = bind(&mut socket)?;
            socket.connect(&SocketAddr::new(0, 0))?;
            socket.set_non_blocking(true)?;
            socket.set_netlink_get_strict_chk(true)?;
            socket.set_ext_ack(true)?;
            socket.set_cap_ack(true)?;
            let socket = NetlinkFd(socket);
            socket.receive_buffer(RECEIVE_BUFFER)?;
            Ok((socket.register()?, port))
        };
        let (socket, port) = open().map_err(|source| RtnlError::Socket {
            action: "open",
            source,
        })?;
        Ok(Self {
            socket,
            port,
            sequence: 0,
            datagram: vec![0; DATAGRAM],
        })
    }

    /// The netlink port of this socket. The kernel names it in the events that most
    /// requests cause (FDB changes are the exception).
    #[must_use]
    pub fn port(&self) -> u32 {
        self.port
    }

    /// Everything that matches `message` (a `Get…`). Objects that the parser does not
    /// understand are left out.
    ///
    /// # Errors
    /// The kernel's refusal, or the socket's fault.
    pub async fn dump<M>(&mut self, message: M) -> Result<Vec<M>, RtnlError>
    where
        M: NetlinkSerializable + NetlinkDeserializable + Clone,
    {
        let request = Request {
            message,
            flags: NLM_F_DUMP,
        };
        for _ in 0..TORN_DUMP_RETRIES {
            let answer = self.ask(request.clone()).await?;
            if !answer.torn {
                return Ok(answer.objects);
            }
        }
        // Still changing: the last picture is as good as any, events bring us back.
        Ok(self.ask(request).await?.objects)
    }

    /// The one object that `message` names, or `None` if there is none.
    ///
    /// # Errors
    /// As [`Self::dump`], except that a missing object is no error.
    pub async fn get(
        &mut self,
        message: RouteNetlinkMessage,
    ) -> Result<Option<RouteNetlinkMessage>, RtnlError> {
        let answer = self
            .ask(Request {
                message,
                flags: NLM_F_ACK,
            })
            .await;
        match answer {
            Ok(mut answer) => Ok(answer.objects.pop()),
            Err(error) if error.is_gone() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The same for many questions, each of which names one object: asked in batches, which
    /// takes a tenth of the time. Answers stand in the questions' order.
    ///
    /// # Errors
    /// A fault of the socket: nothing is known then.
    pub async fn get_all(
        &mut self,
        questions: Vec<RouteNetlinkMessage>,
    ) -> Result<Vec<Result<Option<RouteNetlinkMessage>, RtnlError>>, RtnlError> {
        let mut answers = Vec::with_capacity(questions.len());
        let mut questions = questions.into_iter().peekable();
        while questions.peek().is_some() {
            let first = self.sequence.wrapping_add(1);
            let mut bytes = Vec::with_capacity(QUESTIONS * 64);
            let mut asked = 0;
            for question in questions.by_ref().take(QUESTIONS) {
                self.encode(question, 0, &mut bytes);
                asked += 1;
            }
            self.send(&bytes).await?;
            let mut part: Vec<_> = (0..asked).map(|_| None).collect();
            let mut missing = asked;
            while missing > 0 {
                let length_read = self.receive().await?;
                for message in messages::<RouteNetlinkMessage>(&self.datagram[..length_read]) {
                    let message = message?;
                    let index = message.header.sequence_number.wrapping_sub(first) as usize;
                    let Some(place @ None) = part.get_mut(index) else {
                        continue; // an answer nobody waits for any more
                    };
                    *place = match message.payload {
                        NetlinkPayload::InnerMessage(object) => Some(Ok(Some(object))),
                        NetlinkPayload::Error(error) => Some(match refusal(&error) {
                            Some(error) if !error.is_gone() => Err(error),
                            _ => Ok(None),
                        }),
                        _ => continue,
                    };
                    missing -= 1;
                }
            }
            answers.extend(part.into_iter().flatten());
        }
        Ok(answers)
    }

    /// One change.
    ///
    /// # Errors
    /// The kernel's refusal, or the socket's fault.
    pub async fn change(&mut self, request: Request) -> Result<(), RtnlError> {
        let failed = self.batch(vec![request]).await?;
        failed.into_iter().next().map_or(Ok(()), |(_, e)| Err(e))
    }

    /// Many changes, in order. Returns the ones that failed by their position; the
    /// others succeeded.
    ///
    /// # Errors
    /// A fault of the socket: what was done is then unknown.
    pub async fn batch<M: NetlinkSerializable>(
        &mut self,
        requests: Vec<Request<M>>,
    ) -> Result<Vec<(usize, RtnlError)>, RtnlError> {
        let mut failed = Vec::new();
        let mut start = 0;
        let mut requests = requests.into_iter().peekable();
        while requests.peek().is_some() {
            let chunk: Vec<_> = requests.by_ref().take(BATCH).collect();
            let length = chunk.len();
            let first = self.sequence.wrapping_add(1);
            let mut bytes = Vec::with_capacity(length * 128);
            for (index, request) in chunk.into_iter().enumerate() {
                let acknowledge = if index + 1 == length { NLM_F_ACK } else { 0 };
                self.encode(request.message, request.flags | acknowledge, &mut bytes);
            }
            self.send(&bytes).await?;
            let mut last_answered = false;
            while !last_answered {
                let length_read = self.receive().await?;
                for message in messages::<RouteNetlinkMessage>(&self.datagram[..length_read]) {
                    let message = message?;
                    let index = message.header.sequence_number.wrapping_sub(first) as usize;
                    if index >= length {
                        continue; // an answer nobody waits for any more
                    }
                    if let NetlinkPayload::Error(answer) = message.payload {
                        last_answered |= index + 1 == length;
                        if let Some(error) = refusal(&answer) {
                            failed.push((start + index, error));
                        }
                    }
                }
            }
            start += length;
        }
        Ok(failed)
    }

    async fn ask<M>(&mut self, request: Request<M>) -> Result<Answer<M>, RtnlError>
    where
        M: NetlinkSerializable + NetlinkDeserializable,
    {
        let mut bytes = Vec::new();
        self.encode(request.message, request.flags, &mut bytes);
        let sequence = self.sequence;
        self.send(&bytes).await?;
        let mut answer = Answer {
            objects: Vec::new(),
            torn: false,
        };
        loop {
            let length = self.receive().await?;
            for message in messages(&self.datagram[..length]) {
                let Ok(message) = message else { continue };
                if message.header.sequence_number != sequence {
                    continue;
                }
                answer.torn |= message.header.flags & NLM_F_DUMP_INTR != 0;
                match message.payload {
                    NetlinkPayload::InnerMessage(object) => answer.objects.push(object),
                    NetlinkPayload::Done(done) => {
                        return match done.code {
                            0 => Ok(answer),
                            code => Err(RtnlError::Refused {
                                source: io::Error::from_raw_os_error(-code),
                                hint: None,
                            }),
                        };
                    }
                    NetlinkPayload::Error(error) => {
                        return refusal(&error).map_or(Ok(answer), Err);
                    }
                    _ => {}
                }
            }
        }
    }

    /// Appends one message to `bytes` under the next sequence number.
    fn encode<M: NetlinkSerializable>(&mut self, message: M, flags: u16, bytes: &mut Vec<u8>) {
        self.sequence = self.sequence.wrapping_add(1);
        let payload = NetlinkPayload::InnerMessage(message);
        let mut message = NetlinkMessage::new(NetlinkHeader::default(), payload);
        message.header.flags = NLM_F_REQUEST | flags;
        message.header.sequence_number = self.sequence;
        message.finalize();
        let start = bytes.len();
        bytes.resize(start + align(message.buffer_len()), 0);
        message.serialize(&mut bytes[start..]);
    }

    async fn send(&self, bytes: &[u8]) -> Result<(), RtnlError> {
        loop {
            let ready = self.socket.writable().await;
            let sent = ready.map(|mut guard| {
                guard.try_io(|socket| socket.get_ref().0.send(bytes, libc::MSG_NOSIGNAL))
            });
            match sent {
                Ok(Ok(Ok(_))) => return Ok(()),
                Ok(Err(_would_block)) => {}
                Ok(Ok(Err(source))) | Err(source) => {
                    return Err(RtnlError::Socket {
                        action: "write to",
                        source,
                    });
                }
            }
        }
    }

    async fn receive(&mut self) -> Result<usize, RtnlError> {
        loop {
            let ready = self.socket.readable().await;
            let datagram = &mut self.datagram;
            let received = ready.map(|mut guard| {
                guard.try_io(|socket| socket.get_ref().0.recv(&mut &mut datagram[..], 0))
            });
            match received {
                Ok(Ok(Ok(length))) => return Ok(length),
                Ok(Err(_would_block)) => {}
                Ok(Ok(Err(source))) | Err(source) => {
                    return Err(RtnlError::Socket {
                        action: "read from",
                        source,
                    });
                }
            }
        }
    }
}

struct Answer<M> {
    objects: Vec<M>,
    /// The kernel saw a change while it dumped.
    torn: bool,
}

/// Binds to a port that no process in any namespace is likely to have. The kernel would choose the
/// process's id, which is 1 in many containers: events from pods are told from our own by the port.
fn bind(socket: &mut Socket) -> io::Result<u32> {
    for _ in 0..PORTS_TRIED {
        // Process ids are below, and so are the ports that follow from them.
        let port = rand::random::<u32>() | 1 << 31;
        match socket.bind(&SocketAddr::new(port, 0)) {
            Ok(()) => return Ok(port),
            Err(error) if error.raw_os_error() == Some(libc::EADDRINUSE) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(socket.bind_auto()?.port_number())
}

/// The messages of one datagram. An unknown or odd object is an error of its own and does not hide
/// the ones behind it.
fn messages<M: NetlinkDeserializable>(
    mut datagram: &[u8],
) -> impl Iterator<Item = Result<NetlinkMessage<M>, RtnlError>> {
    std::iter::from_fn(move || {
        let (length, _) = datagram.split_first_chunk::<4>()?;
        let length = u32::from_ne_bytes(*length) as usize;
        if length < NLMSG_HEADER || length > datagram.len() {
            return None;
        }
        let (message, _) = datagram.split_at(length);
        datagram = &datagram[align(length).min(datagram.len())..];
        Some(
            NetlinkMessage::deserialize(message)
                .map_err(|error| RtnlError::Malformed(error.to_string())),
        )
    })
}

/// Netlink messages and attributes start at multiples of four bytes.
fn align(length: usize) -> usize {
    (length + 3) & !3
}

/// What an error message says; `None` is an acknowledgement.
fn refusal(answer: &ErrorMessage) -> Option<RtnlError> {
    let code = answer.code?;
    Some(RtnlError::Refused {
        source: io::Error::from_raw_os_error(-code.get()),
        hint: explanation(&answer.header),
    })
}

/// The kernel's sentence among the attributes that follow the repeated header.
fn explanation(payload: &[u8]) -> Option<String> {
    let mut attributes = payload.get(NLMSG_HEADER..)?;
    while let Some(([a, b, c, d], _)) = attributes.split_first_chunk::<4>() {
        let length = usize::from(u16::from_ne_bytes([*a, *b]));
        let kind = u16::from_ne_bytes([*c, *d]);
        let value = attributes.get(4..length)?;
        if kind == NLMSGERR_ATTR_MSG {
            let text = value.split(|byte| *byte == 0).next()?;
            return Some(String::from_utf8_lossy(text).into_owned());
        }
        attributes = attributes.get(align(length)..)?;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_sentence_is_found_behind_other_attributes() {
        let mut payload = vec![0; NLMSG_HEADER];
        payload.extend([8, 0, 2, 0, 1, 2, 3, 4]); // an offset
        payload.extend([9, 0, 1, 0, b'o', b'o', b'p', b's', 0, 0, 0, 0]);
        assert_eq!(explanation(&payload).as_deref(), Some("oops"));
        assert_eq!(explanation(&payload[..NLMSG_HEADER]), None);
        assert_eq!(
            explanation(&payload[..20]),
            None,
            "cut inside an attribute header"
        );
    }

    #[test]
    fn a_cut_datagram_ends_the_messages() {
        let count = |bytes: &[u8]| messages::<RouteNetlinkMessage>(bytes).count();
        assert_eq!(count(&[200, 0, 0, 0, 1, 2]), 0);
        assert_eq!(count(&[]), 0);
    }
}
