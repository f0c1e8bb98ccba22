//! A traffic tool at work inside a namespace.
//!
//! The tool prints `ready` once it can be talked to, and one line of JSON at
//! its end. Closing its standard input asks it to finish.

use std::{
    io::{BufRead, BufReader, Lines, Write},
    process::{Child, ChildStdout, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use serde::de::DeserializeOwned;

use crate::{binaries, namespace::Namespace, wait};

/// A running tool; killed when dropped before its end.
#[derive(Debug)]
pub struct Task {
    what: String,
    child: Child,
    output: Lines<BufReader<ChildStdout>>,
}

impl Task {
    /// Starts `lab <arguments>` and waits for `ready`.
    ///
    /// # Errors
    /// When the tool ends before that.
    pub fn start(namespace: &Namespace, arguments: &str) -> Result<Self> {
        let what = format!("{}: lab {arguments}", namespace.name());
        let mut command = namespace.command(binaries::lab()?);
        command
            .args(arguments.split_whitespace())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut child = namespace.spawn(command)?;
        let stdout = child.stdout.take().context("tool without stdout")?;
        let mut task = Self {
            what,
            child,
            output: BufReader::new(stdout).lines(),
        };
        match task.output.next() {
            Some(line) if line.as_ref().is_ok_and(|line| line == "ready") => Ok(task),
            other => bail!(
                "{} did not get ready (its reason is above): {other:?}",
                task.what
            ),
        }
    }

    /// Process id, for instance to measure its CPU time.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether it has ended by itself.
    ///
    /// # Errors
    /// When it cannot be asked.
    pub fn has_ended(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_some())
    }

    /// Writes a line to the tool's standard input.
    ///
    /// # Errors
    /// When it has ended.
    pub fn tell(&mut self, line: &str) -> Result<()> {
        let input = self.child.stdin.as_mut();
        let input = input.with_context(|| format!("{} was asked to finish", self.what))?;
        // One call: the tool wakes once.
        let told = input.write_all(format!("{line}\n").as_bytes());
        told.with_context(|| format!("{} has ended (its reason is above)", self.what))
    }

    /// Waits for the next line of a tool that reports more than once.
    ///
    /// # Errors
    /// When it ends instead, or says something else.
    pub fn next_report<T: DeserializeOwned>(&mut self) -> Result<T> {
        let line = self.output.next().transpose()?;
        let line = line.with_context(|| format!("{} ended without a report", self.what))?;
        serde_json::from_str(&line).with_context(|| format!("{} says: {line}", self.what))
    }

    /// Waits for the tool's own end and gives its result.
    ///
    /// # Errors
    /// When it fails or says something else.
    pub fn result<T: DeserializeOwned>(mut self) -> Result<T> {
        let mut last = None;
        for line in self.output.by_ref() {
            last = Some(line?);
        }
        let what = &self.what;
        let child = &mut self.child;
        let status = wait::until(what, Duration::from_secs(5), || Ok(child.try_wait()?))?;
        ensure!(
            status.success(),
            "{} failed with {status} (its reason is above)",
            self.what
        );
        let line = last.with_context(|| format!("{} gave no result", self.what))?;
        serde_json::from_str(&line)
            .with_context(|| format!("{} gave an odd result: {line}", self.what))
    }

    /// Asks the tool to finish, then as [`Self::result`].
    ///
    /// # Errors
    /// As [`Self::result`].
    pub fn finish<T: DeserializeOwned>(mut self) -> Result<T> {
        drop(self.child.stdin.take());
        self.result()
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
