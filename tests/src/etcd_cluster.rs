//! A real etcd on the underlay, with members that can be killed and a way in that can be slow.
//!
//! It runs in the namespace of the lab's switch, where every node reaches it by the uplink as
//! it would reach another machine.

use std::{
    fs::{self, OpenOptions},
    future::Future,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail};
use etcd_client::{
    Certificate, Client, CompactionOptions, ConnectOptions, Identity, Permission, PermissionType,
    PutOptions, TlsOptions,
};

use crate::{agent::AgentOptions, door::Door, lab::Lab, namespace::Namespace, spawner, wait};

/// Its address on the underlay; no node has it.
const ADDRESS: Ipv4Addr = Ipv4Addr::new(172, 18, 0, 250);
/// What flannel keeps its leases under.
pub const SUBNETS: &str = "/coreos.com/network/subnets";
/// The longest wait for one answer.
const PATIENCE: Duration = Duration::from_secs(2);
/// Every member has a pair of ports from here on.
const FIRST_PORT: u16 = 2379;

/// How clients are told apart from strangers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Security {
    /// Not at all.
    Open,
    /// By certificates, which lie in this directory (see [`Certificates`]).
    Certificates(PathBuf),
    /// By user and password; a token lasts so many seconds.
    Users {
        /// Life of a token that nobody uses.
        token_seconds: u32,
    },
}

/// A cluster of members.
#[derive(Debug)]
pub struct Etcd<'lab> {
    fabric: &'lab Namespace,
    security: Security,
    /// Until there are users, everybody may do everything.
    knows_users: bool,
    members: Vec<Member>,
}

#[derive(Debug)]
struct Member {
    arguments: Vec<String>,
    log: PathBuf,
    port: u16,
    process: Option<Child>,
}

impl<'lab> Etcd<'lab> {
    /// Starts `count` members over a lab with a switch, and writes the network config.
    ///
    /// # Errors
    /// When etcd is not installed or does not come up.
    pub fn start(lab: &'lab Lab, count: usize, security: Security, config: &str) -> Result<Self> {
        let fabric = lab.fabric().context("etcd runs at the lab's switch")?;
        fabric.ip(&format!("addr add {ADDRESS}/24 dev br0"))?;
        let ports: Vec<u16> = (0..count)
            .map(|index| Ok(FIRST_PORT + 10 * u16::try_from(index)?))
            .collect::<Result<_>>()?;
        let cluster: Vec<String> = ports
            .iter()
            .map(|port| format!("m{port}=http://{ADDRESS}:{}", port + 1))
            .collect();
        let members = ports.iter().map(|port| Member {
            arguments: arguments(*port, &cluster.join(","), lab.scratch(), &security),
            log: lab.scratch().join("logs").join(format!("etcd-{port}.log")),
            port: *port,
            process: None,
        });
        let mut etcd = Self {
            fabric,
            members: members.collect(),
            security,
            knows_users: false,
        };
        for member in 0..count {
            etcd.restart(member)?;
        }
        etcd.until_it_answers()?;
        etcd.put("/coreos.com/network/config", config)?;
        if matches!(etcd.security, Security::Users { .. }) {
            etcd.enable_users()?;
        }
        Ok(etcd)
    }

    /// The endpoint of a member.
    #[must_use]
    pub fn url(&self, member: usize) -> String {
        let scheme = match self.security {
            Security::Certificates(_) => "https",
            _ => "http",
        };
        format!("{scheme}://{ADDRESS}:{}", self.members[member].port)
    }

    /// Every endpoint, with commas between them.
    #[must_use]
    pub fn urls(&self) -> String {
        let urls: Vec<String> = (0..self.members.len()).map(|i| self.url(i)).collect();
        urls.join(",")
    }

    /// How an agent is started that takes its leases from here.
    #[must_use]
    pub fn agent(&self, options: AgentOptions) -> AgentOptions {
        let mut arguments = vec![format!("--etcd-endpoints={}", self.urls())];
        match &self.security {
            Security::Open => {}
            Security::Certificates(directory) => {
                for (flag, file) in [
                    ("keyfile", "client.key"),
                    ("certfile", "client.pem"),
                    ("cafile", "ca.pem"),
                ] {
                    let path = directory.join(file);
                    arguments.push(format!("--etcd-{flag}={}", path.display()));
                }
            }
            Security::Users { .. } => {
                arguments.push("--etcd-username=flannel".to_owned());
                arguments.push("--etcd-password=hunter2".to_owned());
            }
        }
        options.registry(arguments)
    }

    /// `kill -9`.
    pub fn kill(&mut self, member: usize) {
        self.members[member].kill();
    }

