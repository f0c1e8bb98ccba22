//! `flanneld`: the agent of one node.

use std::{io::IsTerminal as _, path::PathBuf, process::ExitCode, sync::Arc, time::Duration};

use flannel_ebpf::layout::LAYOUT_VERSION;
use flannel_user::{
    agent::{self, Options},
    config::{Classes, Flags, ForgedVxlan},
    datapath::ebpf::EbpfOptions,
    source::{LeaseSource, etcd::EtcdSource, file::FileSource},
    uplink::UplinkChoice,
};
use ipnet::Ipv4Net;
use tracing::{error, info, warn};
use tracing_subscriber::EnvFilter;

/// Lets tests run an upgrade between two map layouts with one build.
const TEST_LAYOUT: &str = "FLANNEL_TEST_LAYOUT_VERSION";

fn main() -> ExitCode {
    let flags = Flags::from_process();
    tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::new(flags.log_filter()))
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .init();
    for warning in &flags.warnings {
        warn!("{warning}");
    }
    match run(&flags) {
        Ok(()) => ExitCode::SUCCESS,
        Err(cause) => {
            error!("{cause:#}");
            ExitCode::FAILURE
        }
    }
}

/// How long work under way in other threads may delay the end.
const LONGEST_END: Duration = Duration::from_secs(1);

fn run(flags: &Flags) -> anyhow::Result<()> {
    let source: Arc<dyn LeaseSource> = match &flags.lease_dir {
        Some(directory) => Arc::new(FileSource::new(directory.clone(), flags.lease_ttl)?),
        None => Arc::new(EtcdSource::new(&flags.etcd())?),
    };
    let options = Options {
        source,
        uplink: UplinkChoice {
            iface: flags.iface.clone(),
            iface_regex: flags.iface_regex.clone(),
            iface_can_reach: flags.iface_can_reach.map(|address| address.to_string()),
            public_ip: flags.public_ip.map(|address| address.to_string()),
        },
        subnet_file: flags.subnet_file.clone(),
        ip_masq: flags.ip_masq,
        random_fully: !flags.ip_masq_fully_random_disable,
        forward_rules: flags.iptables_forward_rules,
        firewall_period: flags.firewall_period(),
        blackhole_route: flags.ip_blackhole_route,
        renew_margin: flags.renew_margin(),
        datapath: flags.datapath,
        fast_path: flags.fast_path,
        classes: flags.fast_path_classes == Classes::Auto,
        exclusions: flags.fast_path_exclude.iter().cloned().collect(),
        drop_forged: flags.forged_vxlan == ForgedVxlan::Drop,
        control_socket: flags.control_socket.clone(),
        healthz: flags.healthz().map(|(ip, port)| (ip.to_owned(), port)),
        ebpf: EbpfOptions {
            bpf_dir: flags.bpf_dir.clone(),
            vni: 0,
            network: Ipv4Net::default(),
            attach: flags.tc_attach,
            flows: flags.fast_path_flows,
            validity: flags.fast_path_revalidate,
            conntrack_memory: PathBuf::new(),
            layout_version: layout_version(),
        },
    };
    info!(
        version = env!("CARGO_PKG_VERSION"),
        pid = std::process::id(),
        "flanneld starts"
    );
    // One thread: the work is small and comes in bursts, memory is counted per node.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let outcome = runtime.block_on(agent::run(options));
    // A file system that hangs must not keep the agent from ending.
    runtime.shutdown_timeout(LONGEST_END);
    outcome
}

fn layout_version() -> u32 {
    match std::env::var(TEST_LAYOUT)
        .ok()
        .and_then(|text| text.parse().ok())
    {
        Some(version) => {
            warn!(version, "{TEST_LAYOUT} is set: map layout of a test");
            version
        }
        None => LAYOUT_VERSION,
    }
}
