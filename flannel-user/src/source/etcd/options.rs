//! What the `--etcd-…` flags say, checked, with secrets that never print.

use std::{
    convert::Infallible,
    fmt, io,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use etcd_client::{Certificate, Identity, TlsOptions};

/// How to reach etcd, and what is ours there.
#[derive(Debug, Clone)]
pub struct EtcdOptions {
    /// `--etcd-endpoints`.
    pub endpoints: Endpoints,
    /// `--etcd-prefix`.
    pub prefix: String,
    /// `--etcd-keyfile`.
    pub key_file: Option<PathBuf>,
    /// `--etcd-certfile`.
    pub cert_file: Option<PathBuf>,
    /// `--etcd-cafile`.
    pub ca_file: Option<PathBuf>,
    /// `--etcd-username`.
    pub username: Option<String>,
    /// `--etcd-password`.
    pub password: Option<Secret>,
    /// How long a lease lasts unless renewed; flannel's is 24 h.
    pub lease_ttl: Duration,
}

/// A text that must not be seen. Neither `Debug` nor an error ever shows it.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

/// `--etcd-endpoints` as given. `Debug` shows no user or password in it.
#[derive(Clone, PartialEq, Eq)]
pub struct Endpoints(String);

/// One endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Endpoint {
    /// `http://host:port` or `https://host:port`, without user and password.
    pub(super) url: String,
    /// Whether it is to be spoken to with TLS.
    pub(super) tls: bool,
}

/// Why the options cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OptionsError {
    /// Only commas.
    #[error(
        "--etcd-endpoints names no endpoint; expected URLs with commas between them, as in http://127.0.0.1:2379"
    )]
    NoEndpoint,
    /// One entry is no address.
    #[error(
        "--etcd-endpoints has {endpoint:?}, which is no address of an etcd server; expected http://host:port or https://host:port"
    )]
    BadEndpoint {
        /// The entry without user and password.
        endpoint: String,
    },
    /// A file of the TLS flags cannot be read.
    #[error("cannot read {flag} {}{}: {source}", path.display(), relative_to(path))]
    Unreadable {
        /// The flag that names it.
        flag: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A file of the TLS flags holds something else.
    #[error("{flag} {} holds no {expected} in PEM form", path.display())]
    NotPem {
        /// The flag that names it.
        flag: &'static str,
        /// The file.
        path: PathBuf,
        /// What should be in it.
        expected: &'static str,
    },
}

fn relative_to(path: &Path) -> String {
    match std::env::current_dir() {
        Ok(directory) if path.is_relative() => format!(" (looked for in {})", directory.display()),
        _ => String::new(),
    }
}

impl Secret {
    /// The text itself, for the one who checks it.
    pub(super) fn reveal(&self) -> &str {
        &self.0
    }
}

impl FromStr for Secret {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[redacted]")
    }
}

impl FromStr for Endpoints {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Debug for Endpoints {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let entries: Vec<String> = self.entries().map(without_user).collect();
        write!(f, "{:?}", entries.join(","))
    }
}

impl Endpoints {
    /// flannel does not trim; a list with blanks that it half understands is no reason to
    /// refuse to start.
    fn entries(&self) -> impl Iterator<Item = &str> {
        self.0
            .split(',')
            .map(str::trim)
            .filter(|entry| !entry.is_empty())
    }

    /// `has_identity`: TLS is configured, so an entry without scheme means https.
    pub(super) fn parse(&self, has_identity: bool) -> Result<Vec<Endpoint>, OptionsError> {
        let endpoints: Vec<Endpoint> = self
            .entries()
            .map(|entry| endpoint(&without_user(entry), has_identity))
            .collect::<Result<_, _>>()?;
        if endpoints.is_empty() {
            return Err(OptionsError::NoEndpoint);
        }
        Ok(endpoints)
    }

    fn name_a_user(&self) -> bool {
        self.entries().any(|entry| without_user(entry) != entry)
    }
}

/// What stands before an `@` in the authority is a user and perhaps a password.
fn without_user(entry: &str) -> String {
    let (scheme, rest) = match entry.split_once("://") {
        Some((scheme, rest)) => (format!("{scheme}://"), rest),
        None => (String::new(), entry),
    };
    // A password may hold a bare slash, so everything before the last `@` goes.
    match rest.rsplit_once('@') {
        Some((_, host)) => format!("{scheme}{host}"),
        None => entry.to_owned(),
    }
}

