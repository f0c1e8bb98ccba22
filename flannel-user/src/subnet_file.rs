//! subnet.env: what the CNI plugin reads, and what this node remembers of its
//! last run (contract section 13).

use std::{
    fmt,
    fs::DirBuilder,
    io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use ipnet::Ipv4Net;

use crate::atomic_file;

/// The content of the file. Its text is byte-identical to flannel's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SubnetFile {
    /// All pod addresses of the cluster.
    pub network: Ipv4Net,
    /// This node's pod subnet; the file names its first host address.
    pub subnet: Ipv4Net,
    /// MTU of pods, in bytes.
    pub mtu: u32,
    /// `--ip-masq`: this agent masquerades, so the CNI plugin does not.
    pub ip_masq: bool,
}

/// What an earlier run left. A key that is missing, bad, or holds more than one
/// valid network is `None`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Previous {
    /// `FLANNEL_NETWORK`, host bits zero.
    pub network: Option<Ipv4Net>,
    /// `FLANNEL_SUBNET`, host bits zero.
    pub subnet: Option<Ipv4Net>,
}

/// The file could not be written or read.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} the subnet file {}: {source}", path.display())]
pub struct SubnetFileError {
    /// `write` or `read`.
    pub action: &'static str,
    /// Where it is.
    pub path: PathBuf,
    /// What the system said.
    #[source]
    pub source: io::Error,
}

impl fmt::Display for SubnetFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let first_host = u32::from(self.subnet.network()).wrapping_add(1);
        let first_host = std::net::Ipv4Addr::from(first_host);
        writeln!(f, "FLANNEL_NETWORK={}", self.network.trunc())?;
        writeln!(
            f,
            "FLANNEL_SUBNET={first_host}/{}",
            self.subnet.prefix_len()
        )?;
        writeln!(f, "FLANNEL_MTU={}", self.mtu)?;
        writeln!(f, "FLANNEL_IPMASQ={}", self.ip_masq)
    }
}

impl SubnetFile {
    /// Writes the file so that no reader ever finds a part of it; its directory is
    /// made (0755) where it is missing.
    ///
    /// # Errors
    /// Whatever the system refused, with the path.
    pub fn write(&self, path: &Path) -> Result<(), SubnetFileError> {
        let write = || {
            if let Some(directory) = path.parent() {
                DirBuilder::new()
                    .recursive(true)
                    .mode(0o755)
                    .create(directory)?;
            }
            atomic_file::replace(path, self.to_string().as_bytes())
        };
        write().map_err(|source| SubnetFileError {
            action: "write",
            path: path.to_owned(),
            source,
        })
    }
}

impl Previous {
    /// Reads what an earlier run left; nothing, if there was none.
    ///
    /// # Errors
    /// When there is a file that cannot be read.
    pub fn read(path: &Path) -> Result<Self, SubnetFileError> {
        match std::fs::read(path) {
            Ok(bytes) => Ok(Self::parse(&String::from_utf8_lossy(&bytes))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            Err(source) => Err(SubnetFileError {
                action: "read",
                path: path.to_owned(),
                source,
            }),
        }
    }

    /// Reads dotenv text: quotes, comments and `export` are allowed, the last of
    /// several assignments counts.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let mut previous = Self::default();
        for (key, value) in text.lines().filter_map(assignment) {
            match key {
                "FLANNEL_NETWORK" => previous.network = only_network(value),
                "FLANNEL_SUBNET" => previous.subnet = only_network(value),
                _ => {}
            }
        }
        previous
    }
}

/// `export KEY = "value" # comment` → key and bare value.
fn assignment(line: &str) -> Option<(&str, &str)> {
    let line = line.trim();
    let line = line
        .strip_prefix("export")
        .filter(|rest| rest.starts_with(char::is_whitespace))
        .unwrap_or(line);
    let (key, value) = line.split_once('=')?;
    let value = value.trim_start();
    let value = match value.chars().next() {
        Some(quote @ ('"' | '\'')) => value[1..].split_once(quote)?.0,
        _ => value.split('#').next().unwrap_or_default(),
    };
    Some((key.trim(), value.trim()))
}

/// The value of `key` in dotenv text; the last of several assignments counts.
pub(crate) fn value<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    let found = text.lines().filter_map(assignment);
    found
        .filter(|(name, _)| *name == key)
        .map(|(_, value)| value)
        .next_back()
}

