//! Docker's options from `subnet.env`, as flannel's `mk-docker-opts.sh` makes them (contract
//! section 21): `docker0` becomes the bridge of the node's pod subnet.

use std::fmt::Write as _;

use ipnet::Ipv4Net;

/// What goes into the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// A line for each option (`-i`).
    pub individual: bool,
    /// Name of the variable with all of them (`-c`, `-k`).
    pub combined: Option<String>,
    /// Without `--ip-masq`, which old Dockers do not know (`-m`).
    pub without_ip_masq: bool,
}

/// Why there are no options.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DockerOptsError {
    /// Docker would masquerade or not by chance.
    #[error("FLANNEL_IPMASQ is {0:?}, but must be true or false: is this flannel's subnet file?")]
    IpMasq(String),
    /// Nothing to make options from.
    #[error("it has no FLANNEL_SUBNET: is this flannel's subnet file?")]
    NoSubnet,
    /// Not a network with a host in it.
    #[error("FLANNEL_SUBNET is {0:?}, but must be one IPv4 network as in 10.1.74.1/24")]
    Subnet(String),
    /// Shells would read something else than was meant.
    #[error("{0:?} is no name for a variable: letters, digits and _ only, no digit first")]
    Name(String),
}

/// What the subnet file says of Docker's concern.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DockerOpts {
    bip: String,
    subnet: Ipv4Net,
    ip_masq: Option<bool>,
    mtu: Option<String>,
}

impl DockerOpts {
    /// Reads the text of a subnet file.
    ///
    /// # Errors
    /// The subnet is missing, or a value is not what flannel writes.
    pub fn parse(text: &str) -> Result<Self, DockerOptsError> {
        let value = |key| crate::subnet_file::value(text, key).filter(|value| !value.is_empty());
        let bip = value("FLANNEL_SUBNET").ok_or(DockerOptsError::NoSubnet)?;
        let subnet: Ipv4Net = bip
            .parse()
            .map_err(|_| DockerOptsError::Subnet(bip.to_owned()))?;
        let ip_masq = match value("FLANNEL_IPMASQ") {
            None => None,
            Some("true") => Some(true),
            Some("false") => Some(false),
            Some(other) => return Err(DockerOptsError::IpMasq(other.to_owned())),
        };
        Ok(Self {
            bip: bip.to_owned(),
            subnet: subnet.trunc(),
            ip_masq,
            mtu: value("FLANNEL_MTU").map(str::to_owned),
        })
    }

    /// The node's pod subnet.
    #[must_use]
    pub fn subnet(&self) -> Ipv4Net {
        self.subnet
    }

    /// The file for Docker's unit. `given` is what the combined variable holds already: it stays
    /// in front.
    ///
    /// # Errors
    /// The combined variable's name is none.
    pub fn render(&self, wanted: &Wanted, given: &str) -> Result<String, DockerOptsError> {
        // In this order, which is that of the names.
        let options = [
            ("BIP", Some(format!("--bip={}", self.bip))),
            (
                "IPMASQ",
                self.ip_masq
                    .filter(|_| !wanted.without_ip_masq)
                    .map(|masq| format!("--ip-masq={}", !masq)),
            ),
            ("MTU", self.mtu.as_ref().map(|mtu| format!("--mtu={mtu}"))),
        ];
        let options: Vec<(&str, String)> = options
            .into_iter()
            .filter_map(|(name, option)| Some((name, option?)))
            .collect();
        let mut file = String::new();
        if wanted.individual {
            for (name, option) in &options {
                let _ = writeln!(file, "DOCKER_OPT_{name}=\"{option}\"");
            }
        }
        if let Some(key) = &wanted.combined {
            if !is_name(key) {
                return Err(DockerOptsError::Name(key.clone()));
            }
            let all = options
                .iter()
                .fold(given.to_owned(), |all, (_, option)| all + " " + option);
            let _ = writeln!(file, "{key}=\"{all}\"");
        }
        Ok(file)
    }
}

fn is_name(text: &str) -> bool {
    let fits = |letter: char| letter == '_' || letter.is_ascii_alphanumeric();
    text.chars().all(fits) && text.starts_with(|first: char| !first.is_ascii_digit())
}

