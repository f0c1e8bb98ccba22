//! One unnamed namespace (a network, for nodes with mounts), held by a process.
//!
//! Nothing names it in the file system, so it disappears with its processes,
//! and all of them disappear with the lab ([`crate::spawner`]).

use std::{
    collections::BTreeSet,
    fs::File,
    io::{BufRead, BufReader, Read, Write},
    os::{
        fd::AsFd,
        unix::{fs::MetadataExt, process::CommandExt},
    },
    process::{Child, Command, Output, Stdio},
    sync::Arc,
    thread,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use nix::sched::{CloneFlags, setns, unshare};

use crate::{binaries, spawner, wait};

/// What a namespace holds apart from its network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Interfaces, routes, sockets: enough for a pod or a switch.
    Network,
    /// Besides: own /sys, /sys/fs/bpf and /run, as a node has them.
    Node,
}

/// A live namespace; dropping it kills its holder.
#[derive(Debug)]
pub struct Namespace {
    name: String,
    holder: Child,
    doors: Arc<Doors>,
}

/// Open handles through which others enter, in the order of entering.
#[derive(Debug)]
struct Doors {
    mounts: Option<File>,
    network: File,
}

impl Doors {
    /// Moves the calling thread inside. With mounts it must not share its
    /// working directory with other threads.
    fn enter(&self) -> nix::Result<()> {
        if let Some(mounts) = &self.mounts {
            setns(mounts.as_fd(), CloneFlags::CLONE_NEWNS)?;
        }
        setns(self.network.as_fd(), CloneFlags::CLONE_NEWNET)
    }
}

impl Namespace {
    /// Makes one; `name` is for messages only.
    ///
    /// # Errors
    /// Without root, or when the kernel refuses.
    pub fn new(name: &str, kind: Kind) -> Result<Self> {
        ensure!(
            nix::unistd::geteuid().is_root(),
            "the lab makes network namespaces, so it needs root"
        );
        let mut command = Command::new(binaries::lab()?);
        command.arg("hold").arg(name);
        if kind == Kind::Node {
            command.arg("--mounts");
        }
        command
            .stdin(Stdio::piped()) // its end tells the holder to go, too
            .stdout(Stdio::piped());
        let mut holder = spawner::spawn(command).context("cannot start a namespace holder")?;
        let mut line = String::new();
        BufReader::new(holder.stdout.take().context("holder without stdout")?)
            .read_line(&mut line)?;
        if line.trim() != "ready" {
            let status = holder.wait()?;
            bail!("the holder of namespace {name} failed ({status}); its reason is above");
        }
        let door = |kind: &str| {
            let path = format!("/proc/{}/ns/{kind}", holder.id());
            File::open(&path).with_context(|| format!("cannot open {path}"))
        };
        let doors = Doors {
            mounts: (kind == Kind::Node).then(|| door("mnt")).transpose()?,
            network: door("net")?,
        };
        let namespace = Self {
            name: name.to_owned(),
            holder,
            doors: Arc::new(doors),
        };
        // Router solicitations and the like would move the counters that the
        // scenarios compare; issue 3 is about IPv4 pods.
        if namespace.exists("/proc/sys/net/ipv6")? {
            namespace.sysctl("net.ipv6.conf.all.disable_ipv6", "1")?;
            namespace.sysctl("net.ipv6.conf.default.disable_ipv6", "1")?;
        }
        namespace.ip("link set lo up")?;
        Ok(namespace)
    }

