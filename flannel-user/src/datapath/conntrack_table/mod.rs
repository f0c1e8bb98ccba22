//! Conntrack's table: connections written, removed and read by ctnetlink.
//!
//! A flow that conntrack has never seen is handed over by writing the entry that
//! it would have. Thousands go at once when rules change, so requests leave in
//! batches: one system call each would cost three times the time.
//!
//! Everything here blocks for as long as the kernel works, so it belongs on a
//! thread of its own. A table belongs to the network namespace of the thread
//! that opened it, for ever.

mod entry;

use std::io;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
    conntrack::ConntrackMessage,
};
use netlink_sys::protocols::NETLINK_NETFILTER;

pub use self::entry::{Entry, TcpFlags, TcpState, Tuple, status, tcp_flags};
use super::netlink::socket::NetlinkFd;

/// Requests per send: more gain nothing measurable.
const BATCH: usize = 64;
/// Receive buffer in bytes. The answer to a question costs about 5 kB of it.
const RECEIVE_BUFFER: usize = 4 << 20;
/// Bytes per receive; the kernel fills at most 32 kB per part of a dump.
const DATAGRAM: usize = 64 << 10;
/// How often a dump is repeated that was torn by a concurrent change of the table's size.
const TORN_DUMP_RETRIES: usize = 3;

const NLM_F_DUMP_INTR: u16 = 0x10;
const NLMSG_HEADER: usize = 16;

