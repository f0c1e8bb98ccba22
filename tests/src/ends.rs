//! A tool's server in one namespace and its client in another.

use std::net::SocketAddrV4;

use anyhow::Result;
use serde::de::DeserializeOwned;

use crate::{namespace::Namespace, task::Task};

/// Both at work.
#[derive(Debug)]
pub struct Ends {
    /// The end that begins.
    pub client: Task,
    /// The end that was there before.
    pub server: Task,
}

impl Ends {
    /// Starts `lab <serve> --port …` in `to` and `lab <ask> --to …` in `from`. The client addresses
    /// `target`, behind which the server is reached at the same port.
    ///
    /// # Errors
    /// When a tool does not start.
    pub fn start(
        from: &Namespace,
        (to, target): (&Namespace, SocketAddrV4),
        serve: &str,
        ask: &str,
    ) -> Result<Self> {
        let server = Task::start(to, &format!("{serve} --port {}", target.port()))?;
        let client = Task::start(from, &format!("{ask} --to {target}"))?;
        Ok(Self { client, server })
    }

    /// Waits for the client's own end, then has the server finish: what both say.
    ///
    /// # Errors
    /// When a tool failed.
    pub fn result<C: DeserializeOwned, S: DeserializeOwned>(self) -> Result<(C, S)> {
        Ok((self.client.result()?, self.server.finish()?))
    }

    /// Has the client finish, then the server: what both say.
    ///
    /// # Errors
    /// When a tool failed.
    pub fn finish<C: DeserializeOwned, S: DeserializeOwned>(self) -> Result<(C, S)> {
        Ok((self.client.finish()?, self.server.finish()?))
    }
}