    /// Starts a member, for the first time or again.
    ///
    /// # Errors
    /// When etcd is not installed.
    pub fn restart(&mut self, member: usize) -> Result<()> {
        let member = &mut self.members[member];
        member.kill();
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&member.log)?;
        let mut command = self.fabric.command("etcd");
        command
            .args(&member.arguments)
            .env("ETCD_UNSUPPORTED_ARCH", std::env::consts::ARCH)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let process = spawner::spawn(command)
            .context("cannot start etcd: `apt-get install etcd-server` brings it")?;
        member.process = Some(process);
        Ok(())
    }

    /// Waits until each member that runs takes part.
    ///
    /// # Errors
    /// When one does not in time.
    pub fn until_it_answers(&self) -> Result<()> {
        for member in (0..self.members.len()).filter(|i| self.members[*i].process.is_some()) {
            let what = format!("etcd answers at {}", self.url(member));
            wait::until_true(&what, Duration::from_secs(30), || {
                let url = self.url(member);
                let read = self.run(vec![url], PATIENCE, |mut client| async move {
                    client.get("probe", None).await.map(drop)
                });
                Ok(read.is_ok())
            })?;
        }
        Ok(())
    }

    /// Writes a key.
    ///
    /// # Errors
    /// When no member takes it.
    pub fn put(&self, key: &str, value: &str) -> Result<()> {
        self.ask(|mut client| async move { client.put(key, value, None).await.map(drop) })
    }

    /// Writes a lease as flannel would; it lasts `seconds`.
    ///
    /// # Errors
    /// As [`Self::put`].
    pub fn put_lease(&self, name: &str, value: &str, seconds: i64) -> Result<()> {
        self.ask(|mut client| async move {
            let lease = client.lease_grant(seconds, None).await?.id();
            let options = PutOptions::new().with_lease(lease);
            let key = format!("{SUBNETS}/{name}");
            client.put(key, value, Some(options)).await.map(drop)
        })
    }

    /// Removes a lease.
    ///
    /// # Errors
    /// As [`Self::put`].
    pub fn delete_lease(&self, name: &str) -> Result<()> {
        let key = format!("{SUBNETS}/{name}");
        self.ask(|mut client| async move { client.delete(key, None).await.map(drop) })
    }

    /// Forgets all history.
    ///
    /// # Errors
    /// As [`Self::put`].
    pub fn compact(&self) -> Result<()> {
        self.ask(|mut client| async move {
            let now = client.get("probe", None).await?;
            let revision = now.header().map_or(0, |header| header.revision());
            let options = CompactionOptions::new().with_physical();
            client.compact(revision, Some(options)).await.map(drop)
        })
    }

    /// Calls etcd over whichever member runs.
    ///
    /// # Errors
    /// When it does not answer within two seconds, or refuses.
    pub fn ask<T: Send, F>(&self, job: impl FnOnce(Client) -> F + Send) -> Result<T>
    where
        F: Future<Output = Result<T, etcd_client::Error>>,
    {
        self.ask_within(PATIENCE, job)
    }

    /// The same for what takes longer.
    ///
    /// # Errors
    /// When it is not done in time, or etcd refuses.
    pub fn ask_within<T: Send, F>(
        &self,
        limit: Duration,
        job: impl FnOnce(Client) -> F + Send,
    ) -> Result<T>
    where
        F: Future<Output = Result<T, etcd_client::Error>>,
    {
        let running = (0..self.members.len()).filter(|i| self.members[*i].process.is_some());
        self.run(running.map(|i| self.url(i)).collect(), limit, job)
    }

    fn run<T: Send, F>(
        &self,
        urls: Vec<String>,
        limit: Duration,
        job: impl FnOnce(Client) -> F + Send,
    ) -> Result<T>
    where
        F: Future<Output = Result<T, etcd_client::Error>>,
    {
        let options = self.connect_options()?;
        self.fabric.within(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?;
            let asked = async {
                let client = Client::connect(urls, options).await?;
                job(client).await
            };
            let limit = wait::patiently(limit);
            match runtime.block_on(async { tokio::time::timeout(limit, asked).await }) {
                Ok(answer) => Ok(answer?),
                Err(_) => Err(anyhow!("etcd did not answer within {limit:?}")),
            }
        })?
    }

    fn connect_options(&self) -> Result<Option<ConnectOptions>> {
        Ok(match &self.security {
            Security::Users { .. } if self.knows_users => {
                Some(ConnectOptions::new().with_user("root", "secret"))
            }
            Security::Open | Security::Users { .. } => None,
            Security::Certificates(directory) => {
                let read = |name: &str| fs::read(directory.join(name));
                let identity = Identity::from_pem(read("lab.pem")?, read("lab.key")?);
                let tls = TlsOptions::new()
                    .ca_certificate(Certificate::from_pem(read("ca.pem")?))
                    .identity(identity);
                Some(ConnectOptions::new().with_tls(tls))
            }
        })
    }

    fn enable_users(&mut self) -> Result<()> {
        self.ask(|mut client| async move {
            client.role_add("root").await?;
            client.role_add("flannel").await?;
            let all = Permission::new(PermissionType::Readwrite, "/coreos.com/network/");
            client
                .role_grant_permission("flannel", all.with_prefix())
                .await?;
            for (user, password) in [("root", "secret"), ("flannel", "hunter2")] {
                client.user_add(user, password, None).await?;
                client.user_grant_role(user, user).await?;
            }
            client.auth_enable().await.map(drop)
        })?;
        self.knows_users = true;
        Ok(())
    }

    /// A way to a member that can be shut and slowed down, at a port of its own.
    ///
    /// # Errors
    /// When no port can be had.
    pub fn door(&self, member: usize) -> Result<Door> {
        let to = (ADDRESS, self.members[member].port).into();
        Door::open(self.fabric, ADDRESS, to)
    }
}

