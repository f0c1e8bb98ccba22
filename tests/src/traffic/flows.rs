//! One request and one response in each of many UDP flows, one flow after the
//! other: what a packet costs where no cache knows its flow.

use std::{
    net::{Ipv4Addr, SocketAddrV4, UdpSocket},
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use nix::sys::{
    epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
    resource::{Resource, setrlimit},
};
use serde::{Deserialize, Serialize};

use super::{ready, request_response::ServeReport, share, told_to_finish};

/// How long a lost response is waited for.
const PATIENCE: Duration = Duration::from_secs(2);
/// Bytes of a request and of a response.
const SIZE: usize = 64;

/// Arguments of the server.
#[derive(Debug, clap::Args)]
pub struct ServeArgs {
    /// First port.
    #[arg(long)]
    port: u16,
    /// How many.
    #[arg(long)]
    ports: u16,
    /// Stay on this CPU.
    #[arg(long)]
    cpu: Option<usize>,
}

/// Arguments of the client.
#[derive(Debug, clap::Args)]
pub struct FlowsArgs {
    /// Address and first port of the server.
    #[arg(long)]
    to: SocketAddrV4,
    /// How many ports it has.
    #[arg(long)]
    ports: u16,
    /// Flows in all.
    #[arg(long)]
    flows: u32,
    /// How often each flow is used before the measurement.
    #[arg(long, default_value_t = 1)]
    turns: u32,
    /// Seconds to measure.
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Stay on this CPU.
    #[arg(long)]
    cpu: Option<usize>,
}

/// What the client measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FlowsReport {
    /// Transactions in all, those before the measurement included.
    pub all: u64,
    /// Transactions per second.
    pub per_second: f64,
}

/// Answers on all ports, until told.
///
/// # Errors
/// When a socket fails.
pub fn serve(args: &ServeArgs) -> Result<ServeReport> {
    share(args.cpu)?;
    let epoll = Epoll::new(EpollCreateFlags::empty())?;
    let mut sockets = Vec::new();
    for index in 0..args.ports {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, args.port + index))?;
        socket.set_nonblocking(true)?;
        epoll.add(&socket, EpollEvent::new(EpollFlags::EPOLLIN, index.into()))?;
        sockets.push(socket);
    }
    let finish = told_to_finish();
    ready()?;
    let mut events = vec![EpollEvent::empty(); sockets.len()];
    let mut message = [0; SIZE];
    let mut answered = 0;
    while !finish.load(Ordering::Relaxed) {
        let count = epoll.wait(&mut events, EpollTimeout::from(50_u8))?;
        for event in &events[..count] {
            let socket = &sockets[event.data() as usize];
            let (length, from) = socket.recv_from(&mut message)?;
            socket.send_to(&message[..length], from)?;
            answered += 1;
        }
    }
    Ok(ServeReport { answered })
}

/// Measures.
///
/// # Errors
/// When a datagram is lost or the sockets are too many.
pub fn client(args: &FlowsArgs) -> Result<FlowsReport> {
    share(args.cpu)?;
    ensure!(args.flows > 0 && args.ports > 0, "no flow to measure");
    let count = args.flows.div_ceil(args.ports.into());
    let limit = u64::from(count) + 100;
    setrlimit(Resource::RLIMIT_NOFILE, limit, limit).context("cannot have so many sockets open")?;
    let sockets = (0..count)
        .map(|_| {
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
            socket.set_read_timeout(Some(PATIENCE))?;
            Ok(socket)
        })
        .collect::<Result<Vec<_>>>()?;
    ready()?;
    let mut message = [0; SIZE];
    let mut ask = |flow: u32| -> Result<()> {
        let (socket, port) = (flow % count, flow / count);
        let port = args.to.port() + u16::try_from(port)?;
        let socket = &sockets[socket as usize];
        socket.send_to(&message, SocketAddrV4::new(*args.to.ip(), port))?;
        let (length, _) = socket
            .recv_from(&mut message)
            .with_context(|| format!("no response in flow {flow}"))?;
        ensure!(length == SIZE, "a response of {length} bytes");
        Ok(())
    };
    for _ in 0..args.turns {
        for flow in 0..args.flows {
            ask(flow)?;
        }
    }
    let length = Duration::from_secs_f64(args.seconds);
    let start = Instant::now();
    let mut done = 0_u32;
    while start.elapsed() < length {
        ask(scattered(done, args.flows))?;
        done += 1;
    }
    Ok(FlowsReport {
        all: u64::from(args.flows) * u64::from(args.turns) + u64::from(done),
        per_second: f64::from(done) / start.elapsed().as_secs_f64(),
    })
}

/// The flow of transaction `number`: all equally often, neighbours far apart.
fn scattered(number: u32, flows: u32) -> u32 {
    number.wrapping_mul(2_654_435_761) % flows
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::scattered;

    #[test]
    fn all_flows_are_used() {
        let used: BTreeSet<u32> = (0..5000).map(|number| scattered(number, 1000)).collect();
        assert!(used.len() > 990, "{}", used.len());
    }
}
