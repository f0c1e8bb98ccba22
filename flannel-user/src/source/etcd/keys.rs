//! Names of keys (contract section 6.1).

use crate::lease::SubnetKey;

/// Where everything of one cluster lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Keys {
    /// The prefix as it is used.
    pub(super) root: String,
    /// The network config.
    pub(super) config: String,
    /// What every lease's key begins with; flannel lists and watches it without a slash
    /// behind it, so `subnets-old/10.1.2.0-24` is a lease too.
    pub(super) subnets: String,
}

impl Keys {
    /// The keys below `--etcd-prefix`.
    pub(super) fn under(prefix: &str) -> Self {
        Self {
            root: join(prefix, ""),
            config: join(prefix, "config"),
            subnets: join(prefix, "subnets"),
        }
    }

    /// The key of a lease.
    pub(super) fn lease(&self, key: &SubnetKey) -> String {
        format!("{}/{key}", self.subnets)
    }

    /// The first key behind every lease's.
    pub(super) fn subnets_end(&self) -> Vec<u8> {
        end_of_prefix(self.subnets.as_bytes())
    }
}

/// As Go's `path.Join`: no double or trailing slashes, `.` and `..` resolved.
fn join(prefix: &str, name: &str) -> String {
    let rooted = prefix.starts_with('/');
    let mut parts: Vec<&str> = Vec::new();
    for part in prefix.split('/').chain([name]) {
        match part {
            "" | "." => {}
            ".." if parts.last().is_some_and(|last| *last != "..") => {
                parts.pop();
            }
            ".." if rooted => {}
            part => parts.push(part),
        }
    }
    let path = parts.join("/");
    if rooted { format!("/{path}") } else { path }
}

/// The least key that does not begin with `prefix`; "\0" (no end) if there is none.
fn end_of_prefix(prefix: &[u8]) -> Vec<u8> {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if last < 0xff {
            end.push(last + 1);
            return end;
        }
    }
    vec![0]
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("/coreos.com/network", "/coreos.com/network")]
    #[case("/coreos.com/network/", "/coreos.com/network")]
    #[case("//coreos.com///network//", "/coreos.com/network")]
    #[case("coreos.com/network", "coreos.com/network")]
    #[case("/a/./b/../c", "/a/c")]
    #[case("/../a", "/a")]
    #[case("../a", "../a")]
    fn row_6_1_slashes_of_the_prefix_collapse(#[case] prefix: &str, #[case] root: &str) {
        let keys = Keys::under(prefix);
        assert_eq!(keys.root, root);
        assert_eq!(keys.config, format!("{root}/config"));
        assert_eq!(keys.subnets, format!("{root}/subnets"));
        let key = "10.5.52.0-24".parse().expect("a key");
        assert_eq!(keys.lease(&key), format!("{root}/subnets/10.5.52.0-24"));
    }

    #[rstest]
    #[case("", "config", "subnets")]
    #[case("/", "/config", "/subnets")]
    fn an_empty_prefix_is_no_error(
        #[case] prefix: &str,
        #[case] config: &str,
        #[case] subnets: &str,
    ) {
        let keys = Keys::under(prefix);
        assert_eq!((&*keys.config, &*keys.subnets), (config, subnets));
    }

    #[test]
    fn the_range_of_leases_ends_behind_its_prefix() {
        assert_eq!(Keys::under("/n").subnets_end(), b"/n/subnett");
        assert_eq!(end_of_prefix(b"a\xff"), b"b");
        assert_eq!(end_of_prefix(b"\xff\xff"), b"\0");
    }
}