impl Member {
    fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.kill();
    }
}

fn arguments(port: u16, cluster: &str, scratch: &Path, security: &Security) -> Vec<String> {
    let scheme = match security {
        Security::Certificates(_) => "https",
        _ => "http",
    };
    let client = format!("{scheme}://{ADDRESS}:{port}");
    let peer = format!("http://{ADDRESS}:{}", port + 1);
    let data = scratch.join(format!("etcd-{port}"));
    let mut arguments: Vec<String> = [
        "--name",
        &format!("m{port}"),
        "--data-dir",
        &data.display().to_string(),
        "--listen-client-urls",
        &client,
        "--advertise-client-urls",
        &client,
        "--listen-peer-urls",
        &peer,
        "--initial-advertise-peer-urls",
        &peer,
        "--initial-cluster",
        cluster,
        "--unsafe-no-fsync",
        "--log-level=error",
    ]
    .map(str::to_owned)
    .to_vec();
    match security {
        Security::Open => {}
        Security::Certificates(directory) => {
            arguments.push("--client-cert-auth".to_owned());
            for (flag, file) in [
                ("--trusted-ca-file", "ca.pem"),
                ("--cert-file", "server.pem"),
                ("--key-file", "server.key"),
            ] {
                arguments.push(flag.to_owned());
                arguments.push(directory.join(file).display().to_string());
            }
        }
        Security::Users { token_seconds } => {
            arguments.push("--auth-token-ttl".to_owned());
            arguments.push(token_seconds.to_string());
        }
    }
    arguments
}

/// An authority with certificates for the server, for agents (`client`) and for the lab itself.
#[derive(Debug)]
pub struct Certificates(PathBuf);

impl Certificates {
    /// Makes them below the lab's scratch directory.
    ///
    /// # Errors
    /// When openssl is missing or refuses.
    pub fn new(lab: &Lab) -> Result<Self> {
        let directory = lab.scratch().join("tls");
        fs::create_dir(&directory)?;
        let all = Self(directory);
        all.openssl(
            "req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.pem -days 2 -subj /CN=ca",
        )?;
        all.issue("server", &format!("subjectAltName=IP:{ADDRESS}"), 2)?;
        all.issue("lab", "extendedKeyUsage=clientAuth", 2)?;
        all.issue("client", "extendedKeyUsage=clientAuth", 2)?;
        Ok(all)
    }

    /// Where they are.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.0
    }

    /// Gives agents a certificate for so many days, in place of the one before; a negative
    /// number is one that has run out.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn renew_client(&self, days: i32) -> Result<()> {
        self.issue("client", "extendedKeyUsage=clientAuth", days)
    }

    fn issue(&self, name: &str, extension: &str, days: i32) -> Result<()> {
        fs::write(self.0.join("ext"), extension)?;
        self.openssl(&format!(
            "req -newkey rsa:2048 -nodes -keyout new.key -out {name}.csr -subj /CN={name}"
        ))?;
        self.openssl(&format!("x509 -req -in {name}.csr -CA ca.pem -CAkey ca.key -CAcreateserial -out new.pem -days {days} -extfile ext"))?;
        fs::rename(self.0.join("new.key"), self.0.join(format!("{name}.key")))?;
        fs::rename(self.0.join("new.pem"), self.0.join(format!("{name}.pem")))?;
        Ok(())
    }

    fn openssl(&self, arguments: &str) -> Result<()> {
        let output = Command::new("openssl")
            .args(arguments.split(' '))
            .current_dir(&self.0)
            .output()
            .context("cannot run openssl")?;
        if !output.status.success() {
            bail!(
                "openssl {arguments}: {}",
                String::from_utf8_lossy(&output.stderr)
            );
        }
        Ok(())
    }
}
