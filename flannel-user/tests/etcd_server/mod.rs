//! Real etcd servers for tests: on free loopback ports, in a temporary directory, dead
//! with the test.

#![allow(dead_code, reason = "each test file uses its part")]

use std::{
    future::Future,
    net::{Ipv4Addr, TcpListener},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use etcd_client::{Client, GetOptions, KeyValue, PutOptions};
use flannel_user::{
    lease::{Lease, LeaseAttributes, SubnetKey},
    network::NetworkConfig,
    source::{
        LeaseEvent, LeaseSource, SourceError,
        etcd::{EtcdOptions, EtcdSource},
    },
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tempfile::TempDir;
use tokio::sync::mpsc;

pub(crate) const CONFIG: &str = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#;
pub(crate) const SUBNETS: &str = "/coreos.com/network/subnets";
/// More than anything here may take, even on a busy machine.
const LIMIT: Duration = Duration::from_secs(30);

/// One or several members of a cluster.
pub(crate) struct Etcd {
    members: Vec<Member>,
    _dir: TempDir,
}

struct Member {
    args: Vec<String>,
    client: String,
    log: PathBuf,
    process: Option<Child>,
}

impl Etcd {
    /// One server.
    pub(crate) async fn start() -> Self {
        Self::with(1, &[]).await
    }

    /// `count` members that run with `more` flags.
    pub(crate) async fn with(count: usize, more: &[&str]) -> Self {
        let etcd = Self::spawn(count, more, "http");
        etcd.until_it_answers().await;
        etcd
    }

    /// As [`Etcd::with`], without waiting: whoever starts it knows how to ask it.
    pub(crate) fn spawn(count: usize, more: &[&str], scheme: &str) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let ports: Vec<(u16, u16)> = free_ports(count);
        let cluster: Vec<String> = (0..count)
            .map(|i| format!("m{i}=http://127.0.0.1:{}", ports[i].1))
            .collect();
        let members = ports.iter().enumerate().map(|(i, (client, peer))| {
            let client = format!("{scheme}://127.0.0.1:{client}");
            let peer = format!("http://127.0.0.1:{peer}");
            let data = dir.path().join(format!("m{i}")).display().to_string();
            let mut args: Vec<String> = [
                "--name",
                &format!("m{i}"),
                "--data-dir",
                &data,
                "--listen-client-urls",
                &client,
                "--advertise-client-urls",
                &client,
                "--listen-peer-urls",
                &peer,
                "--initial-advertise-peer-urls",
                &peer,
                "--initial-cluster",
                &cluster.join(","),
                "--unsafe-no-fsync",
            ]
            .map(str::to_owned)
            .to_vec();
            args.extend(more.iter().map(|text| (*text).to_owned()));
            Member {
                args,
                client,
                log: dir.path().join(format!("m{i}.log")),
                process: None,
            }
        });
        let mut etcd = Self {
            members: members.collect(),
            _dir: dir,
        };
        for member in 0..count {
            etcd.restart(member);
        }
        etcd
    }

    pub(crate) fn url(&self, member: usize) -> &str {
        &self.members[member].client
    }

    pub(crate) fn urls(&self) -> String {
        let urls: Vec<&str> = self.members.iter().map(|m| m.client.as_str()).collect();
        urls.join(",")
    }

    /// A client of the first member that runs, without our code.
    pub(crate) async fn client(&self) -> Client {
        let runs = |member: &&Member| member.process.is_some();
        let member = self.members.iter().find(runs).expect("a member runs");
        Client::connect([&member.client], None)
            .await
            .expect("a client")
    }

    pub(crate) fn kill(&mut self, member: usize) {
        self.members[member].kill();
    }

    pub(crate) fn freeze(&self, member: usize) {
        self.members[member].signal(Signal::SIGSTOP);
    }

    pub(crate) fn thaw(&self, member: usize) {
        self.members[member].signal(Signal::SIGCONT);
    }

    pub(crate) fn restart(&mut self, member: usize) {
        let member = &mut self.members[member];
        member.kill();
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&member.log)
            .expect("a log file");
        let mut command = Command::new("etcd");
        command
            .args(&member.args)
            .env("ETCD_UNSUPPORTED_ARCH", std::env::consts::ARCH)
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a second handle"))
            .stderr(log);
        // SAFETY: prctl is async-signal-safe and nothing else happens before exec.
        unsafe {
            command.pre_exec(|| Ok(nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?));
        }
        member.process = Some(command.spawn().expect(
            "etcd cannot be started: these tests need a real one, run `apt-get install etcd-server`",
        ));
    }

    /// Until every member that runs serves a linearizable read.
    pub(crate) async fn until_it_answers(&self) {
        for member in self
            .members
            .iter()
            .filter(|member| member.process.is_some())
        {
            member.until_it_answers().await;
        }
    }

    pub(crate) async fn put(&self, key: &str, value: &str) {
        self.client()
            .await
            .put(key, value, None)
            .await
            .expect("put");
    }

    /// Puts a lease as flannel would, with an etcd lease of `ttl` seconds.
    pub(crate) async fn put_lease(&self, name: &str, value: &str, ttl: i64) {
        let mut client = self.client().await;
        let lease = client.lease_grant(ttl, None).await.expect("a grant").id();
        let options = PutOptions::new().with_lease(lease);
        let key = format!("{SUBNETS}/{name}");
        client.put(key, value, Some(options)).await.expect("put");
    }

    pub(crate) async fn delete(&self, key: &str) {
        self.client().await.delete(key, None).await.expect("delete");
    }

    /// Raw content of the registry.
    pub(crate) async fn leases(&self) -> Vec<KeyValue> {
        let options = GetOptions::new().with_prefix();
        let mut answer = self
            .client()
            .await
            .get(SUBNETS, Some(options))
            .await
            .expect("a range");
        answer.take_kvs()
    }

    pub(crate) fn source(&self) -> EtcdSource {
        EtcdSource::new(&options(&self.urls())).expect("a source")
    }
}

