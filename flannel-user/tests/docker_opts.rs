//! `flannelctl mk-docker-opts` against the kernel's routes, under both of its names.

mod namespace;

use std::{os::unix::fs::symlink, path::Path, process::Command};

use namespace::{in_new_namespace, run};

const FILE: &str = "FLANNEL_NETWORK=10.1.0.0/16\nFLANNEL_SUBNET=10.1.74.1/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=false\n";
const COMBINED: &str = " --bip=10.1.74.1/24 --ip-masq=true --mtu=1472";

/// Exit status and what it complained of.
fn call(program: &Path, arguments: &[&str]) -> (Option<i32>, String) {
    let output = Command::new(program).args(arguments).output();
    let output = output.expect("it runs");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    (output.status.code(), said)
}

#[test]
fn contract_21_docker_options_under_both_names() {
    in_new_namespace(|| async {
        let directory = tempfile::tempdir().expect("a directory");
        let at = |name: &str| directory.path().join(name).display().to_string();
        std::fs::write(at("subnet.env"), FILE).expect("written");
        let flannelctl = Path::new(env!("CARGO_BIN_EXE_flannelctl"));
        let script = directory.path().join("mk-docker-opts.sh");
        symlink(flannelctl, &script).expect("linked");
        let (input, output) = (at("subnet.env"), at("docker_opts.env"));
        let written = || std::fs::read_to_string(&output).expect("written");

        let files = ["-f", &input, "-d", &output];
        assert_eq!(call(&script, &files), (Some(0), String::new()));
        let both = format!(
            "DOCKER_OPT_BIP=\"--bip=10.1.74.1/24\"\nDOCKER_OPT_IPMASQ=\"--ip-masq=true\"\nDOCKER_OPT_MTU=\"--mtu=1472\"\nDOCKER_OPTS=\"{COMBINED}\"\n"
        );
        assert_eq!(written(), both);

        let words = [
            "mk-docker-opts",
            "-f",
            &input,
            "-d",
            &output,
            "-c",
            "-k",
            "NETWORK",
        ];
        assert_eq!(call(flannelctl, &words), (Some(0), String::new()));
        assert_eq!(written(), format!("NETWORK=\"{COMBINED}\"\n"));

        // As the shell's getopts reads them.
        let together = [&files[..], &["-im"]].concat();
        assert_eq!(call(&script, &together), (Some(0), String::new()));
        assert_eq!(
            written(),
            "DOCKER_OPT_BIP=\"--bip=10.1.74.1/24\"\nDOCKER_OPT_MTU=\"--mtu=1472\"\n"
        );
    });
}

#[test]
fn contract_21_a_gateway_route_or_no_subnet_file_ends_with_1_and_writes_nothing() {
    in_new_namespace(|| async {
        let directory = tempfile::tempdir().expect("a directory");
        let at = |name: &str| directory.path().join(name).display().to_string();
        let flannelctl = Path::new(env!("CARGO_BIN_EXE_flannelctl"));
        let (input, output) = (at("subnet.env"), at("docker_opts.env"));
        let words = ["mk-docker-opts", "-f", &input, "-d", &output];

        let (code, said) = call(flannelctl, &words);
        assert_eq!(code, Some(1));
        assert!(said.contains(&input) && said.contains("flanneld"), "{said}");

        std::fs::write(&input, FILE).expect("written");
        run("ip link add eth0 type veth peer name wire0");
        run("ip addr add 192.168.50.1/24 dev eth0");
        run("ip link set eth0 up");
        run("ip route add 10.1.74.0/24 via 192.168.50.2");
        let (code, said) = call(flannelctl, &words);
        assert_eq!(code, Some(1));
        assert!(
            said.contains("10.1.74.0/24") && said.contains("eth0"),
            "{said}"
        );
        assert!(!Path::new(&output).exists());

        // docker0's own route is no obstacle: Docker may be restarted.
        run("ip route del 10.1.74.0/24");
        run("ip route add 10.1.74.0/24 dev eth0");
        assert_eq!(call(flannelctl, &words).0, Some(0));
    });
}
