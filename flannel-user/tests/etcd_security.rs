//! The etcd lease source with TLS, client certificates, users and tokens.

mod etcd_server;

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use etcd_client::{Client, ConnectOptions, PermissionType, TlsOptions};
use etcd_server::{CONFIG, Etcd, Events, acquire, node, options, until, write};
use flannel_user::source::{
    LeaseSource,
    etcd::{EtcdOptions, EtcdSource},
};
use tempfile::TempDir;

const CONFIG_KEY: &str = "/coreos.com/network/config";

/// A certificate authority, a server's and a client's certificate.
struct Certificates(TempDir);

impl Certificates {
    fn new() -> Self {
        let certificates = Self(tempfile::tempdir().expect("a directory"));
        certificates.openssl(
            "req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.pem -days 2 -subj /CN=ca",
        );
        certificates.issue("server", "subjectAltName=IP:127.0.0.1,DNS:localhost", "2");
        certificates.issue("client", "extendedKeyUsage=clientAuth", "2");
        certificates
    }

    fn issue(&self, name: &str, extension: &str, days: &str) {
        write(self.0.path(), "ext", extension);
        self.openssl(&format!(
            "req -newkey rsa:2048 -nodes -keyout {name}.key -out {name}.csr -subj /CN={name}"
        ));
        self.openssl(&format!("x509 -req -in {name}.csr -CA ca.pem -CAkey ca.key -CAcreateserial -out {name}.pem -days {days} -extfile ext"));
    }

    fn openssl(&self, args: &str) {
        let output = Command::new("openssl")
            .args(args.split(' '))
            .current_dir(self.0.path())
            .output()
            .expect("openssl cannot be run: `apt-get install openssl`");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "openssl {args}: {stderr}");
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// An etcd that wants a client certificate.
    fn etcd(&self) -> Etcd {
        let [ca, cert, key] = ["ca.pem", "server.pem", "server.key"]
            .map(|name| self.path(name).display().to_string());
        Etcd::spawn(
            1,
            &[
                "--client-cert-auth",
                "--trusted-ca-file",
                &ca,
                "--cert-file",
                &cert,
                "--key-file",
                &key,
            ],
            "https",
        )
    }

    fn options(&self, endpoints: &str) -> EtcdOptions {
        EtcdOptions {
            key_file: Some(self.path("client.key")),
            cert_file: Some(self.path("client.pem")),
            ca_file: Some(self.path("ca.pem")),
            ..options(endpoints)
        }
    }

    async fn put_config(&self, url: &str) {
        let read = |name: &str| std::fs::read(self.path(name)).expect("a file");
        let tls = TlsOptions::new()
            .ca_certificate(etcd_client::Certificate::from_pem(read("ca.pem")))
            .identity(etcd_client::Identity::from_pem(
                read("client.pem"),
                read("client.key"),
            ));
        until("the server is up", || async {
            let options = ConnectOptions::new().with_tls(tls.clone());
            let mut client = Client::connect([url], Some(options))
                .await
                .expect("a client");
            client.put(CONFIG_KEY, CONFIG, None).await.is_ok()
        })
        .await;
    }
}

async fn error_of(options: &EtcdOptions) -> String {
    let source = EtcdSource::new(options).expect("a source");
    source
        .network_config()
        .await
        .expect_err("refused")
        .to_string()
}

#[tokio::test]
async fn row_2_etcd_keyfile_certfile_and_cafile() {
    let certificates = Certificates::new();
    let etcd = certificates.etcd();
    certificates.put_config(etcd.url(0)).await;
    let source = EtcdSource::new(&certificates.options(etcd.url(0))).expect("a source");
    source.network_config().await.expect("the config");
    let mut events = Events::of(&source).await;
    events.snapshot().await;
    acquire(&source, &node(1)).await.expect("a lease");
    assert_eq!(events.put().await.1, 1);

    // Without scheme it is https, once key and certificate are given.
    let bare = etcd.url(0).trim_start_matches("https://");
    let source = EtcdSource::new(&certificates.options(bare)).expect("a source");
    source.network_config().await.expect("the config");

    // An unknown authority, and no certificate, are refused with a cause.
    let unknown = EtcdOptions {
        ca_file: None,
        ..certificates.options(etcd.url(0))
    };
    let says = error_of(&unknown).await;
    assert!(says.to_lowercase().contains("certificate"), "{says}");
    let says = error_of(&options(etcd.url(0))).await;
    assert!(says.contains(etcd.url(0)), "{says}");
}

