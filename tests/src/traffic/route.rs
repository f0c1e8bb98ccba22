//! The routers between here and there, as traceroute finds them.

use std::{
    net::{Ipv4Addr, UdpSocket},
    time::{Duration, Instant},
};

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::{ready, socket};

/// Where nobody listens, as traceroute has it.
const FIRST_PORT: u16 = 33434;
/// How long a router has for its answer.
const PATIENCE: Duration = Duration::from_millis(800);
/// Probes per hop: routers limit how often they answer.
const TRIES: u16 = 3;

/// Arguments.
#[derive(Debug, clap::Args)]
pub struct RouteArgs {
    /// Where to.
    #[arg(long)]
    to: Ipv4Addr,
    /// The most hops to try.
    #[arg(long, default_value_t = 8)]
    max_hops: u8,
}

/// Every hop, `None` where nobody answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouteReport {
    /// In order of distance.
    pub hops: Vec<Option<Ipv4Addr>>,
    /// The last one is the destination itself.
    pub reached: bool,
}

enum Answer {
    Router(Ipv4Addr),
    Destination(Ipv4Addr),
}

/// Probes with growing time to live.
///
/// # Errors
/// When the socket fails.
pub fn find(args: &RouteArgs) -> Result<RouteReport> {
    let prober = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    socket::set_option(&prober, libc::IPPROTO_IP, libc::IP_RECVERR, 1)?;
    ready()?;
    let mut report = RouteReport {
        hops: Vec::new(),
        reached: false,
    };
    let mut port = FIRST_PORT;
    for ttl in 1..=args.max_hops {
        prober.set_ttl(ttl.into())?;
        let mut answer = None;
        for _ in 0..TRIES {
            port += 1;
            // A refusal reported here belongs to an earlier probe.
            let _ = prober.send_to(b"where am I", (args.to, port));
            answer = listen(&prober)?;
            if answer.is_some() {
                break;
            }
        }
        match answer {
            Some(Answer::Destination(address)) => {
                report.hops.push(Some(address));
                report.reached = true;
                break;
            }
            Some(Answer::Router(address)) => report.hops.push(Some(address)),
            None => report.hops.push(None),
        }
    }
    Ok(report)
}

fn listen(prober: &UdpSocket) -> Result<Option<Answer>> {
    let deadline = Instant::now() + PATIENCE;
    let mut buffer = [0; 512];
    while Instant::now() < deadline {
        match socket::receive(prober, &mut buffer, libc::MSG_ERRQUEUE | libc::MSG_DONTWAIT) {
            Ok(datagram) => {
                let Some(error) = datagram.error.filter(|error| error.from_icmp) else {
                    continue;
                };
                let Some(offender) = error.offender else {
                    continue;
                };
                match error.kind {
                    socket::ICMP_TIME_EXCEEDED => return Ok(Some(Answer::Router(offender))),
                    socket::ICMP_DESTINATION_UNREACHABLE => {
                        return Ok(Some(Answer::Destination(offender)));
                    }
                    _ => {}
                }
            }
            Err(error) if socket::is_timeout(&error) => {
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(None)
}
