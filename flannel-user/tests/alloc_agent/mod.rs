//! The real `flanneld` with backend `alloc`: a lease, a subnet file and the firewall, nothing else.

#![allow(dead_code, reason = "each test file uses its part")]

use std::{
    fs::File,
    os::unix::process::CommandExt as _,
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tempfile::TempDir;

/// Longest time a start or an end may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);

/// What agents on one host share, in a directory of its own.
pub(crate) struct Host(TempDir);

impl Host {
    /// The only subnet there is, is 10.244.1.0/24.
    pub(crate) fn new(nftables: bool) -> Self {
        let host = Self(tempfile::tempdir().expect("a directory"));
        std::fs::create_dir_all(host.0.path().join("leases/subnets")).expect("made");
        host.configure(nftables);
        host
    }

    pub(crate) fn configure(&self, nftables: bool) {
        let config = format!(
            r#"{{"Network":"10.244.0.0/16","SubnetMin":"10.244.1.0","SubnetMax":"10.244.1.0","EnableNFTables":{nftables},"Backend":{{"Type":"alloc"}}}}"#
        );
        std::fs::write(self.0.path().join("leases/config"), config).expect("written");
    }

    /// Starts an agent in the namespace of this thread; it ends with the thread.
    pub(crate) fn spawn(&self, iface: &str, args: &[&str], path: Option<&str>) -> Child {
        let in_directory = |name: &str| self.0.path().join(name).display().to_string();
        let mut agent = Command::new(env!("CARGO_BIN_EXE_flanneld"));
        agent
            .arg(format!("--iface={iface}"))
            .arg(format!("--lease-dir={}", in_directory("leases")))
            .arg(format!("--subnet-file={}", in_directory("subnet.env")))
            .arg(format!("--control-socket={}", in_directory("control.sock")))
            .args(args)
            .envs(path.map(|path| ("PATH", path)))
            .stdout(Stdio::null())
            .stderr(File::create(in_directory("log")).expect("a log"));
        // SAFETY: prctl may be called after fork, and nothing else is done there.
        unsafe { agent.pre_exec(|| Ok(nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?)) };
        agent.spawn().expect("flanneld starts")
    }

    /// Starts an agent and waits for its subnet file.
    pub(crate) fn start(&self, iface: &str, args: &[&str], path: Option<&str>) -> Child {
        let file = self.0.path().join("subnet.env");
        let _ = std::fs::remove_file(&file);
        let mut agent = self.spawn(iface, args, path);
        let start = Instant::now();
        while !file.exists() {
            let ended = agent.try_wait().expect("asked").is_some();
            assert!(
                !ended && start.elapsed() < PATIENCE,
                "no subnet file: {}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(1));
        }
        agent
    }

    /// What the last agent has logged.
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.0.path().join("log")).unwrap_or_default()
    }
}

/// Ends an agent as systemd would.
pub(crate) fn stop(mut agent: Child) {
    kill(Pid::from_raw(agent.id().cast_signed()), Signal::SIGTERM).expect("told");
    assert!(ended(&mut agent).success());
}

/// Waits for an agent to end.
pub(crate) fn ended(agent: &mut Child) -> ExitStatus {
    let start = Instant::now();
    loop {
        if let Some(status) = agent.try_wait().expect("asked") {
            return status;
        }
        assert!(start.elapsed() < PATIENCE, "it does not end");
        std::thread::sleep(Duration::from_millis(1));
    }
}