/// The one valid network in a comma list.
fn only_network(list: &str) -> Option<Ipv4Net> {
    let mut valid = list
        .split(',')
        .filter_map(|entry| entry.trim().parse::<Ipv4Net>().ok());
    match (valid.next(), valid.next()) {
        (Some(only), None) => Some(only.trunc()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use proptest::prelude::*;
    use rstest::rstest;

    use super::*;

    fn net(text: &str) -> Ipv4Net {
        text.parse().expect("a network")
    }

    fn example() -> SubnetFile {
        SubnetFile {
            network: net("10.42.0.0/16"),
            subnet: net("10.42.7.0/24"),
            mtu: 1450,
            ip_masq: true,
        }
    }

    #[test]
    fn the_text_is_flannels() {
        assert_eq!(
            example().to_string(),
            "FLANNEL_NETWORK=10.42.0.0/16\nFLANNEL_SUBNET=10.42.7.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n"
        );
    }

    #[test]
    fn what_is_written_is_read_back() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("run/flannel/subnet.env");
        assert_eq!(Previous::read(&path).expect("none"), Previous::default());
        example().write(&path).expect("written");
        let previous = Previous::read(&path).expect("readable");
        assert_eq!(previous.subnet, Some(example().subnet));
        assert_eq!(previous.network, Some(example().network));
        let mode = |path: &Path| path.metadata().expect("there").permissions().mode() & 0o777;
        assert_eq!(mode(&path), 0o644);
    }

    #[test]
    fn a_failed_write_names_the_path_and_leaves_the_old_file() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("subnet.env");
        std::fs::create_dir(&path).expect("made");
        let error = example().write(&path).expect_err("a directory is there");
        assert!(
            error.to_string().contains(&path.display().to_string()),
            "{error}"
        );
        assert!(path.is_dir());
        let left = std::fs::read_dir(directory.path()).expect("readable");
        assert_eq!(left.count(), 1, "no temporary file stays");
    }

    #[rstest]
    #[case("FLANNEL_SUBNET=10.244.1.1/24", Some("10.244.1.0/24"))]
    #[case("FLANNEL_SUBNET=\"10.244.1.1/24\"", Some("10.244.1.0/24"))]
    #[case("FLANNEL_SUBNET='10.244.1.1/24' # mine", Some("10.244.1.0/24"))]
    #[case("export FLANNEL_SUBNET=10.244.1.1/24", Some("10.244.1.0/24"))]
    #[case("export\tFLANNEL_SUBNET = 10.244.1.1/24 # c", Some("10.244.1.0/24"))]
    #[case("# FLANNEL_SUBNET=10.244.1.1/24", None)]
    #[case("EXPORTFLANNEL_SUBNET=10.244.1.1/24", None)]
    #[case("FLANNEL_SUBNET=10.244.1.0/24,not-a-cidr", Some("10.244.1.0/24"))]
    #[case("FLANNEL_SUBNET=not-a-cidr", None)]
    #[case("FLANNEL_SUBNET=10.244.1.0/24,not-a-cidr,10.244.2.0/24", None)]
    #[case("FLANNEL_SUBNET=", None)]
    #[case("FLANNEL_SUBNET=\"10.244.1.1/24", None)]
    #[case("FLANNEL_SUBNET=10.244.1.1/33", None)]
    #[case("FLANNEL_SUBNET=fd00::1/64", None)]
    #[case(
        "FLANNEL_SUBNET=10.1.1.1/24\nFLANNEL_SUBNET=10.1.2.1/24",
        Some("10.1.2.0/24")
    )]
    #[case("FLANNEL_IPV6_SUBNET=fd00::1/64\nFLANNEL_MTU=1450", None)]
    fn reading_is_tolerant(#[case] text: &str, #[case] subnet: Option<&str>) {
        assert_eq!(Previous::parse(text).subnet, subnet.map(net));
    }

    #[test]
    fn a_torn_file_gives_the_whole_subnet_or_nothing_that_fits_the_network() {
        let text = example().to_string();
        for end in 0..text.len() {
            let subnet = Previous::parse(&text[..end]).subnet;
            // Cut inside the prefix length it still parses, but then no config
            // with this length takes it.
            let fits = subnet.filter(|subnet| subnet.prefix_len() == 24);
            assert!(
                fits.is_none_or(|subnet| subnet == example().subnet),
                "{end}"
            );
        }
    }

    proptest! {
        #[test]
        fn no_text_panics(text: String) {
            let _ = Previous::parse(&text);
        }
    }
}