fn endpoint(entry: &str, has_identity: bool) -> Result<Endpoint, OptionsError> {
    let bad = || OptionsError::BadEndpoint {
        endpoint: entry.to_owned(),
    };
    let (tls, authority) = match entry.split_once("://") {
        Some(("http", rest)) => (false, rest),
        Some(("https", rest)) => (true, rest),
        Some(_) => return Err(bad()),
        None => (has_identity, entry),
    };
    let authority = authority.split('/').next().unwrap_or_default();
    let port_is_good = match authority.rsplit_once(':') {
        Some((_, port)) if !port.ends_with(']') => port.parse::<u16>().is_ok(),
        _ => true,
    };
    let host_is_good = !authority.is_empty()
        && !authority.starts_with(':')
        && authority
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b".-_:[]%".contains(&b));
    if !(port_is_good && host_is_good) {
        return Err(bad());
    }
    let scheme = if tls { "https" } else { "http" };
    Ok(Endpoint {
        url: format!("{scheme}://{authority}"),
        tls,
    })
}

impl EtcdOptions {
    /// What the user should know about options that are given and not used.
    #[must_use]
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        let given: Vec<&str> = [
            ("--etcd-keyfile", &self.key_file),
            ("--etcd-certfile", &self.cert_file),
            ("--etcd-cafile", &self.ca_file),
        ]
        .iter()
        .filter(|(_, file)| file.is_some())
        .map(|(flag, _)| *flag)
        .collect();
        if !given.is_empty() && !self.has_identity() {
            warnings.push(format!(
                "{} is not used: TLS is configured only when --etcd-keyfile and --etcd-certfile are both given (https endpoints are checked against the system's certificates)",
                given.join(" and ")
            ));
        }
        if self.username.is_some() != self.password.is_some() {
            warnings.push(
                "etcd is used without a user: --etcd-username and --etcd-password go together"
                    .to_owned(),
            );
        }
        if self.endpoints.name_a_user() {
            warnings.push(
                "a user in --etcd-endpoints is not used: give --etcd-username and --etcd-password"
                    .to_owned(),
            );
        }
        warnings
    }

    pub(super) fn has_identity(&self) -> bool {
        self.key_file.is_some() && self.cert_file.is_some()
    }

    /// User and password, if both are given.
    pub(super) fn credentials(&self) -> Option<(&str, &str)> {
        Some((self.username.as_deref()?, self.password.as_ref()?.reveal()))
    }

    /// Reads the TLS files. Done for each connection, as the original does, so a renewed
    /// certificate needs no restart.
    pub(super) fn tls(&self) -> Result<TlsOptions, OptionsError> {
        let (Some(key_file), Some(cert_file)) = (&self.key_file, &self.cert_file) else {
            return Ok(TlsOptions::new().with_native_roots());
        };
        let key = pem(
            "--etcd-keyfile",
            key_file,
            "private key",
            "PRIVATE KEY-----",
        )?;
        let cert = pem(
            "--etcd-certfile",
            cert_file,
            "certificate",
            "BEGIN CERTIFICATE-----",
        )?;
        let tls = TlsOptions::new().identity(Identity::from_pem(cert, key));
        match &self.ca_file {
            Some(ca_file) => {
                let ca = pem(
                    "--etcd-cafile",
                    ca_file,
                    "certificate",
                    "BEGIN CERTIFICATE-----",
                )?;
                Ok(tls.ca_certificate(Certificate::from_pem(ca)))
            }
            None => Ok(tls.with_native_roots()),
        }
    }
}

