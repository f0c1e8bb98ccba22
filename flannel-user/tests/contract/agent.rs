//! The real `flanneld` with a real etcd, in the network namespace of the calling thread.

use std::{
    fs::File,
    os::unix::{net::UnixDatagram, process::CommandExt as _},
    path::PathBuf,
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tempfile::TempDir;

use crate::namespace::run;

/// Longest time for anything, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);
/// The address of the node, in its uplink's network.
pub(crate) const ADDRESS: &str = "192.168.50.1";

/// What one node keeps in files, in a directory of its own.
pub(crate) struct Node(TempDir);

/// A running agent; killed when dropped.
pub(crate) struct Agent {
    child: Child,
    log: PathBuf,
}

impl Node {
    /// An uplink `eth0` and empty directories.
    pub(crate) fn new() -> Self {
        run("ip link add eth0 type veth peer name wire0");
        run("ip link set wire0 up");
        run(&format!("ip addr add {ADDRESS}/24 dev eth0"));
        run("ip link set eth0 up");
        Self(tempfile::tempdir().expect("a directory"))
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// In netlink mode and without firewall rules, so that nothing but a row's subject matters.
    pub(crate) fn command(&self, endpoints: &str, args: &[&str]) -> Command {
        let flag = |name: &str, file: &str| format!("--{name}={}", self.file(file).display());
        let mut command = Command::new(env!("CARGO_BIN_EXE_flanneld"));
        command
            .arg("--iface=eth0")
            .arg(format!("--etcd-endpoints={endpoints}"))
            .arg(flag("subnet-file", "run/subnet.env"))
            .arg(flag("control-socket", "control.sock"))
            .arg(flag("bpf-dir", "bpf"))
            .args(["--datapath=netlink", "--iptables-forward-rules=false"])
            .args(args)
            .stdout(File::create(self.file("stdout")).expect("a file"))
            .stderr(File::create(self.file("log")).expect("a log"));
        // SAFETY: prctl is async-signal-safe and nothing else happens before exec.
        unsafe { command.pre_exec(|| Ok(nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?)) };
        command
    }

    pub(crate) fn spawn(&self, endpoints: &str, args: &[&str]) -> Agent {
        let child = self.command(endpoints, args).spawn();
        Agent {
            child: child.expect("flanneld starts"),
            log: self.file("log"),
        }
    }

    /// Starts an agent and waits until it says `READY=1` as systemd hears it.
    pub(crate) async fn start(&self, endpoints: &str, args: &[&str]) -> Agent {
        let path = self.file("notify");
        let _ = std::fs::remove_file(&path);
        let socket = UnixDatagram::bind(&path).expect("a socket");
        socket.set_nonblocking(true).expect("set");
        let mut command = self.command(endpoints, args);
        let child = command.env("NOTIFY_SOCKET", &path).spawn();
        let mut agent = Agent {
            child: child.expect("flanneld starts"),
            log: self.file("log"),
        };
        let mut buffer = [0; 256];
        let mut said = String::new();
        until(&mut agent, "READY=1", || {
            if let Ok(length) = socket.recv(&mut buffer) {
                said += &String::from_utf8_lossy(&buffer[..length]);
            }
            said.lines().any(|line| line == "READY=1")
        })
        .await;
        agent
    }

    pub(crate) fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.file(name)).unwrap_or_default()
    }
}

impl Agent {
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Sends a signal and waits for the end.
    pub(crate) async fn end(mut self, signal: Signal) -> ExitStatus {
        kill(Pid::from_raw(self.child.id().cast_signed()), signal).expect("told");
        self.ended().await
    }

    /// Waits for it to end by itself.
    pub(crate) async fn ended(&mut self) -> ExitStatus {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("asked") {
                return status;
            }
            assert!(begun.elapsed() < PATIENCE, "it stays: {}", self.log());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    pub(crate) fn is_alive(&mut self) -> bool {
        self.child.try_wait().expect("asked").is_none()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits until it is so, while the agent lives.
pub(crate) async fn until(agent: &mut Agent, what: &str, mut is_so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(agent.is_alive(), "ended before {what}: {}", agent.log());
        assert!(begun.elapsed() < PATIENCE, "never {what}: {}", agent.log());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Runs `flanneld` to its end without a node: exit status, standard output, standard error.
pub(crate) fn flanneld(args: &[&str], env: &[(&str, &str)]) -> (Option<i32>, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_flanneld"))
        .args(args)
        .envs(env.iter().copied())
        .stdin(Stdio::null())
        .output()
        .expect("flanneld starts");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (
        output.status.code(),
        text(&output.stdout),
        text(&output.stderr),
    )
}