/// The line of `/proc/net/route` that sends `subnet` to a gateway: another host has it then, and
/// `docker0` must not take it.
#[must_use]
pub fn route_by_gateway(table: &str, subnet: Ipv4Net) -> Option<&str> {
    const GATEWAY: u32 = 2;
    // Addresses stand there as the machine's words hold them.
    let word = |address: std::net::Ipv4Addr| u32::from_ne_bytes(address.octets());
    table.lines().skip(1).find(|line| {
        let columns: Vec<&str> = line.split_whitespace().collect();
        let column = |index: usize| {
            columns
                .get(index)
                .and_then(|text| u32::from_str_radix(text, 16).ok())
        };
        column(1) == Some(word(subnet.network()))
            && column(7) == Some(word(subnet.netmask()))
            && column(3).is_some_and(|flags| flags & GATEWAY != 0)
    })
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    const FILE: &str = "FLANNEL_NETWORK=10.1.0.0/16\nFLANNEL_SUBNET=10.1.74.1/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=false\n";

    fn wanted(individual: bool, combined: Option<&str>, without_ip_masq: bool) -> Wanted {
        Wanted {
            individual,
            combined: combined.map(str::to_owned),
            without_ip_masq,
        }
    }

    #[rstest]
    #[case(
        wanted(false, Some("DOCKER_OPTS"), false),
        "DOCKER_OPTS=\" --bip=10.1.74.1/24 --ip-masq=true --mtu=1472\"\n"
    )]
    #[case(
        wanted(true, None, false),
        "DOCKER_OPT_BIP=\"--bip=10.1.74.1/24\"\nDOCKER_OPT_IPMASQ=\"--ip-masq=true\"\nDOCKER_OPT_MTU=\"--mtu=1472\"\n"
    )]
    #[case(
        wanted(true, Some("X"), true),
        "DOCKER_OPT_BIP=\"--bip=10.1.74.1/24\"\nDOCKER_OPT_MTU=\"--mtu=1472\"\nX=\" --bip=10.1.74.1/24 --mtu=1472\"\n"
    )]
    fn vector_24_docker_options(#[case] wanted: Wanted, #[case] expected: &str) {
        let options = DockerOpts::parse(FILE).expect("flannel's file");
        assert_eq!(options.render(&wanted, "").expect("rendered"), expected);
    }

    #[test]
    fn what_the_variable_holds_stays_in_front() {
        let options = DockerOpts::parse("FLANNEL_SUBNET=10.1.74.1/24").expect("enough");
        let file = options.render(&wanted(false, Some("OPTS"), false), "--debug");
        assert_eq!(
            file.expect("rendered"),
            "OPTS=\"--debug --bip=10.1.74.1/24\"\n"
        );
    }

    #[test]
    fn masquerading_is_the_business_of_one_of_the_two() {
        let masq = FILE.replace("IPMASQ=false", "IPMASQ=true");
        let options = DockerOpts::parse(&masq).expect("flannel's file");
        let file = options.render(&wanted(false, Some("O"), false), "");
        assert!(file.expect("rendered").contains("--ip-masq=false"));
    }

    #[rstest]
    #[case("", "no FLANNEL_SUBNET")]
    #[case("FLANNEL_SUBNET=10.1.74.1", "10.1.74.1")]
    #[case("FLANNEL_SUBNET=10.1.74.1/24,10.1.75.1/24", "10.1.75.1/24")]
    #[case("FLANNEL_SUBNET=10.1.74.1/24\nFLANNEL_IPMASQ=maybe", "maybe")]
    fn what_flannel_would_not_write_is_refused_by_name(#[case] text: &str, #[case] says: &str) {
        let error = DockerOpts::parse(text).expect_err("refused").to_string();
        assert!(error.contains(says), "{error}");
    }

    #[rstest]
    #[case("")]
    #[case("1X")]
    #[case("A B")]
    #[case("X\"; reboot")]
    fn a_variable_needs_a_name(#[case] name: &str) {
        let options = DockerOpts::parse(FILE).expect("flannel's file");
        let error = options.render(&wanted(false, Some(name), false), "");
        assert_eq!(error, Err(DockerOptsError::Name(name.to_owned())));
    }

    #[cfg(target_endian = "little")]
    #[test]
    fn only_a_route_by_a_gateway_to_exactly_this_subnet_is_in_the_way() {
        let table = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n\
            eth0\t00000000\t0100A8C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n\
            docker0\t004A010A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n\
            flannel.1\t004B010A\t004B010A\t0003\t0\t0\t0\t00FFFFFF\t0\t0\t0\n";
        let subnet = |text: &str| text.parse().expect("a network");
        let found = route_by_gateway(table, subnet("10.1.75.0/24"));
        assert!(
            found.is_some_and(|line| line.starts_with("flannel.1")),
            "{found:?}"
        );
        for other in ["10.1.74.0/24", "10.1.75.0/25", "0.0.0.0/1"] {
            assert_eq!(route_by_gateway(table, subnet(other)), None, "{other}");
        }
    }
}
