//! A running `flanneld` on a node.

use std::{
    fs::{self, File},
    net::SocketAddrV4,
    path::PathBuf,
    process::{Child, Command, ExitStatus, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use flannel_user::observe::status::{Mode, Status};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    binaries,
    lab::Lab,
    node::{CONTROL_SOCKET, Node, SUBNET_FILE, UPLINK},
    wait,
};

/// Time for an agent to get ready, generous because machines are shared.
const READY: Duration = Duration::from_secs(20);

/// How an agent is started.
#[derive(Debug, Clone)]
pub struct AgentOptions {
    /// `--datapath`: `auto`, `ebpf` or `netlink`.
    pub datapath: &'static str,
    /// `--fast-path`: `off`, `direct` or `learned`.
    pub fast_path: &'static str,
    /// `--iface`.
    pub uplink: &'static str,
    /// Where leases come from, as arguments; the lab's lease directory unless told otherwise.
    pub registry: Option<Vec<String>>,
    /// Further arguments.
    pub arguments: Vec<String>,
    /// Further environment.
    pub environment: Vec<(&'static str, String)>,
    /// With the rights to load programs.
    pub bpf: bool,
    /// Another `flanneld` than the one under test.
    pub program: Option<PathBuf>,
    /// Leases from etcd at this address instead of the lab's directory.
    pub etcd: Option<SocketAddrV4>,
    /// With no flag that the original flannel lacks: everything else by default.
    pub plain: bool,
}

impl Default for AgentOptions {
    fn default() -> Self {
        Self {
            datapath: "ebpf",
            fast_path: "direct",
            uplink: UPLINK,
            registry: None,
            arguments: Vec::new(),
            environment: Vec::new(),
            bpf: true,
            program: None,
            etcd: None,
            plain: false,
        }
    }
}

impl AgentOptions {
    /// Starts in the given mode.
    #[must_use]
    pub fn in_mode(mode: Mode) -> Self {
        Self {
            datapath: match mode {
                Mode::Ebpf => "ebpf",
                Mode::Netlink => "netlink",
            },
            ..Self::default()
        }
    }

    /// With that `--fast-path`.
    #[must_use]
    pub fn fast_path(mut self, fast_path: &'static str) -> Self {
        self.fast_path = fast_path;
        self
    }

    /// With leases from another registry.
    #[must_use]
    pub fn registry(mut self, arguments: Vec<String>) -> Self {
        self.registry = Some(arguments);
        self
    }

    /// With one more argument.
    #[must_use]
    pub fn argument(mut self, argument: impl Into<String>) -> Self {
        self.arguments.push(argument.into());
        self
    }

    /// With one more environment variable.
    #[must_use]
    pub fn variable(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.environment.push((name, value.into()));
        self
    }

    /// Without the rights to load programs: the kernel refuses them.
    #[must_use]
    pub fn without_bpf(mut self) -> Self {
        self.bpf = false;
        self
    }

    fn command(&self, node: &Node) -> Result<Command> {
        let flanneld = self.program.clone().map_or_else(binaries::flanneld, Ok)?;
        let mut command = if self.bpf {
            node.namespace().command(flanneld)
        } else {
            let mut command = node.namespace().command("setpriv");
            command
                .arg("--bounding-set=-bpf,-perfmon,-sys_admin")
                .arg(flanneld);
            command
        };
        match (&self.registry, self.etcd) {
            (Some(arguments), _) => command.args(arguments),
            (None, Some(at)) => command.arg(format!("--etcd-endpoints=http://{at}")),
            (None, None) => command.arg("--lease-dir").arg(node.lease_dir()),
        };
        command
            .args(["--subnet-file", SUBNET_FILE])
            .args(["--iface", self.uplink])
            // Scenarios that are about the firewall say so themselves.
            .arg("--iptables-forward-rules=false")
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        if !self.plain {
            command
                .args(["--control-socket", CONTROL_SOCKET])
                .args(["--datapath", self.datapath])
                .args(["--fast-path", self.fast_path]);
        }
        // Last, since of a flag given twice the last value counts.
        command.args(&self.arguments);
        Ok(command)
    }
}

/// A live agent. Dropping it kills it as `kill -9` would; the datapath stays.
#[derive(Debug)]
pub struct Agent {
    node: Node,
    child: Child,
    log: PathBuf,
}

/// An agent that did not stay.
#[derive(Debug)]
pub struct Ended {
    /// How it ended.
    pub status: ExitStatus,
    /// All it wrote to standard error.
    pub log: String,
}

impl Agent {
    /// Starts an agent without waiting for anything.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn launch(node: &Node, options: &AgentOptions) -> Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(1);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let log = node
            .log_dir()
            .join(format!("{}-flanneld-{number}.log", node.name()));
        let mut command = options.command(node)?;
        command.stderr(File::create(&log)?);
        Ok(Self {
            node: node.clone(),
            child: node.namespace().spawn(command)?,
            log,
        })
    }

    /// Starts an agent and waits until it answers and is in sync with the registry.
    ///
    /// # Errors
    /// When it does not get ready; with its log.
    pub fn start(node: &Node, options: &AgentOptions) -> Result<Self> {
        let mut agent = Self::launch(node, options)?;
        agent.wait_until("is ready", |status| status.source.in_sync)?;
        Ok(agent)
    }

    /// Waits until its status fulfils a condition.
    ///
    /// # Errors
    /// When the agent ends or time is over; with its log.
    pub fn wait_until(
        &mut self,
        what: &str,
        condition: impl Fn(&Status) -> bool,
    ) -> Result<Status> {
        let what = format!("the agent of {} {what}", self.node.name());
        let pid = self.child.id();
        let (node, child) = (&self.node, &mut self.child);
        wait::until(&what, READY, || {
            if let Some(status) = child.try_wait()? {
                // No use in waiting on; the outer match tells the two cases apart.
                return Ok(Some(Err(status)));
            }
            let status = node.status()?;
            // A predecessor's socket may still answer for a moment.
            Ok((status.pid == pid && condition(&status)).then_some(Ok(status)))
        })
        .and_then(|outcome| match outcome {
            Ok(status) => Ok(status),
            Err(status) => bail!("{what}: it ended instead, {status}"),
        })
        .with_context(|| format!("log of {}:\n{}", self.node.name(), self.log()))
    }

    /// Waits until it has programmed exactly this many peers.
    ///
    /// # Errors
    /// As [`Self::wait_until`].
    pub fn wait_for_peers(&mut self, count: usize) -> Result<Status> {
        self.wait_until(&format!("has {count} peers"), |status| {
            status.peers.len() == count && status.kernel.last_error.is_none()
        })
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Time that its threads have run for so far, those that live.
    ///
    /// # Errors
    /// When it is gone.
    pub fn cpu_time(&self) -> Result<Duration> {
        let mut nanoseconds = 0;
        for task in fs::read_dir(format!("/proc/{}/task", self.pid()))? {
            // A thread may end meanwhile.
            let Ok(text) = fs::read_to_string(task?.path().join("schedstat")) else {
                continue;
            };
            let ran = text
                .split_whitespace()
                .next()
                .context("an empty schedstat")?;
            nanoseconds += ran.parse::<u64>()?;
        }
        Ok(Duration::from_nanos(nanoseconds))
    }

    /// The node it runs on.
    #[must_use]
    pub fn node(&self) -> &Node {
        &self.node
    }

    /// Everything it has written so far.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_else(|error| format!("(no log: {error})"))
    }

    /// `kill -9`.
    ///
    /// # Errors
    /// When it cannot be waited for.
    pub fn kill9(mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// SIGTERM, then its orderly end.
    ///
    /// # Errors
    /// When it stays.
    pub fn terminate(mut self) -> Result<Ended> {
        let pid = i32::try_from(self.child.id())?;
        kill(Pid::from_raw(pid), Signal::SIGTERM)?;
        // Closing inotify, which watches the lease directory, waits for the kernel's own
        // housekeeping (fsnotify_destroy_group): more than 10 s were seen on a busy machine.
        self.end_within(Duration::from_secs(60))
    }

    /// Waits for it to end by itself.
    ///
    /// # Errors
    /// When it stays; with its log.
    pub fn ends_within(mut self, limit: Duration) -> Result<Ended> {
        self.end_within(limit)
    }

    fn end_within(&mut self, limit: Duration) -> Result<Ended> {
        let what = format!("the agent of {} ends", self.node.name());
        let child = &mut self.child;
        let status = wait::until(&what, limit, || Ok(child.try_wait()?))
            .with_context(|| format!("log so far:\n{}", self.log()))?;
        Ok(Ended {
            status,
            log: self.log(),
        })
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// One agent per node, all of them knowing each other.
///
/// # Errors
/// When one does not get that far; with its log.
pub fn start_everywhere(lab: &Lab, options: &AgentOptions) -> Result<Vec<Agent>> {
    let mut agents = lab
        .nodes()
        .iter()
        .map(|node| Agent::start(node, options))
        .collect::<Result<Vec<_>>>()?;
    let peers = agents.len() - 1;
    for agent in &mut agents {
        agent.wait_for_peers(peers)?;
    }
    Ok(agents)
}
