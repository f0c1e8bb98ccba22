//! The Debian archive that apt is configured with, and a private view of its newer suites.
//!
//! The system's apt configuration is read, never changed: own sources, lists and caches in a
//! temporary directory, with the system's keys, proxy settings and credentials.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result};

use crate::command;

/// One configured archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Archive {
    uri: String,
    /// A path to keys, or the keys themselves as deb822 has them (continuation lines included).
    signed_by: Option<String>,
}

/// Apt with one suite of an archive, in a directory of its own.
pub(super) struct PrivateApt<'a> {
    pub(super) directory: &'a Path,
}

/// The first archive that offers `release` (such as the suite this machine runs) with packages
/// of `main`.
pub(super) fn configured(release: &str) -> Option<Archive> {
    source_files()
        .into_iter()
        .filter_map(|path| Some((fs::read_to_string(&path).ok()?, path)))
        .find_map(|(text, path)| {
            let deb822 = path.extension().is_some_and(|suffix| suffix == "sources");
            if deb822 {
                from_deb822(&text, release)
            } else {
                from_one_line_style(&text, release)
            }
        })
}

fn source_files() -> Vec<PathBuf> {
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    let mut parts: Vec<_> = fs::read_dir("/etc/apt/sources.list.d")
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| {
            path.extension()
                .is_some_and(|suffix| suffix == "sources" || suffix == "list")
        })
        .collect();
    parts.sort();
    files.extend(parts);
    files
}

fn from_deb822(text: &str, release: &str) -> Option<Archive> {
    let text: String = text
        .lines()
        .filter(|line| !line.starts_with('#'))
        .map(|line| format!("{line}\n"))
        .collect();
    text.split("\n\n").find_map(|stanza| {
        let has = |name: &str, word: &str| {
            field(stanza, name).is_some_and(|value| value.split_whitespace().any(|w| w == word))
        };
        let wanted = has("Types", "deb")
            && has("Suites", release)
            && has("Components", "main")
            && !has("Enabled", "no");
        let uri = field(stanza, "URIs")?.split_whitespace().next()?.to_owned();
        wanted.then(|| Archive {
            uri,
            signed_by: field(stanza, "Signed-By"),
        })
    })
}

/// A field of a deb822 stanza with its continuation lines.
fn field(stanza: &str, name: &str) -> Option<String> {
    let mut lines = stanza.lines().skip_while(|line| {
        !line
            .split_once(':')
            .is_some_and(|(key, _)| key.eq_ignore_ascii_case(name))
    });
    let first = lines.next()?.split_once(':')?.1.trim();
    let rest = lines.take_while(|line| line.starts_with([' ', '\t']));
    Some(rest.fold(first.to_owned(), |value, line| format!("{value}\n{line}")))
}

fn from_one_line_style(text: &str, release: &str) -> Option<Archive> {
    text.lines().find_map(|line| {
        let rest = line.trim().strip_prefix("deb")?;
        let rest = rest.strip_prefix([' ', '\t'])?.trim_start();
        let (options, rest) = match rest.strip_prefix('[') {
            Some(rest) => rest.split_once(']')?,
            None => ("", rest),
        };
        let mut words = rest.split_whitespace();
        let uri = words.next()?.to_owned();
        let wanted = words.next()? == release && words.any(|word| word == "main");
        let signed_by = options
            .split_whitespace()
            .find_map(|option| option.strip_prefix("signed-by="))
            .map(|keys| keys.replace(',', " "));
        wanted.then_some(Archive { uri, signed_by })
    })
}

impl Archive {
    fn stanza(&self, suite: &str) -> String {
        let keys = self
            .signed_by
            .as_ref()
            .map(|keys| format!("Signed-By: {keys}\n"))
            .unwrap_or_default();
        format!(
            "Types: deb\nURIs: {}\nSuites: {suite}\nComponents: main\n{keys}",
            self.uri
        )
    }
}

