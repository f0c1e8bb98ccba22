//! The short scenario for guest kernels: does this kernel run both datapaths?
//!
//! It needs `ip`, `ping` and this repository's binaries, nothing else, and
//! prints a line per check for whoever reads the serial console.

use std::{fs, time::Instant};

use anyhow::{Result, ensure};
use flannel_user::observe::status::Mode::{self, Ebpf, Netlink};

use crate::{cluster::Cluster, exchange, lab::Lab, paths::Packets, wait};

/// Arguments of `lab guest`.
#[derive(Debug, clap::Args)]
pub struct GuestArgs {
    /// What time limits are multiplied by: emulated processors are slow.
    #[arg(long, default_value_t = 10)]
    patience: u32,
    /// Bytes of each TCP stream.
    #[arg(long, default_value_t = 100_000_000)]
    bytes: u64,
}

/// Runs every check, also after one has failed.
///
/// # Errors
/// When the cluster does not start, or a check failed.
pub fn run(args: &GuestArgs) -> Result<()> {
    wait::be_patient(args.patience);
    // An initramfs may lack it.
    fs::create_dir_all(std::env::temp_dir())?;
    let mut failed = 0;
    let mut check = |what: &str, run: &mut dyn FnMut() -> Result<String>| {
        let start = Instant::now();
        match run() {
            Ok(figure) => println!(
                "ok {what}: {figure}({:.1} s)",
                start.elapsed().as_secs_f64()
            ),
            Err(error) => {
                failed += 1;
                println!("FAIL {what}: {error:#}");
            }
        }
    };
    let lab = Lab::with_nodes(2)?;
    let mut cluster = None;
    check("two agents start in ebpf mode", &mut || {
        cluster = Some(Cluster::start(&lab, &[Ebpf])?);
        for node in lab.nodes() {
            let status = node.status()?;
            ensure!(
                status.mode == Ebpf,
                "{}: {}",
                node.name(),
                status.mode_reason
            );
        }
        Ok(String::new())
    });
    if let Some(cluster) = &cluster {
        for mode in [Ebpf, Netlink] {
            check(&format!("{mode:?}: switch"), &mut || switch(cluster, mode));
            check(&format!("{mode:?}: ping both ways"), &mut || ping(cluster));
            check(&format!("{mode:?}: UDP"), &mut || datagrams(cluster));
            for direction in ["up", "down"] {
                check(&format!("{mode:?}: TCP stream {direction}"), &mut || {
                    stream(cluster, direction, args.bytes)
                });
            }
        }
    }
    ensure!(failed == 0, "{failed} checks failed");
    Ok(())
}

fn switch(cluster: &Cluster, mode: Mode) -> Result<String> {
    let (a, b) = cluster.nodes();
    a.mode(mode)?;
    b.mode(mode)?;
    cluster.warm_up()?;
    Ok(String::new())
}

fn ping(cluster: &Cluster) -> Result<String> {
    let (client, server) = (&cluster.client, &cluster.server);
    client.ping(&server.address().to_string(), 3)?;
    server.ping(&client.address().to_string(), 3)?;
    Ok("6 answers ".to_owned())
}

fn datagrams(cluster: &Cluster) -> Result<String> {
    let (client, server) = (&cluster.client, &cluster.server);
    let watch = cluster.watch()?;
    for size in [64, 1400] {
        // An emulated processor takes milliseconds for one: those that are under way together
        // while a flow is learned all take the kernel.
        exchange::datagrams(client, server, size, 100, "--rate 100")?;
        exchange::datagrams(server, client, size, 100, "--rate 100")?;
    }
    cluster.expect_paths_of_modes(&watch, 200, 200)?;
    exchange::datagrams(client, server, 4000, 50, "--rate 500")?;
    Ok("450 intact, counted by their path ".to_owned())
}

fn stream(cluster: &Cluster, direction: &str, bytes: u64) -> Result<String> {
    let watch = cluster.watch()?;
    let stream = exchange::stream(&cluster.client, &cluster.server, direction, bytes)?;
    cluster.expect_paths_of_modes(&watch, Packets::AtLeast(10), Packets::AtLeast(10))?;
    let received = stream.server.received.or(stream.client.received);
    let speed = received.map_or(0.0, |half| half.gbit_per_second());
    Ok(format!("{bytes} bytes intact, {speed:.2} Gbit/s "))
}
