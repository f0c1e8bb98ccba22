//! `/healthz` and `/readyz`, as a kubelet asks for them.

use std::{
    fs,
    io::{Read, Write},
    net::TcpStream,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use flannel_user::observe::status::Mode::Ebpf;
use lab::{
    agent::{Agent, AgentOptions},
    lab::DEFAULT_CONFIG,
    node::{Node, SUBNET_FILE},
    scenario::scenario,
    wait,
};

const PORT: u16 = 8081;

#[test]
fn contract_17_ready_only_when_the_first_snapshot_is_in_the_kernel() {
    scenario(2, |lab| {
        let (a, b) = (lab[0].clone(), lab[1].clone());
        let _b = Agent::start(&b, &AgentOptions::in_mode(Ebpf))?;
        let route = format!("{} via ", b.subnet()?);

        // It answers before there is any network (contract section 1, step 5).
        let config = a.lease_dir().join("config");
        fs::remove_file(&config)?;
        let options = AgentOptions::in_mode(Ebpf).argument(format!("--healthz-port={PORT}"));
        let mut agent = Agent::launch(&a, &options)?;
        wait::until_true("it answers", Duration::from_secs(10), || {
            Ok(get(&a, "GET", "/healthz")? == (200, "flanneld is running".to_owned()))
        })?;
        let not_ready = (503, "flanneld is not ready yet".to_owned());
        ensure!(get(&a, "GET", "/readyz")? == not_ready);

        fs::write(&config, DEFAULT_CONFIG)?;
        wait::until_true("it is ready", Duration::from_secs(10), || {
            let answer = get(&a, "GET", "/readyz")?;
            // Asked afterwards: what was true when it said so is true now.
            let routes = a.namespace().ip("route show")?;
            let is_ready = answer == (200, "flanneld is ready".to_owned());
            ensure!(is_ready || answer == not_ready, "{answer:?}");
            ensure!(
                !is_ready || (routes.contains(&route) && a.namespace().exists(SUBNET_FILE)?),
                "ready without {route:?} in\n{routes}"
            );
            Ok(is_ready)
        })?;
        agent.wait_for_peers(1)?;
        for method in ["HEAD", "POST", "DELETE"] {
            ensure!(get(&a, method, "/healthz")?.0 == 200, "{method}");
        }
        for path in ["/", "/metrics", "/readyz/"] {
            ensure!(get(&a, "GET", path)?.0 == 404, "{path}");
        }
        Ok(())
    });
}

#[test]
fn a_port_that_is_taken_ends_the_start() {
    scenario(2, |lab| {
        let a = lab[0].clone();
        let options = AgentOptions::in_mode(Ebpf).argument(format!("--healthz-port={PORT}"));
        let _first = Agent::start(&a, &options)?;
        let second = options
            .argument("--control-socket=/run/flannel/second.sock")
            .argument("--healthz-ip=127.0.0.1");
        let ended = Agent::launch(&a, &second)?.ends_within(Duration::from_secs(10))?;
        ensure!(ended.status.code() == Some(1), "{}", ended.status);
        ensure!(
            ended.log.contains("127.0.0.1 port 8081") && ended.log.contains("--healthz-port"),
            "{}",
            ended.log
        );
        Ok(())
    });
}

/// Status and body of the answer.
fn get(node: &Node, method: &str, path: &str) -> Result<(u16, String)> {
    let request = format!(
        "{method} {path} HTTP/1.1\r\nHost: node\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    );
    let answer = node.namespace().within(|| -> Result<String> {
        let mut stream = TcpStream::connect(("127.0.0.1", PORT))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        stream.write_all(request.as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    })??;
    let (head, body) = answer
        .split_once("\r\n\r\n")
        .with_context(|| format!("no HTTP: {answer}"))?;
    let status = head.split(' ').nth(1).context("no status")?.parse()?;
    Ok((status, body.to_owned()))
}