impl<'a> PrivateApt<'a> {
    /// Fetches the package list of `suite` into `directory`.
    pub(super) fn update(archive: &Archive, suite: &str, directory: &'a Path) -> Result<Self> {
        for part in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(directory.join(part))?;
        }
        let here = directory.display();
        fs::write(directory.join("status"), "")?;
        fs::write(directory.join("suite.sources"), archive.stanza(suite))?;
        // Hooks of the system's apt clean the system's caches: not our business.
        let configuration = format!(
            "#clear APT::Update::Pre-Invoke;\n\
             #clear APT::Update::Post-Invoke;\n\
             #clear APT::Update::Post-Invoke-Success;\n\
             #clear Acquire::IndexTargets::deb::DEP-11;\n\
             #clear Acquire::IndexTargets::deb::DEP-11-icons;\n\
             #clear Acquire::IndexTargets::deb::DEP-11-icons-small;\n\
             #clear Acquire::IndexTargets::deb::DEP-11-icons-large;\n\
             APT::Sandbox::User \"\";\n\
             Acquire::Languages \"none\";\n\
             Dir::Etc::sourcelist \"{here}/suite.sources\";\n\
             Dir::Etc::sourceparts \"-\";\n\
             Dir::Etc::preferences \"-\";\n\
             Dir::Etc::preferencesparts \"-\";\n\
             Dir::State \"{here}\";\n\
             Dir::State::lists \"{here}/lists\";\n\
             Dir::State::status \"{here}/status\";\n\
             Dir::Cache \"{here}/cache\";\n"
        );
        fs::write(directory.join("apt.conf"), configuration)?;
        let apt = Self { directory };
        command::output(apt.command("apt-get").args(["update", "-qq"]))
            .with_context(|| format!("cannot read the suite {suite}"))?;
        Ok(apt)
    }

    /// The version of `package` in this suite.
    pub(super) fn version(&self, package: &str) -> Result<String> {
        let policy = command::output(self.command("apt-cache").args(["policy", package]))?;
        policy
            .lines()
            .find_map(|line| line.trim().strip_prefix("Candidate:"))
            .map(|version| version.trim().to_owned())
            .filter(|version| version != "(none)")
            .with_context(|| format!("no package {package}"))
    }

    /// Downloads `package` and unpacks it (installing nothing); answers where.
    pub(super) fn unpack(&self, package: &str) -> Result<PathBuf> {
        command::output(self.command("apt-get").args(["download", "-qq", package]))?;
        let deb = fs::read_dir(self.directory)?
            .flatten()
            .map(|entry| entry.path())
            .find(|path| path.extension().is_some_and(|suffix| suffix == "deb"))
            .with_context(|| format!("{package} was not downloaded"))?;
        let unpacked = self.directory.join("unpacked");
        command::output(
            Command::new("dpkg-deb")
                .arg("--extract")
                .arg(&deb)
                .arg(&unpacked),
        )?;
        Ok(unpacked)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command
            .arg("--config-file")
            .arg(self.directory.join("apt.conf"))
            .current_dir(self.directory)
            .stdin(Stdio::null());
        command
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_archive_is_the_stanza_with_our_suite() {
        let text = "\
Types: deb
# a comment
URIs: http://mirror.example/debian-security
Suites: bookworm-security
Components: main

Types: deb deb-src
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
";
        let archive = from_deb822(text, "bookworm").unwrap();
        assert_eq!(archive.uri, "http://mirror.example/debian");
        assert_eq!(
            archive.signed_by.as_deref(),
            Some("/usr/share/keyrings/debian-archive-keyring.gpg")
        );
    }

    #[test]
    fn keys_within_the_stanza_are_kept() {
        let text = "Types: deb\nURIs: http://mirror.example/debian\nSuites: stable\n\
                    Components: main\nSigned-By:\n -----BEGIN\n .\n abc\n";
        let archive = from_deb822(text, "stable").unwrap();
        assert_eq!(
            archive.signed_by.as_deref(),
            Some("\n -----BEGIN\n .\n abc")
        );
        assert!(
            archive
                .stanza("sid")
                .ends_with("Signed-By: \n -----BEGIN\n .\n abc\n")
        );
    }

    #[test]
    fn a_disabled_stanza_does_not_count() {
        let text = "Enabled: no\nTypes: deb\nURIs: http://mirror.example/debian\n\
                    Suites: bookworm\nComponents: main\n";
        assert_eq!(from_deb822(text, "bookworm"), None);
    }

    #[test]
    fn one_line_entries_are_understood() {
        let text = "\
# deb http://old.example/debian bookworm main
deb-src http://mirror.example/debian bookworm main
deb http://mirror.example/debian-security bookworm-security main
deb [arch=amd64 signed-by=/a.gpg,/b.gpg] http://mirror.example/debian bookworm contrib main
";
        let archive = from_one_line_style(text, "bookworm").unwrap();
        assert_eq!(archive.uri, "http://mirror.example/debian");
        assert_eq!(archive.signed_by.as_deref(), Some("/a.gpg /b.gpg"));
        assert_eq!(from_one_line_style(text, "trixie"), None);
    }

    #[test]
    fn an_entry_without_options_has_no_keys() {
        let archive = from_one_line_style("deb http://m.example/debian sid main\n", "sid").unwrap();
        assert_eq!(archive.signed_by, None);
        assert!(!archive.stanza("testing").contains("Signed-By"));
    }
}
