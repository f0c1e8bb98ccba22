//! Files that a reader finds either whole or not at all: written beside their
//! place, flushed to the disk, then moved there.

use std::{
    fs::{File, Permissions},
    io::{self, Write},
    os::unix::fs::PermissionsExt,
    path::Path,
};

use tempfile::NamedTempFile;

/// Every temporary file's name begins so; readers of a directory pass over it.
pub(crate) const TEMPORARY_PREFIX: &str = ".new-";

/// Puts `content` at `path` in place of whatever is there. A new file gets mode
/// 0644 whatever the umask, an existing one keeps its mode.
pub(crate) fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    let mode = match path.metadata() {
        Ok(existing) => existing.permissions().mode() & 0o7777,
        Err(error) if error.kind() == io::ErrorKind::NotFound => 0o644,
        Err(error) => return Err(error),
    };
    let directory = directory_of(path)?;
    staged(directory, content, mode)?
        .persist(path)
        .map_err(|error| error.error)?;
    sync(directory)
}

/// Puts `content` at `path` unless something is there already; that is
/// [`io::ErrorKind::AlreadyExists`], and of several callers one succeeds.
pub(crate) fn create(path: &Path, content: &[u8]) -> io::Result<()> {
    let directory = directory_of(path)?;
    staged(directory, content, 0o644)?
        .persist_noclobber(path)
        .map_err(|error| error.error)?;
    sync(directory)
}

fn staged(directory: &Path, content: &[u8], mode: u32) -> io::Result<NamedTempFile> {
    let mut file = tempfile::Builder::new()
        .prefix(TEMPORARY_PREFIX)
        .tempfile_in(directory)?;
    file.write_all(content)?;
    file.as_file()
        .set_permissions(Permissions::from_mode(mode))?;
    file.as_file().sync_all()?;
    Ok(file)
}

fn directory_of(path: &Path) -> io::Result<&Path> {
    match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Ok(Path::new(".")),
        Some(parent) => Ok(parent),
        None => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{} names no file", path.display()),
        )),
    }
}

/// The new name itself must survive a power cut too.
fn sync(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn names(directory: &Path) -> Vec<String> {
        let entries = fs::read_dir(directory).expect("readable");
        entries
            .map(|entry| {
                let name = entry.expect("readable").file_name();
                name.into_string().expect("UTF-8")
            })
            .collect()
    }

    #[test]
    fn replacing_leaves_one_file_and_keeps_its_mode() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("a");
        replace(&path, b"one").expect("written");
        let mode = || path.metadata().expect("there").permissions().mode() & 0o7777;
        assert_eq!(mode(), 0o644);
        fs::set_permissions(&path, Permissions::from_mode(0o600)).expect("own file");
        replace(&path, b"two").expect("written");
        assert_eq!(mode(), 0o600);
        assert_eq!(fs::read(&path).expect("readable"), b"two");
        assert_eq!(names(directory.path()), ["a"]);
    }

    #[test]
    fn creating_never_overwrites_and_leaves_no_rest() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("a");
        create(&path, b"one").expect("written");
        let error = create(&path, b"two").expect_err("taken");
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(fs::read(&path).expect("readable"), b"one");
        assert_eq!(names(directory.path()), ["a"]);
    }
}
