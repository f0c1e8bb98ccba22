//! Log lines of the programs, from objects built with `cargo xtask build-ebpf --trace`.
//!
//! Ordinary objects have no such code and no such map: then nothing runs here.

use aya_log::EbpfLogger;
use tokio::{
    io::{Interest, unix::AsyncFd},
    task::JoinHandle,
};
use tracing::warn;

use super::object::Programs;

/// The map that aya-log's kernel side makes.
const LOG_MAP: &str = "AYA_LOGS";

/// Passes log lines on until it is dropped.
pub(super) struct Trace(JoinHandle<()>);

impl Drop for Trace {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Starts passing lines on to the agent's log where the object makes any.
pub(super) fn follow(programs: &mut Programs) -> Option<Trace> {
    let ebpf = programs.ebpf_mut();
    ebpf.map(LOG_MAP)?;
    let logger = EbpfLogger::init(ebpf)
        .map_err(anyhow::Error::from)
        .and_then(|logger| {
            // SAFETY: the logger owns its descriptor and keeps it until it is dropped together
            // with its registration.
            Ok(unsafe { AsyncFd::register_with_interest(logger, Interest::READABLE) }?)
        });
    let mut logger = match logger {
        Ok(logger) => logger,
        Err(error) => {
            warn!(
                error = format!("{error:#}"),
                "the programs' log lines cannot be read"
            );
            return None;
        }
    };
    warn!("this object logs every packet that is left to the kernel: slow, for debugging");
    Some(Trace(tokio::spawn(async move {
        while let Ok(mut ready) = logger.readable_mut().await {
            ready.get_inner_mut().flush();
            ready.clear_ready();
        }
    })))
}
