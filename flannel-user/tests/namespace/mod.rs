//! A network namespace that lives as long as one test thread, and the commands in it.

#![allow(dead_code, reason = "each test file uses its part")]

use std::{
    future::Future,
    process::{Child, Command, Stdio},
};

use nix::sched::{CloneFlags, unshare};

/// Runs `test` on a thread of its own in a fresh network namespace, which the kernel takes away
/// with the thread. Panics pass through.
pub(crate) fn in_new_namespace<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send + 'static) {
    assert!(
        nix::unistd::geteuid().is_root(),
        "this test makes network namespaces and needs root: run it with sudo"
    );
    let thread = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).expect("a new network namespace");
        run("ip link set lo up");
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        runtime.block_on(test());
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// Runs one command line in the namespace of this thread and returns what it prints.
pub(crate) fn run(line: &str) -> String {
    try_run(line).unwrap_or_else(|error| panic!("{line}: {error}"))
}

/// The same; the error is what the command complained about.
pub(crate) fn try_run(line: &str) -> Result<String, String> {
    let mut words = line.split_whitespace();
    let output = Command::new(words.next().expect("a command"))
        .args(words)
        .output()
        .map_err(|error| error.to_string())?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        Err(String::from_utf8_lossy(&output.stderr).into_owned())
    }
}

/// Feeds `lines` to `ip -batch -` or `bridge -batch -`.
pub(crate) fn batch(tool: &str, lines: &str) {
    use std::io::Write as _;
    let mut child = Command::new(tool)
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .spawn()
        .expect("the tool starts");
    let mut stdin = child.stdin.take().expect("piped");
    stdin.write_all(lines.as_bytes()).expect("it reads");
    drop(stdin);
    assert!(child.wait().expect("it ends").success(), "{tool} -batch");
}

/// The lines of `text` without surrounding blanks, sorted.
pub(crate) fn lines(text: &str) -> Vec<String> {
    let mut lines: Vec<_> = text
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
        .filter(|line| !line.is_empty())
        .collect();
    lines.sort();
    lines
}

/// Another network namespace, held by a process that does nothing; gone on drop.
pub(crate) struct Elsewhere(Child);

impl Elsewhere {
    pub(crate) fn new() -> Self {
        let mut child = Command::new("unshare")
            .args(["--net", "sh", "-c", "echo ready; exec sleep 600"])
            .stdout(Stdio::piped())
            .spawn()
            .expect("unshare starts");
        let mut ready = String::new();
        let stdout = child.stdout.take().expect("piped");
        std::io::BufRead::read_line(&mut std::io::BufReader::new(stdout), &mut ready)
            .expect("it says ready");
        assert_eq!(ready, "ready\n");
        Self(child)
    }

    /// For `ip link … netns <pid>`.
    pub(crate) fn pid(&self) -> u32 {
        self.0.id()
    }

    /// Runs one command line inside.
    pub(crate) fn run(&self, line: &str) -> String {
        run(&format!("nsenter --net -t {} -- {line}", self.pid()))
    }
}

impl Drop for Elsewhere {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