#[tokio::test]
async fn an_expired_client_certificate_is_named_and_a_new_one_used_without_restart() {
    let certificates = Certificates::new();
    let etcd = certificates.etcd();
    certificates.put_config(etcd.url(0)).await;
    let good = std::fs::read(certificates.path("client.pem")).expect("a file");
    let good_key = std::fs::read(certificates.path("client.key")).expect("a file");
    certificates.issue("client", "extendedKeyUsage=clientAuth", "-1");
    let source = EtcdSource::new(&certificates.options(etcd.url(0))).expect("a source");
    let says = source
        .network_config()
        .await
        .expect_err("expired")
        .to_string();
    assert!(says.contains(etcd.url(0)), "{says}");
    let file = certificates.path("client.pem").display().to_string();
    assert!(says.contains(&file) && says.contains("run out"), "{says}");
    std::fs::write(certificates.path("client.pem"), good).expect("written");
    std::fs::write(certificates.path("client.key"), good_key).expect("written");
    source.network_config().await.expect("the config");
}

#[test]
fn certificate_files_are_checked_at_start() {
    let certificates = Certificates::new();
    let mut options = certificates.options("https://127.0.0.1:1");
    options.ca_file = Some(Path::new("nowhere/ca.pem").to_owned());
    let error = EtcdSource::new(&options).expect_err("missing").to_string();
    assert!(
        error.contains("--etcd-cafile nowhere/ca.pem (looked for in /"),
        "{error}"
    );
}

/// An etcd with users `root` and `flannel`, whose tokens last two seconds.
async fn etcd_with_users() -> Etcd {
    let etcd = Etcd::with(1, &["--auth-token", "simple", "--auth-token-ttl", "2"]).await;
    etcd.put(CONFIG_KEY, CONFIG).await;
    let mut client = etcd.client().await;
    client.role_add("flannel").await.expect("a role");
    let permission =
        etcd_client::Permission::new(PermissionType::Readwrite, "/coreos.com/network/")
            .with_prefix();
    client
        .role_grant_permission("flannel", permission)
        .await
        .expect("granted");
    for (user, password, role) in [
        ("root", "secret-r", "root"),
        ("flannel", "hunter2", "flannel"),
    ] {
        client.user_add(user, password, None).await.expect("a user");
        if role == "root" {
            let _ = client.role_add("root").await;
        }
        client.user_grant_role(user, role).await.expect("granted");
    }
    client.auth_enable().await.expect("enabled");
    etcd
}

fn as_user(endpoints: &str, user: &str, password: &str) -> EtcdOptions {
    EtcdOptions {
        username: Some(user.to_owned()),
        password: Some(password.parse().expect("any text")),
        ..options(endpoints)
    }
}

#[tokio::test]
async fn row_2_etcd_username_and_password() {
    let mut etcd = etcd_with_users().await;
    let source = EtcdSource::new(&as_user(etcd.url(0), "flannel", "hunter2")).expect("a source");
    source.network_config().await.expect("the config");
    let lease = acquire(&source, &node(1)).await.expect("a lease");
    let mut events = Events::of(&source).await;
    assert_eq!(events.snapshot().await.len(), 1);

    // Tokens run out when they are not used; calls and the watch go on all the same.
    tokio::time::sleep(Duration::from_secs(4)).await;
    source
        .renew(&lease)
        .await
        .expect("renewed with a new token");
    assert_eq!(events.put().await.1, 1);

    // After a restart old tokens are unknown.
    etcd.restart(0);
    until("renewed", || async { source.renew(&lease).await.is_ok() }).await;
    assert_eq!(events.put().await.1, 1);
    tokio::time::sleep(Duration::from_secs(4)).await;
    source
        .renew(&lease)
        .await
        .expect("renewed with a new token");
    assert_eq!(events.put().await.1, 1);
}

#[tokio::test]
async fn row_23_18_a_refused_user_is_told_without_the_password() {
    let etcd = etcd_with_users().await;
    let wrong = as_user(etcd.url(0), "flannel", "hunter3");
    let says = error_of(&wrong).await;
    assert!(
        says.contains("--etcd-username") && !says.contains("hunter3"),
        "{says}"
    );
    let source = EtcdSource::new(&wrong).expect("a source");
    assert!(!format!("{source:?}{source:#?}").contains("hunter3"));
    let says = error_of(&options(etcd.url(0))).await;
    assert!(says.contains("--etcd-username"), "{says}");
    let elsewhere = EtcdOptions {
        prefix: "/elsewhere".to_owned(),
        ..as_user(etcd.url(0), "flannel", "hunter2")
    };
    let says = error_of(&elsewhere).await;
    assert!(
        says.contains("permission denied") && says.contains("--etcd-prefix"),
        "{says}"
    );
}

#[tokio::test]
async fn a_user_is_no_harm_where_none_is_needed() {
    let etcd = Etcd::start().await;
    etcd.put(CONFIG_KEY, CONFIG).await;
    let source = EtcdSource::new(&as_user(etcd.url(0), "flannel", "hunter2")).expect("a source");
    source.network_config().await.expect("the config");
}
