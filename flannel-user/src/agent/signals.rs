//! SIGINT and SIGTERM: the first asks the agent to end, the second ends it (contract section 17).

use anyhow::Context as _;
use nix::sys::signal::{SigHandler, Signal, signal as dispose};
use tokio::signal::unix::{Signal as Stream, SignalKind, signal};
use tracing::warn;

/// Both, listened to.
pub(super) struct Signals {
    interrupt: Stream,
    terminate: Stream,
}

impl Signals {
    /// From now on neither ends the process by itself.
    pub(super) fn listen() -> anyhow::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt()).context("handle SIGINT")?,
            terminate: signal(SignalKind::terminate()).context("handle SIGTERM")?,
        })
    }

    /// Waits for the first of them and names it. The next one has its default effect again.
    pub(super) async fn first(&mut self) -> &'static str {
        let name = tokio::select! {
            _ = self.interrupt.recv() => "SIGINT",
            _ = self.terminate.recv() => "SIGTERM",
        };
        for signal in [Signal::SIGINT, Signal::SIGTERM] {
            // SAFETY: the default disposition runs no code of ours.
            if let Err(error) = unsafe { dispose(signal, SigHandler::SigDfl) } {
                warn!(%signal, %error, "a second signal will not hurry the end");
            }
        }
        name
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::signal::raise;

    use super::*;

    /// Signals with a handler, as the kernel lists them.
    fn caught() -> u64 {
        let status = std::fs::read_to_string("/proc/self/status").expect("proc");
        let mask = status.lines().find_map(|line| line.strip_prefix("SigCgt:"));
        u64::from_str_radix(mask.expect("a mask").trim(), 16).expect("a number")
    }

    #[tokio::test]
    async fn s17_row11_the_second_signal_has_its_default_effect() {
        let both = 1 << (Signal::SIGINT as u64 - 1) | 1 << (Signal::SIGTERM as u64 - 1);
        let mut signals = Signals::listen().expect("handlers");
        assert_eq!(caught() & both, both);
        raise(Signal::SIGTERM).expect("raised");
        assert_eq!(signals.first().await, "SIGTERM");
        assert_eq!(caught() & both, 0);
    }
}
