//! An etcd server on a node, spoken to by its JSON gateway: what agents that
//! know no lease directory share.

use std::{
    fs::File,
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddrV4, TcpStream},
    process::{Child, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::{lab::Lab, node::Node, wait};

/// Where flannel keeps its keys.
const PREFIX: &str = "/coreos.com/network";
/// Operations that one transaction may hold, by etcd's default.
const BATCH: usize = 128;

/// A running server; killed when dropped.
#[derive(Debug)]
pub struct Etcd {
    node: Node,
    at: SocketAddrV4,
    child: Child,
}

impl Etcd {
    /// Starts one on the first node and writes the network config there.
    ///
    /// # Errors
    /// When etcd is not installed, or does not answer in time.
    pub fn start(lab: &Lab, config: &str) -> Result<Self> {
        let node = lab[0].clone();
        let at = SocketAddrV4::new(node.public_ip(), 2379);
        let peers = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 2380);
        let data = lab.scratch().join("etcd");
        let log = File::create(lab.scratch().join("logs/etcd.log"))?;
        let mut command = node.namespace().command("etcd");
        command
            .arg(format!("--data-dir={}", data.display()))
            .arg(format!("--listen-client-urls=http://{at}"))
            .arg(format!("--advertise-client-urls=http://{at}"))
            .arg(format!("--listen-peer-urls=http://{peers}"))
            .arg(format!("--initial-advertise-peer-urls=http://{peers}"))
            .arg(format!("--initial-cluster=default=http://{peers}"))
            // A benchmark's data may be lost, and should not wait for a disk.
            .arg("--unsafe-no-fsync")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        let child = node
            .namespace()
            .spawn(command)
            .context("etcd is needed for this (package etcd-server)")?;
        let etcd = Self { node, at, child };
        let put = [(format!("{PREFIX}/config"), config.to_owned())];
        wait::until_true("etcd answers", Duration::from_secs(15), || {
            etcd.put(&put).map(|()| true)
        })?;
        Ok(etcd)
    }

    /// Where agents find it.
    #[must_use]
    pub fn at(&self) -> SocketAddrV4 {
        self.at
    }

    /// Writes leases, given as the name of flannel's key (`10.5.52.0-24`) and its value.
    ///
    /// # Errors
    /// When etcd refuses.
    pub fn put_leases(&self, leases: &[(String, String)]) -> Result<()> {
        let puts: Vec<_> = leases
            .iter()
            .map(|(name, json)| (format!("{PREFIX}/subnets/{name}"), json.clone()))
            .collect();
        puts.chunks(BATCH).try_for_each(|batch| self.put(batch))
    }

    /// Removes a lease by the name of its key.
    ///
    /// # Errors
    /// When etcd refuses.
    pub fn remove_lease(&self, name: &str) -> Result<()> {
        let key = base64(format!("{PREFIX}/subnets/{name}").as_bytes());
        self.transact(&[json!({"requestDeleteRange": {"key": key}})])
    }

    fn put(&self, pairs: &[(String, String)]) -> Result<()> {
        let puts: Vec<Value> = pairs
            .iter()
            .map(|(key, value)| {
                json!({"requestPut": {
                    "key": base64(key.as_bytes()),
                    "value": base64(value.as_bytes())
                }})
            })
            .collect();
        self.transact(&puts)
    }

    fn transact(&self, operations: &[Value]) -> Result<()> {
        let body = json!({"success": operations}).to_string();
        let request = format!(
            "POST /v3/kv/txn HTTP/1.0\r\nHost: etcd\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        let at = self.at;
        let answer = self.node.namespace().within(move || {
            let mut connection = TcpStream::connect(at)?;
            connection.set_read_timeout(Some(Duration::from_secs(10)))?;
            connection.write_all(request.as_bytes())?;
            let mut answer = String::new();
            connection.read_to_string(&mut answer)?;
            Ok::<_, std::io::Error>(answer)
        })??;
        let first = answer.lines().next().unwrap_or_default();
        ensure!(first.contains(" 200 "), "etcd refused: {answer}");
        Ok(())
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// As the JSON gateway wants bytes.
fn base64(bytes: &[u8]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for group in bytes.chunks(3) {
        let mut three = [0; 3];
        three[..group.len()].copy_from_slice(group);
        let bits = u32::from_be_bytes([0, three[0], three[1], three[2]]);
        for index in 0..4 {
            if index <= group.len() {
                let letter = LETTERS[(bits >> (18 - 6 * index)) as usize & 63];
                text.push(letter.into());
            } else {
                text.push('=');
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::base64;

    #[test]
    fn base64_as_in_rfc_4648() {
        for (bytes, text) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(base64(bytes.as_bytes()), text);
        }
    }
}
