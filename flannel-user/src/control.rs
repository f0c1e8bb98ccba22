//! The control socket: what `flannelctl` asks of a running agent.
//!
//! A Unix stream socket that only root can open (mode 0600, and the peer's
//! credentials are checked besides). One JSON object a line each way:
//! `{"do":"status"}`, `{"do":"mode","datapath":"netlink"}` or
//! `{"do":"flows","port":80}`; the answer is `{"ok":…}` or `{"error":"…"}`.

use std::{
    fs, io,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader},
    net::{UnixListener, UnixStream},
    sync::{mpsc, oneshot},
};
use tracing::{debug, warn};

use crate::observe::{
    flows::{Filter, Flows},
    status::Status,
};

/// What can be asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "lowercase")]
pub enum Request {
    /// The whole state.
    Status,
    /// Switch the datapath: `auto`, `ebpf` or `netlink`.
    Mode {
        /// The wanted one.
        datapath: String,
    },
    /// The learned flows that the filter takes.
    Flows(Filter),
}

/// What the agent answers.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Answer {
    /// Done.
    Ok(Document),
    /// Not done, and why.
    Error(String),
}

/// What an answer holds: the request tells which of them.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Document {
    /// The whole state, after `mode` the one that it led to.
    Status(Box<Status>),
    /// Of `flows`.
    Flows(Box<Flows>),
}

impl From<Status> for Answer {
    fn from(status: Status) -> Self {
        Self::Ok(Document::Status(Box::new(status)))
    }
}

impl From<Flows> for Answer {
    fn from(flows: Flows) -> Self {
        Self::Ok(Document::Flows(Box::new(flows)))
    }
}

/// An answer as the one who asked reads it.
#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Reply<T> {
    Ok(T),
    Error(String),
}

/// A request on its way to the reconcile loop, with where the answer goes.
pub type Call = (Request, oneshot::Sender<Answer>);

/// Longest request line; anything longer is no request of ours.
const LONGEST_REQUEST: u64 = 64 * 1024;
/// How long a silent client may hold its connection.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long an agent that was killed may seem to listen: a tool that it was just starting
/// holds the socket until it runs.
const LAST_BREATH: Duration = Duration::from_millis(500);

/// Opens the socket and serves it in the background until the agent ends.
///
/// # Errors
/// The socket cannot be made, or another agent is listening on it.
pub fn serve(path: &Path, calls: mpsc::Sender<Call>) -> anyhow::Result<()> {
    let listener = listen(path)?;
    tokio::spawn(async move {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    let calls = calls.clone();
                    tokio::spawn(async move {
                        if let Err(error) = converse(stream, calls).await {
                            debug!(%error, "control connection ended");
                        }
                    });
                }
                Err(error) => {
                    // Out of descriptors, for instance: the listener itself is fine.
                    warn!(%error, "cannot accept a control connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    });
    Ok(())
}

fn listen(path: &Path) -> anyhow::Result<UnixListener> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory).with_context(|| format!("create {}", directory.display()))?;
    }
    let asked = Instant::now();
    let mut answer = std::os::unix::net::UnixStream::connect(path);
    while answer.is_ok() && asked.elapsed() < LAST_BREATH {
        std::thread::sleep(Duration::from_millis(10));
        answer = std::os::unix::net::UnixStream::connect(path);
    }
    match answer {
        Ok(_) => bail!(
            "another agent listens on {}: stop it, or give this one another --control-socket",
            path.display()
        ),
        // Left by an agent that was killed.
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).with_context(|| format!("remove {}", path.display()))?;
        }
        Err(_) => {}
    }
    let listener = UnixListener::bind(path)
        .with_context(|| format!("listen on control socket {}", path.display()))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))
        .with_context(|| format!("restrict {}", path.display()))?;
    Ok(listener)
}