fn pem(
    flag: &'static str,
    path: &Path,
    expected: &'static str,
    mark: &str,
) -> Result<Vec<u8>, OptionsError> {
    let bytes = std::fs::read(path).map_err(|source| OptionsError::Unreadable {
        flag,
        path: path.to_owned(),
        source,
    })?;
    if !String::from_utf8_lossy(&bytes).contains(mark) {
        return Err(OptionsError::NotPem {
            flag,
            path: path.to_owned(),
            expected,
        });
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    fn options(endpoints: &str) -> EtcdOptions {
        EtcdOptions {
            endpoints: endpoints.parse().expect("any text"),
            prefix: "/n".to_owned(),
            key_file: None,
            cert_file: None,
            ca_file: None,
            username: None,
            password: None,
            lease_ttl: Duration::from_secs(86_400),
        }
    }

    fn urls(endpoints: &str, has_identity: bool) -> Vec<String> {
        let endpoints = options(endpoints).endpoints.parse(has_identity);
        let endpoints = endpoints.expect("good endpoints").into_iter();
        endpoints.map(|endpoint| endpoint.url).collect()
    }

    #[test]
    fn endpoints_are_split_on_commas() {
        assert_eq!(
            urls("http://127.0.0.1:4001,http://127.0.0.1:2379", false),
            ["http://127.0.0.1:4001", "http://127.0.0.1:2379"]
        );
        assert_eq!(
            urls(" https://a:1/ ,, [::1]:2379,", false),
            ["https://a:1", "http://[::1]:2379"]
        );
        assert_eq!(urls("a:1", true), ["https://a:1"]);
    }

    #[rstest]
    #[case("", "names no endpoint")]
    #[case(",", "names no endpoint")]
    #[case("http://", "\"http://\"")]
    #[case("ftp://a:1", "\"ftp://a:1\"")]
    #[case("http://a:port", "\"http://a:port\"")]
    #[case("http://user:hunter2@a b:1", "\"http://a b:1\"")]
    fn a_bad_endpoint_is_named_with_its_flag(#[case] endpoints: &str, #[case] says: &str) {
        let error = options(endpoints).endpoints.parse(false).expect_err("bad");
        let text = error.to_string();
        assert!(
            text.contains("--etcd-endpoints") && text.contains(says),
            "{text}"
        );
        assert!(!text.contains("hunter2"), "{text}");
    }

    #[test]
    fn row_23_18_secrets_never_print() {
        let mut options = options("http://root:hun/ter2@a:1,http://b:2");
        options.username = Some("flannel".to_owned());
        options.password = Some("hun/ter2".parse().expect("any text"));
        let text = format!("{options:?} {:#?} {:?}", options, options.warnings());
        assert!(!text.contains("ter2"), "{text}");
        assert!(text.contains("http://a:1,http://b:2"), "{text}");
        assert!(options.warnings()[0].contains("--etcd-endpoints"));
    }

    #[test]
    fn row_2_etcd_cafile_without_key_and_certificate_is_a_warning() {
        let mut options = options("https://a:1");
        options.ca_file = Some("/nowhere/ca.pem".into());
        assert!(options.tls().is_ok(), "the file is not even read");
        let warnings = options.warnings();
        assert_eq!(warnings.len(), 1);
        assert!(warnings[0].starts_with("--etcd-cafile"), "{warnings:?}");
        options.key_file = Some("/nowhere/key.pem".into());
        options.cert_file = Some("/nowhere/cert.pem".into());
        assert_eq!(options.warnings(), [""; 0]);
    }

    #[test]
    fn an_unusable_file_is_named_with_its_flag() {
        let dir = tempfile::tempdir().expect("a directory");
        let key = dir.path().join("key.pem");
        std::fs::write(&key, "no key").expect("written");
        let mut options = options("https://a:1");
        options.key_file = Some(key.clone());
        options.cert_file = Some("certs/client.pem".into());
        let text = options.tls().expect_err("no PEM").to_string();
        assert!(
            text.starts_with(&format!("--etcd-keyfile {}", key.display())),
            "{text}"
        );
        std::fs::write(&key, "-----BEGIN PRIVATE KEY-----").expect("written");
        let text = options.tls().expect_err("missing").to_string();
        let here = std::env::current_dir().expect("a directory");
        let says = format!(
            "--etcd-certfile certs/client.pem (looked for in {}",
            here.display()
        );
        assert!(text.contains(&says), "{text}");
    }

    #[test]
    fn user_and_password_go_together() {
        let mut options = options("a:1");
        options.username = Some("flannel".to_owned());
        assert_eq!(options.credentials(), None);
        assert!(options.warnings()[0].contains("--etcd-password"));
        options.password = Some("x".parse().expect("any text"));
        assert_eq!(options.credentials(), Some(("flannel", "x")));
    }
}
