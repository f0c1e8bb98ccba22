//! Running the tools that write firewall rules. Nothing passes through a shell.

use std::{
    io,
    process::{ExitStatus, Stdio},
    time::Duration,
};

use tokio::{io::AsyncWriteExt as _, process::Command};

/// Longest time one run may take: another holder of the iptables lock may be slow.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Why a tool did not do its work.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// There is no such program.
    #[error("{program} is not installed")]
    NotInstalled {
        /// Its name.
        program: String,
    },
    /// It could not be started or talked to.
    #[error("cannot run {program}")]
    Run {
        /// Its name.
        program: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// It said no.
    #[error("{command} failed ({status}): {complaint}")]
    Failed {
        /// The whole command line.
        command: String,
        /// How it ended.
        status: ExitStatus,
        /// What it wrote to standard error, on one line.
        complaint: String,
    },
    /// It did not end in time and was killed.
    #[error("{command} did not end within {} s", TIMEOUT.as_secs())]
    TimedOut {
        /// The whole command line.
        command: String,
    },
}

impl CommandError {
    /// The program is missing.
    #[must_use]
    pub fn is_not_installed(&self) -> bool {
        matches!(self, Self::NotInstalled { .. })
    }

    /// The program ran and refused.
    #[must_use]
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Failed { .. })
    }
}

/// Runs `program`, feeds it `input`, and returns what it printed.
///
/// # Errors
/// It is missing, does not end, or ends with a status other than 0.
pub(super) async fn run(program: &str, args: &[&str], input: &str) -> Result<String, CommandError> {
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => CommandError::NotInstalled {
            program: program.to_owned(),
        },
        _ => CommandError::Run {
            program: program.to_owned(),
            source,
        },
    };
    let command_line = || format!("{program} {}", args.join(" "));
    let mut child = Command::new(program)
        .args(args)
        .env("LC_ALL", "C")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(failed)?;
    let stdin = child.stdin.take();
    let feed = async {
        if let Some(mut stdin) = stdin {
            match stdin.write_all(input.as_bytes()).await {
                // It left without reading: its status tells why.
                Err(error) if error.kind() != io::ErrorKind::BrokenPipe => return Err(error),
                _ => {}
            }
        }
        Ok(())
    };
    // Both at once: it may print before it has read everything.
    let work = async { tokio::try_join!(feed, child.wait_with_output()) };
    let ((), output) = tokio::time::timeout(TIMEOUT, work)
        .await
        .map_err(|_| CommandError::TimedOut {
            command: command_line(),
        })?
        .map_err(failed)?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let complaint = String::from_utf8_lossy(&output.stderr);
    let complaint: Vec<&str> = complaint.split_whitespace().collect();
    Err(CommandError::Failed {
        command: command_line(),
        status: output.status,
        complaint: complaint.join(" "),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_missing_program_and_a_refusal_are_told_apart() {
        let missing = run("flannel-has-no-such-tool", &[], "").await;
        assert!(missing.expect_err("missing").is_not_installed());
        let refused = run("ls", &["/no/such/file"], "")
            .await
            .expect_err("refused");
        assert!(refused.is_refusal());
        assert!(refused.to_string().contains("/no/such/file"), "{refused}");
    }

    #[tokio::test]
    async fn input_reaches_the_program_and_nothing_is_interpreted() {
        let text = "a $(false) `false` ; b\n".repeat(10_000);
        assert_eq!(run("cat", &["-"], &text).await.expect("printed"), text);
        let echoed = run("echo", &["$HOME; false"], "").await.expect("printed");
        assert_eq!(echoed, "$HOME; false\n");
        run("true", &[], &text).await.expect("it need not read");
    }
}