async fn converse(stream: UnixStream, calls: mpsc::Sender<Call>) -> anyhow::Result<()> {
    let peer = stream.peer_cred()?;
    if peer.uid() != 0 && peer.uid() != nix::unistd::geteuid().as_raw() {
        bail!("user {} may not use the control socket", peer.uid());
    }
    let (reader, mut writer) = stream.into_split();
    let mut lines = BufReader::new(tokio::io::AsyncReadExt::take(reader, LONGEST_REQUEST)).lines();
    while let Some(line) = tokio::time::timeout(PATIENCE, lines.next_line()).await?? {
        let answer = match serde_json::from_str(&line) {
            Ok(request) => ask_the_loop(request, &calls).await,
            Err(error) => Answer::Error(format!("not a request: {error}")),
        };
        let mut bytes = serde_json::to_vec(&answer)?;
        bytes.push(b'\n');
        writer.write_all(&bytes).await?;
    }
    Ok(())
}

async fn ask_the_loop(request: Request, calls: &mpsc::Sender<Call>) -> Answer {
    let (sender, receiver) = oneshot::channel();
    let gone = || Answer::Error("the agent is shutting down".to_owned());
    if calls.send((request, sender)).await.is_err() {
        return gone();
    }
    receiver.await.unwrap_or_else(|_| gone())
}

/// Asks a running agent, from `flannelctl`: `T` is the document that the request is answered with.
///
/// # Errors
/// No agent listens there, it refused, or it did not answer in time.
pub async fn ask<T: DeserializeOwned>(
    socket: &Path,
    request: &Request,
    patience: Duration,
) -> anyhow::Result<T> {
    let path: PathBuf = socket.to_owned();
    let exchange = async {
        let stream = UnixStream::connect(&path).await.with_context(|| {
            format!(
                "no agent answers on {}: is flanneld running, and are you root?",
                path.display()
            )
        })?;
        let (reader, mut writer) = stream.into_split();
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        writer.write_all(&line).await?;
        let mut answer = String::new();
        BufReader::new(reader).read_line(&mut answer).await?;
        if answer.is_empty() {
            bail!("the agent closed the connection without an answer (only root may ask)");
        }
        match serde_json::from_str(&answer).context("the agent's answer is not of this version")? {
            Reply::Ok(document) => Ok(document),
            Reply::Error(reason) => bail!("{reason}"),
        }
    };
    tokio::time::timeout(patience, exchange)
        .await
        .with_context(|| {
            format!(
                "the agent behind {} did not answer in {patience:?}",
                path.display()
            )
        })?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_one_flat_object() {
        let flows = |text: &str| serde_json::from_str::<Request>(text);
        let filter = Filter {
            pod: Some([10, 1, 1, 2].into()),
            port: Some(80),
            ..Filter::default()
        };
        assert_eq!(
            flows(r#"{"do":"flows","pod":"10.1.1.2","port":80}"#).expect("flows"),
            Request::Flows(filter)
        );
        assert_eq!(
            flows(r#"{"do":"flows"}"#).expect("no filter"),
            Request::Flows(Filter::default())
        );
        let misspelt =
            flows(r#"{"do":"flows","prot":80}"#).expect_err("a filter that would not filter");
        assert!(misspelt.to_string().contains("prot"), "{misspelt}");
        let text = serde_json::to_string(&Request::Flows(filter)).expect("JSON");
        assert_eq!(flows(&text).expect("the same"), Request::Flows(filter));
        assert_eq!(
            flows(r#"{"do":"mode","datapath":"auto"}"#).expect("mode"),
            Request::Mode {
                datapath: "auto".to_owned()
            }
        );
    }

    #[test]
    fn an_answer_holds_its_document_bare() {
        let flows = Flows {
            table_out: Default::default(),
            table_in: Default::default(),
            held: None,
            tcp_held: Some("sysctl".to_owned()),
            matching: 0,
            flows: Vec::new(),
            classes: Vec::new(),
            classes_off: None,
        };
        let text = serde_json::to_string(&Answer::from(flows.clone())).expect("JSON");
        assert!(text.starts_with(r#"{"ok":{"table_out":"#), "{text}");
        let Reply::Ok(read) = serde_json::from_str::<Reply<Flows>>(&text).expect("a reply") else {
            panic!("{text}");
        };
        assert_eq!(read, flows);
        let text = serde_json::to_string(&Answer::Error("no".to_owned())).expect("JSON");
        assert_eq!(text, r#"{"error":"no"}"#);
    }
}
