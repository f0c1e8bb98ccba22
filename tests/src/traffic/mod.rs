//! Traffic tools: subcommands of the `lab` binary that run inside pods.
//!
//! Each prints `ready` when it can be talked to and one line of JSON at its
//! end; [`crate::task::Task`] is the other side of that. A tool that runs "until
//! told" ends when its standard input is closed.

pub mod connections;
pub mod crossing;
pub mod datagrams;
pub mod epoll;
pub mod flood;
pub mod flows;
pub mod forged;
pub mod kept;
pub mod latency;
pub mod many_flows;
pub mod many_ports;
pub mod pattern;
pub mod pinger;
pub mod queue;
pub mod raw_udp;
pub mod request_response;
pub mod route;
pub mod segments;
pub mod short_connections;
pub mod socket;
pub mod stream;
pub mod timing;

use std::{
    io::{Read, Write},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use anyhow::Result;
use serde::Serialize;

/// Every tool's arguments.
#[derive(Debug, clap::Subcommand)]
pub enum Tool {
    /// Answer every UDP datagram with itself, until told.
    UdpEcho(pinger::EchoArgs),
    /// Send numbered datagrams at a steady rate to an echo, and miss none.
    UdpPing(pinger::PingArgs),
    /// Receive datagrams of `udp-send` and say how they arrived, until told.
    UdpReceive(datagrams::ReceiveArgs),
    /// Send datagrams of a given size and header.
    UdpSend(datagrams::SendArgs),
    /// Accept one TCP stream.
    StreamServe(stream::ServeArgs),
    /// Run one TCP stream, data checked word by word at the receiver.
    Stream(stream::StreamArgs),
    /// Answer requests on one CPU, until told.
    RrServe(request_response::ServeArgs),
    /// Count requests and responses on one CPU.
    Rr(request_response::ClientArgs),
    /// Ask once in every new UDP flow, on one CPU.
    RrFirst(request_response::FirstArgs),
    /// Serve short connections on one CPU, until told.
    CrrServe(short_connections::ServeArgs),
    /// Count short connections on one CPU.
    Crr(short_connections::ClientArgs),
    /// Answer on many ports on one CPU, until told.
    FlowsServe(flows::ServeArgs),
    /// Ask once in each of many UDP flows in turn, on one CPU.
    Flows(flows::FlowsArgs),
    /// Count datagrams, until told.
    UdpSink(flood::SinkArgs),
    /// Send datagrams as fast as one CPU can.
    UdpFlood(flood::FloodArgs),
    /// Find the routers on the way.
    Route(route::RouteArgs),
    /// Send VXLAN packets made by hand.
    Forge(forged::ForgeArgs),
    /// Send UDP packets whose headers are made by hand.
    RawUdp(raw_udp::RawArgs),
    /// Send TCP segments made by hand, to and from where one likes.
    Segments(segments::SegmentsArgs),
    /// Send everything back over TCP, until told.
    KeptServe(kept::ServeArgs),
    /// Keep TCP connections open until told, and use them once more.
    Kept(kept::ClientArgs),
    /// Open TCP connections to a port that does the same to ours.
    Cross(crossing::CrossArgs),
    /// Accept TCP connections and end each as its client asks, until told.
    ConnectionsServe(connections::ServeArgs),
    /// Make TCP connections that end in a chosen way.
    Connections(connections::ClientArgs),
    /// Take packets from an NFQUEUE rule and let them go on, until told.
    Queue(queue::QueueArgs),
    /// Answer many flows at once, until told.
    ManyServe(many_flows::ServeArgs),
    /// Many request/response flows at once.
    Many(many_flows::ClientArgs),
    /// Serve short connections on many ports, until told.
    PortsServe(many_ports::ServeArgs),
    /// Make short connections to many ports in turn.
    Ports(many_ports::ClientArgs),
}

impl Tool {
    /// Runs it to its end.
    ///
    /// # Errors
    /// When it cannot do its work; lost packets are a result, not an error.
    pub fn run(&self) -> Result<()> {
        match self {
            Self::UdpEcho(args) => report(&pinger::echo(args)?),
            Self::UdpPing(args) => report(&pinger::ping(args)?),
            Self::UdpReceive(args) => report(&datagrams::receive(args)?),
            Self::UdpSend(args) => report(&datagrams::send(args)?),
            Self::StreamServe(args) => report(&stream::serve(args)?),
            Self::Stream(args) => report(&stream::run(args)?),
            Self::RrServe(args) => report(&request_response::serve(args)?),
            Self::Rr(args) => report(&request_response::client(args)?),
            Self::RrFirst(args) => report(&request_response::first(args)?),
            Self::CrrServe(args) => report(&short_connections::serve(args)?),
            Self::Crr(args) => report(&short_connections::client(args)?),
            Self::FlowsServe(args) => report(&flows::serve(args)?),
            Self::Flows(args) => report(&flows::client(args)?),
            Self::UdpSink(args) => report(&flood::sink(args)?),
            Self::UdpFlood(args) => report(&flood::flood(args)?),
            Self::Route(args) => report(&route::find(args)?),
            Self::Forge(args) => report(&forged::send(args)?),
            Self::RawUdp(args) => report(&raw_udp::send(args)?),
            Self::Segments(args) => report(&segments::send(args)?),
            Self::KeptServe(args) => report(&kept::serve(args)?),
            Self::Kept(args) => report(&kept::client(args)?),
            Self::Cross(args) => report(&crossing::cross(args)?),
            Self::ConnectionsServe(args) => report(&connections::serve(args)?),
            Self::Connections(args) => report(&connections::client(args)?),
            Self::Queue(args) => report(&queue::pass_on(args)?),
            Self::ManyServe(args) => report(&many_flows::serve(args)?),
            Self::Many(args) => report(&many_flows::client(args)?),
            Self::PortsServe(args) => report(&many_ports::serve(args)?),
            Self::Ports(args) => report(&many_ports::client(args)?),
        }
    }
}

/// The line that [`crate::task::Task::start`] waits for.
fn ready() -> Result<()> {
    println!("ready");
    std::io::stdout().flush()?;
    Ok(())
}

fn report(result: &impl Serialize) -> Result<()> {
    println!("{}", serde_json::to_string(result)?);
    Ok(())
}

/// Becomes true when standard input ends.
fn told_to_finish() -> Arc<AtomicBool> {
    let flag = Arc::new(AtomicBool::new(false));
    let setter = Arc::clone(&flag);
    thread::spawn(move || {
        // A broken pipe is an end like any other.
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        setter.store(true, Ordering::Relaxed);
    });
    flag
}

/// Keeps the calling thread, and those it starts, on one CPU.
fn pin_to(cpu: Option<usize>) -> Result<()> {
    if let Some(cpu) = cpu {
        let mut set = nix::sched::CpuSet::new();
        set.set(cpu)?;
        nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &set)?;
    }
    Ok(())
}

/// Stays on a CPU that the other end shares, before everybody else there: what the two do is the
/// measure, and somebody's build in between is not. Only for ends that take turns: a sender that
/// goes before the kernel's own threads would starve them.
fn share(cpu: Option<usize>) -> Result<()> {
    pin_to(cpu)?;
    if cpu.is_some() {
        be_nice(-20)?;
    }
    Ok(())
}

/// The calling thread's niceness, and that of those it starts.
fn be_nice(niceness: i32) -> Result<()> {
    // SAFETY: a system call without memory arguments, for the calling process.
    let result = unsafe { nix::libc::setpriority(nix::libc::PRIO_PROCESS, 0, niceness) };
    nix::errno::Errno::result(result)?;
    Ok(())
}