    /// Its name in messages.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Process id of the holder: what `nsenter --target` and `ip … netns` take.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.holder.id()
    }

    /// Inode numbers of what it holds, as in `/proc/<pid>/ns`.
    ///
    /// # Errors
    /// When the handles cannot be read.
    pub fn inodes(&self) -> Result<BTreeSet<u64>> {
        let files = self.doors.mounts.iter().chain([&self.doors.network]);
        files.map(|file| Ok(file.metadata()?.ino())).collect()
    }

    /// What an operator types to look around inside.
    #[must_use]
    pub fn nsenter_line(&self) -> String {
        let mounts = if self.doors.mounts.is_some() {
            "--mount "
        } else {
            ""
        };
        format!("nsenter --target {} {mounts}--net", self.pid())
    }

    /// A command that will run inside.
    #[must_use]
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let doors = Arc::clone(&self.doors);
        let mut command = Command::new(program);
        // SAFETY: between fork and exec only setns is called, which is async-signal-safe.
        unsafe {
            command.pre_exec(move || Ok(doors.enter()?));
        }
        command
    }

    /// Starts `command` (made by [`Self::command`]) with both outputs piped.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn spawn(&self, command: Command) -> Result<Child> {
        let what = format!("{command:?}");
        spawner::spawn(command).with_context(|| format!("{}: cannot start {what}", self.name))
    }

    /// Runs a program to its end and gives everything it said.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn output(&self, argv: &[&str]) -> Result<Output> {
        self.output_with_input(argv, "")
    }

    fn output_with_input(&self, argv: &[&str], input: &str) -> Result<Output> {
        let (program, arguments) = argv.split_first().context("an empty command")?;
        let mut command = self.command(program);
        command
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = self.spawn(command)?;
        if let Some(mut stdin) = child.stdin.take() {
            // A program that failed early has closed its end; its status says so.
            let _ = stdin.write_all(input.as_bytes());
        }
        Ok(child.wait_with_output()?)
    }

    /// Runs a program that has to succeed; gives its standard output.
    ///
    /// # Errors
    /// When it fails, with what it said.
    pub fn run(&self, argv: &[&str]) -> Result<String> {
        let output = self.output(argv)?;
        self.checked(&argv.join(" "), &output)
    }

    /// The same with something to read on its standard input.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn run_with_input(&self, argv: &[&str], input: &str) -> Result<String> {
        let output = self.output_with_input(argv, input)?;
        self.checked(&argv.join(" "), &output)
    }

    fn checked(&self, what: &str, output: &Output) -> Result<String> {
        let out = String::from_utf8_lossy(&output.stdout);
        ensure!(
            output.status.success(),
            "{}: {what}: {}\n{}{out}",
            self.name,
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(out.into_owned())
    }

    /// `ip` with these words.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn ip(&self, words: &str) -> Result<String> {
        self.words("ip", words)
    }

    /// `bridge` with these words.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn bridge(&self, words: &str) -> Result<String> {
        self.words("bridge", words)
    }

    fn words(&self, program: &str, words: &str) -> Result<String> {
        let argv: Vec<&str> = std::iter::once(program)
            .chain(words.split_whitespace())
            .collect();
        self.run(&argv)
    }

    /// Several `ip` commands in one process, one a line.
    ///
    /// # Errors
    /// As [`Self::run`]; later lines are not run then.
    pub fn ip_batch(&self, lines: &str) -> Result<()> {
        let output = self.output_with_input(&["ip", "-batch", "-"], lines)?;
        self.checked(&format!("ip -batch:\n{lines}"), &output)?;
        Ok(())
    }

    /// Waits until an interface carries packets. After a veth's second end is up,
    /// a kernel worker still has to replace the queue that drops everything.
    ///
    /// # Errors
    /// When that does not happen within five seconds.
    pub fn wait_until_up(&self, interface: &str) -> Result<()> {
        let what = format!("{interface} of {} is up", self.name);
        wait::until_true(&what, Duration::from_secs(5), || {
            let link = self.ip(&format!("-o link show dev {interface}"))?;
            Ok(link.contains(" state UP ")
                && !link.contains(" qdisc noop ")
                && !link.contains(" state disabled "))
        })
    }

    /// Sets a sysctl by its dotted name (`/` for a dot inside an interface's name).
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        let path = sysctl_path(key);
        self.within(|| std::fs::write(&path, value))?
            .with_context(|| format!("{}: cannot set {key} to {value}", self.name))
    }

    /// Reads a sysctl.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn sysctl_value(&self, key: &str) -> Result<String> {
        let path = sysctl_path(key);
        let value = self
            .within(|| std::fs::read_to_string(&path))?
            .with_context(|| format!("{}: cannot read {key}", self.name))?;
        Ok(value.trim().to_owned())
    }

    /// Runs a closure on a thread inside. Files are those of the namespace.
    ///
    /// # Errors
    /// When the thread cannot enter.
    pub fn within<T: Send>(&self, job: impl FnOnce() -> T + Send) -> Result<T> {
        thread::scope(|scope| {
            scope
                .spawn(|| {
                    // setns(2) refuses a mount namespace to a thread that shares its root.
                    unshare(CloneFlags::CLONE_FS)?;
                    self.doors.enter()?;
                    Ok(job())
                })
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
        .map_err(|error: nix::Error| {
            anyhow::Error::new(error).context(format!("cannot enter namespace {}", self.name))
        })
    }

    /// Reads a file inside.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn read(&self, path: &str) -> Result<String> {
        self.within(|| std::fs::read_to_string(path))?
            .with_context(|| format!("{}: cannot read {path}", self.name))
    }

    /// Packets that an interface received and sent. Asked of the thread's own
    /// `/proc`, since pods share the host's `/sys`.
    ///
    /// # Errors
    /// When there is no such interface.
    pub fn packets_of(&self, interface: &str) -> Result<(u64, u64)> {
        let text = self.read("/proc/thread-self/net/dev")?;
        packets_of(&text, interface)
            .with_context(|| format!("{}: no interface {interface} in\n{text}", self.name))
    }

    /// Whether a path exists inside.
    ///
    /// # Errors
    /// When the namespace cannot be entered.
    pub fn exists(&self, path: &str) -> Result<bool> {
        self.within(|| std::path::Path::new(path).exists())
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

/// `name: bytes packets errs drop fifo frame compressed multicast bytes packets …`
fn packets_of(text: &str, interface: &str) -> Option<(u64, u64)> {
    let counters = text
        .lines()
        .find_map(|line| line.trim().strip_prefix(interface)?.strip_prefix(':'))?;
    let mut counters = counters.split_whitespace().map(str::parse);
    let received = counters.nth(1)?.ok()?;
    let sent = counters.nth(7)?.ok()?;
    Some((received, sent))
}

pub(crate) fn sysctl_path(key: &str) -> String {
    let swapped: String = key
        .chars()
        .map(|letter| match letter {
            '.' => '/',
            '/' => '.',
            other => other,
        })
        .collect();
    format!("/proc/sys/{swapped}")
}

/// The body of `lab hold`: make the namespace, say so, live until told otherwise.
///
/// # Errors
/// When the kernel refuses a namespace or a mount.
pub fn hold(kind: Kind) -> Result<()> {
    let mut flags = CloneFlags::CLONE_NEWNET;
    if kind == Kind::Node {
        flags |= CloneFlags::CLONE_NEWNS;
    }
    unshare(flags).context("cannot make a namespace (unshare)")?;
    if kind == Kind::Node {
        mount_like_a_node()?;
    }
    println!("ready");
    std::io::stdout().flush()?;
    // Ends when the lab closes the pipe, if the kernel has not killed us before.
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

fn mount_like_a_node() -> Result<()> {
    use nix::mount::{MsFlags, mount};
    mount(
        None::<&str>,
        "/",
        None::<&str>,
        MsFlags::MS_REC | MsFlags::MS_PRIVATE,
        None::<&str>,
    )
    .context("cannot make the node's mounts private")?;
    // sysfs shows the network namespace of whoever mounted it.
    for (kind, path) in [("sysfs", "/sys"), ("bpf", "/sys/fs/bpf"), ("tmpfs", "/run")] {
        mount(Some(kind), path, Some(kind), MsFlags::empty(), None::<&str>)
            .with_context(|| format!("cannot mount the node's own {kind} at {path}"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{packets_of, sysctl_path};

    #[test]
    fn packets_of_an_interface() {
        let text = "Inter-|   Receive\n face |bytes    packets\n  eth01: 1 2 3 4 5 6 7 8 9 10 11\n  eth0: 100 7 0 0 0 0 0 0 200 9 0 0\n";
        assert_eq!(packets_of(text, "eth0"), Some((7, 9)));
        assert_eq!(packets_of(text, "eth1"), None);
    }

    #[test]
    fn a_dot_in_an_interface_name_is_written_as_a_slash() {
        assert_eq!(
            sysctl_path("net.ipv4.conf.flannel/1.rp_filter"),
            "/proc/sys/net/ipv4/conf/flannel.1/rp_filter"
        );
    }
}