/// Why an entry was not written, removed or read.
#[derive(Debug, thiserror::Error)]
pub enum TableError {
    /// The kernel refused this one.
    #[error("conntrack refused: {0}")]
    Refused(#[source] io::Error),
    /// The socket failed: what became of this one is unknown.
    #[error("cannot {action} the conntrack socket: {source}")]
    Socket {
        /// What was tried.
        action: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

impl TableError {
    /// The kernel's error number, 0 where there is none.
    #[must_use]
    pub fn errno(&self) -> i32 {
        let (Self::Refused(source) | Self::Socket { source, .. }) = self;
        source.raw_os_error().unwrap_or(0)
    }

    fn socket(action: &'static str, source: io::Error) -> Self {
        Self::Socket { action, source }
    }

    /// The same for every other request of a batch.
    fn repeated(&self) -> Self {
        let again = |error: &io::Error| match error.raw_os_error() {
            Some(number) => io::Error::from_raw_os_error(number),
            None => io::Error::new(error.kind(), error.to_string()),
        };
        match self {
            Self::Refused(source) => Self::Refused(again(source)),
            Self::Socket { action, source } => Self::socket(action, again(source)),
        }
    }
}

/// The answer to one request.
type Answer = Result<Option<Entry>, TableError>;

/// Conntrack's table of one network namespace.
#[derive(Debug)]
pub struct ConntrackTable {
    socket: NetlinkFd,
    sequence: u32,
    datagram: Vec<u8>,
}

impl ConntrackTable {
    /// Opens the table of the calling thread's network namespace.
    ///
    /// # Errors
    /// The system's reason.
    pub fn open() -> Result<Self, TableError> {
        let open = || -> io::Result<NetlinkFd> {
            let socket = NetlinkFd::asking(NETLINK_NETFILTER)?;
            // Refusals without a copy of what was refused.
            socket.0.set_cap_ack(true)?;
            socket.receive_buffer(RECEIVE_BUFFER)?;
            Ok(socket)
        };
        Ok(Self {
            socket: open().map_err(|error| TableError::socket("open", error))?,
            sequence: 0,
            datagram: vec![0; DATAGRAM],
        })
    }

    /// Writes entries of new connections, one result each. An entry of the same tuple makes way:
    /// it is of an older connection, whose sequence numbers conntrack would go on to compare with.
    pub fn insert(&mut self, entries: &[Entry]) -> Vec<Result<(), TableError>> {
        let mut results = self.write(entries.iter(), NLM_F_EXCL);
        self.replace(entries, &mut results, libc::EEXIST);
        results
    }

    /// Writes what has become of connections, one result each, whether there is an entry or not.
    pub fn update(&mut self, entries: &[Entry]) -> Vec<Result<(), TableError>> {
        let mut results = self.write(entries.iter(), 0);
        // The kernel does not take ASSURED from an entry: the old one must go first.
        self.replace(entries, &mut results, libc::EBUSY);
        results
    }

    /// Once more, without what was there, for those that were refused by error number `refusal`.
    fn replace(&mut self, entries: &[Entry], results: &mut [Result<(), TableError>], refusal: i32) {
        let is_refused = |result: &Result<_, TableError>| {
            result.as_ref().is_err_and(|error| error.errno() == refusal)
        };
        let refused: Vec<usize> = (0..results.len())
            .filter(|index| is_refused(&results[*index]))
            .collect();
        if refused.is_empty() {
            return;
        }
        let old: Vec<Tuple> = refused.iter().map(|one| entries[*one].original).collect();
        // What cannot be deleted is refused once more.
        self.delete(&old);
        let again = self.write(refused.iter().map(|one| &entries[*one]), 0);
        for (index, result) in refused.into_iter().zip(again) {
            results[index] = result;
        }
    }

    /// Without `NLM_F_EXCL` an entry that is there is changed.
    fn write<'a>(
        &mut self,
        entries: impl Iterator<Item = &'a Entry>,
        exclusive: u16,
    ) -> Vec<Result<(), TableError>> {
        self.ask(
            entries.map(|entry| ConntrackMessage::New(entry.attributes())),
            NLM_F_CREATE | NLM_F_ACK | exclusive,
        )
        .into_iter()
        .map(|answer| answer.map(drop))
        .collect()
    }

    /// Removes connections, one result each: `false` if there was none.
    pub fn delete(&mut self, originals: &[Tuple]) -> Vec<Result<bool, TableError>> {
        self.ask(
            originals
                .iter()
                .map(|one| ConntrackMessage::Delete(entry::key(*one))),
            NLM_F_ACK,
        )
        .into_iter()
        .map(|answer| match answer {
            Ok(_) => Ok(true),
            Err(error) if error.errno() == libc::ENOENT => Ok(false),
            Err(error) => Err(error),
        })
        .collect()
    }

    /// One connection by its original tuple, or by that of its reply.
    ///
    /// # Errors
    /// Anything but that there is none.
    pub fn get(&mut self, tuple: &Tuple) -> Answer {
        self.get_many(std::slice::from_ref(tuple))
            .pop()
            .unwrap_or(Ok(None))
    }

    /// The same for many, one result each.
    pub fn get_many(&mut self, tuples: &[Tuple]) -> Vec<Answer> {
        self.ask(
            tuples
                .iter()
                .map(|one| ConntrackMessage::Get(entry::key(*one))),
            0,
        )
        .into_iter()
        .map(|answer| match answer {
            Err(error) if error.errno() == libc::ENOENT => Ok(None),
            answer => answer,
        })
        .collect()
    }

    /// All TCP connections over IPv4 that `wanted` takes. A table that changes meanwhile may show a
    /// connection twice, or not at all if it is younger than the question.
    ///
    /// # Errors
    /// The kernel's refusal, or the socket's fault.
    pub fn dump(
        &mut self,
        mut wanted: impl FnMut(&Entry) -> bool,
    ) -> Result<Vec<Entry>, TableError> {
        for _ in 0..TORN_DUMP_RETRIES {
            let (entries, torn) = self.dump_once(&mut wanted)?;
            if !torn {
                return Ok(entries);
            }
        }
        // Still changing: the last picture is as good as any.
        Ok(self.dump_once(&mut wanted)?.0)
    }

    fn dump_once(
        &mut self,
        wanted: &mut impl FnMut(&Entry) -> bool,
    ) -> Result<(Vec<Entry>, bool), TableError> {
        let mut bytes = Vec::new();
        self.encode(ConntrackMessage::Get(Vec::new()), NLM_F_DUMP, &mut bytes);
        self.send(&bytes)?;
        let mut entries = Vec::new();
        let mut torn = false;
        loop {
            let length = self.receive()?;
            for message in messages(&self.datagram[..length]) {
                if message.header.sequence_number != self.sequence {
                    continue;
                }
                torn |= message.header.flags & NLM_F_DUMP_INTR != 0;
                match message.payload {
                    NetlinkPayload::InnerMessage(message) => {
                        entries.extend(connection(&message).filter(&mut *wanted));
                    }
                    NetlinkPayload::Done(done) if done.code == 0 => return Ok((entries, torn)),
                    NetlinkPayload::Done(done) => {
                        return Err(TableError::Refused(io::Error::from_raw_os_error(
                            -done.code,
                        )));
                    }
                    NetlinkPayload::Error(error) => {
                        let code = error.code.map_or(0, |code| -code.get());
                        return Err(TableError::Refused(io::Error::from_raw_os_error(code)));
                    }
                    _ => {}
                }
            }
        }
    }

    /// Sends requests in batches. As many answers as requests, in their order.
    fn ask(&mut self, requests: impl Iterator<Item = ConntrackMessage>, flags: u16) -> Vec<Answer> {
        let mut answers = Vec::new();
        let mut requests = requests.peekable();
        while requests.peek().is_some() {
            let batch: Vec<_> = requests.by_ref().take(BATCH).collect();
            answers.extend(self.ask_batch(batch, flags));
        }
        answers
    }

    fn ask_batch(&mut self, batch: Vec<ConntrackMessage>, flags: u16) -> Vec<Answer> {
        let count = batch.len();
        let first = self.sequence.wrapping_add(1);
        let mut bytes = Vec::with_capacity(count * 192);
        for message in batch {
            self.encode(message, flags, &mut bytes);
        }
        let mut answers: Vec<Option<Answer>> = (0..count).map(|_| None).collect();
        let outcome = self
            .send(&bytes)
            .and_then(|()| self.collect(first, &mut answers));
        let missing = outcome.err().unwrap_or_else(|| {
            TableError::socket("read from", io::ErrorKind::UnexpectedEof.into())
        });
        answers
            .into_iter()
            .map(|answer| answer.unwrap_or_else(|| Err(missing.repeated())))
            .collect()
    }

    /// Receives until every request is answered. Answers to earlier requests are dropped.
    fn collect(&mut self, first: u32, answers: &mut [Option<Answer>]) -> Result<(), TableError> {
        let mut open = answers.len();
        while open > 0 {
            let length = self.receive()?;
            for message in messages(&self.datagram[..length]) {
                let index = message.header.sequence_number.wrapping_sub(first) as usize;
                let Some(answer @ None) = answers.get_mut(index) else {
                    continue;
                };
                *answer = Some(match message.payload {
                    NetlinkPayload::InnerMessage(message) => Ok(connection(&message)),
                    NetlinkPayload::Error(error) => match error.code {
                        None => Ok(None),
                        Some(code) => Err(TableError::Refused(io::Error::from_raw_os_error(
                            -code.get(),
                        ))),
                    },
                    _ => continue,
                });
                open -= 1;
            }
        }
        Ok(())
    }

    /// Appends one message to `bytes` under the next sequence number.
    fn encode(&mut self, message: ConntrackMessage, flags: u16, bytes: &mut Vec<u8>) {
        self.sequence = self.sequence.wrapping_add(1);
        let header = NetfilterHeader::new(NetfilterProtoFamily::IPv4, 0, 0);
        let mut message = NetlinkMessage::from(NetfilterMessage::new(header, message));
        message.header.flags = NLM_F_REQUEST | flags;
        message.header.sequence_number = self.sequence;
        message.finalize();
        let start = bytes.len();
        bytes.resize(start + align(message.buffer_len()), 0);
        message.serialize(&mut bytes[start..]);
    }

    fn send(&self, bytes: &[u8]) -> Result<(), TableError> {
        self.socket
            .0
            .send(bytes, libc::MSG_NOSIGNAL)
            .map(drop)
            .map_err(|error| TableError::socket("write to", error))
    }

    fn receive(&mut self) -> Result<usize, TableError> {
        loop {
            match self.socket.0.recv(&mut &mut self.datagram[..], 0) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                outcome => return outcome.map_err(|error| TableError::socket("read from", error)),
            }
        }
    }
}

fn connection(message: &NetfilterMessage) -> Option<Entry> {
    match &message.inner {
        NetfilterMessageInner::Conntrack(ConntrackMessage::New(attributes)) => {
            Entry::read(attributes)
        }
        _ => None,
    }
}

/// The messages of one datagram; what cannot be read is left out and does not hide what follows.
fn messages(mut datagram: &[u8]) -> impl Iterator<Item = NetlinkMessage<NetfilterMessage>> {
    std::iter::from_fn(move || {
        let (length, _) = datagram.split_first_chunk::<4>()?;
        let length = u32::from_ne_bytes(*length) as usize;
        if length < NLMSG_HEADER || length > datagram.len() {
            return None;
        }
        let message = &datagram[..length];
        datagram = &datagram[align(length).min(datagram.len())..];
        Some(NetlinkMessage::deserialize(message).ok())
    })
    .flatten()
}

/// Netlink messages start at multiples of four bytes.
fn align(length: usize) -> usize {
    (length + 3) & !3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cut_datagram_ends_the_messages() {
        assert_eq!(messages(&[200, 0, 0, 0, 1, 2]).count(), 0);
        assert_eq!(messages(&[]).count(), 0);
    }

    #[test]
    fn every_request_of_a_broken_batch_gets_the_same_answer() {
        let error = TableError::socket("write to", io::Error::from_raw_os_error(libc::ENOBUFS));
        assert_eq!(error.repeated().errno(), libc::ENOBUFS);
        assert_eq!(error.repeated().to_string(), error.to_string());
    }
}