impl Member {
    fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            let _ = process.kill();
            let _ = process.wait();
        }
    }

    fn signal(&self, signal: Signal) {
        let process = self.process.as_ref().expect("it runs");
        let pid = i32::try_from(process.id()).expect("a pid");
        kill(Pid::from_raw(pid), signal).expect("a signal");
    }

    async fn until_it_answers(&self) {
        let end = Instant::now() + LIMIT;
        loop {
            let ask = async {
                let mut client = Client::connect([&self.client], None).await?;
                client.get("x", None).await
            };
            match tokio::time::timeout(Duration::from_secs(1), ask).await {
                Ok(Ok(_)) => return,
                _ if Instant::now() > end => {
                    let log = std::fs::read_to_string(&self.log).unwrap_or_default();
                    panic!("etcd does not come up, its log: {log}");
                }
                _ => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        for member in &mut self.members {
            member.kill();
        }
    }
}

/// Ports that were free a moment ago, all different.
fn free_ports(pairs: usize) -> Vec<(u16, u16)> {
    let listen = || TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
    let held: Vec<(TcpListener, TcpListener)> = (0..pairs).map(|_| (listen(), listen())).collect();
    let port = |listener: &TcpListener| listener.local_addr().expect("an address").port();
    held.iter()
        .map(|(client, peer)| (port(client), port(peer)))
        .collect()
}

pub(crate) fn options(endpoints: &str) -> EtcdOptions {
    EtcdOptions {
        endpoints: endpoints.parse().expect("any text"),
        prefix: "/coreos.com/network".to_owned(),
        key_file: None,
        cert_file: None,
        ca_file: None,
        username: None,
        password: None,
        lease_ttl: Duration::from_secs(86_400),
    }
}

pub(crate) fn network() -> NetworkConfig {
    CONFIG.parse().expect("a config")
}

pub(crate) fn node(number: u8) -> LeaseAttributes {
    let text = format!(
        r#"{{"PublicIP":"192.0.2.{number}","PublicIPv6":null,"BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"02:00:00:00:00:{number:02x}"}}}}"#
    );
    LeaseAttributes::from_json(&text).expect("attributes")
}

pub(crate) fn key(text: &str) -> SubnetKey {
    text.parse().expect("a key")
}

pub(crate) async fn acquire(
    source: &EtcdSource,
    attributes: &LeaseAttributes,
) -> Result<Lease, SourceError> {
    source.acquire(&network(), attributes, None).await
}

/// The events of a watch, each awaited with patience.
pub(crate) struct Events(pub(crate) mpsc::Receiver<LeaseEvent>);

impl Events {
    pub(crate) async fn of(source: &EtcdSource) -> Self {
        Self(source.watch().await.expect("a watch"))
    }

    pub(crate) async fn next(&mut self) -> LeaseEvent {
        within(LIMIT, self.0.recv())
            .await
            .expect("the watch goes on")
    }

    /// Subnet and node of every lease of a snapshot.
    pub(crate) async fn snapshot(&mut self) -> Vec<(String, u8)> {
        match self.next().await {
            LeaseEvent::Snapshot(leases) => leases.iter().map(subnet_and_node).collect(),
            other => panic!("expected a snapshot, not {other:?}"),
        }
    }

    pub(crate) async fn put(&mut self) -> (String, u8) {
        match self.next().await {
            LeaseEvent::Put(lease) => subnet_and_node(&lease),
            other => panic!("expected a put, not {other:?}"),
        }
    }

    pub(crate) async fn removed(&mut self) -> String {
        match self.next().await {
            LeaseEvent::Removed(key) => key.to_string(),
            other => panic!("expected a removal, not {other:?}"),
        }
    }

    pub(crate) async fn expect_silence(&mut self, time: Duration) {
        if let Ok(event) = tokio::time::timeout(time, self.0.recv()).await {
            panic!("unexpected: {event:?}");
        }
    }
}

pub(crate) fn subnet_and_node(lease: &Lease) -> (String, u8) {
    (
        lease.key.to_string(),
        lease.attributes.public_ip.octets()[3],
    )
}

pub(crate) async fn within<T>(limit: Duration, work: impl Future<Output = T>) -> T {
    tokio::time::timeout(limit, work)
        .await
        .unwrap_or_else(|_| panic!("not done within {limit:?}"))
}

/// Tries until it is true.
pub(crate) async fn until<F: Future<Output = bool>>(what: &str, mut is_so: impl FnMut() -> F) {
    let end = Instant::now() + LIMIT;
    while !is_so().await {
        assert!(Instant::now() < end, "never {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A server that takes connections and never says a word.
pub(crate) fn silent_server() -> (TcpListener, String) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
    let url = format!("http://{}", listener.local_addr().expect("an address"));
    (listener, url)
}

pub(crate) fn write(dir: &Path, name: &str, content: &str) -> PathBuf {
    let path = dir.join(name);
    std::fs::write(&path, content).expect("written");
    path
}
