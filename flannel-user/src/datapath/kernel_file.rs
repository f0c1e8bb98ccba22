//! Small files in which the kernel tells something, read again and again.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    sync::OnceLock,
};

/// The most that is read: a page, as the kernel writes them.
const MOST: usize = 4096;

/// One of them. It stays open once it was there: looking a path up and opening it costs several
/// times what reading does. Of the network namespace in which it was opened.
#[derive(Debug)]
pub(super) struct KernelFile {
    path: PathBuf,
    open: OnceLock<File>,
}

/// A copy opens it for itself, wherever it is then.
impl Clone for KernelFile {
    fn clone(&self) -> Self {
        Self::at(&self.path)
    }
}

impl KernelFile {
    /// Opens nothing yet.
    #[must_use]
    pub(super) fn at(path: impl AsRef<Path>) -> Self {
        Self {
            path: path.as_ref().to_owned(),
            open: OnceLock::new(),
        }
    }

    /// Its text now; of a long one the first page.
    ///
    /// # Errors
    /// It is not there, or is no text.
    pub(super) fn read(&self) -> io::Result<String> {
        // The one that was opened may have gone with its module and come again.
        if let Some(Ok(text)) = self.open.get().map(read_page) {
            return Ok(text);
        }
        let file = File::open(&self.path)?;
        let text = read_page(&file)?;
        let _ = self.open.set(file);
        Ok(text)
    }
}

fn read_page(file: &File) -> io::Result<String> {
    let mut page = [0; MOST];
    let length = file.read_at(&mut page, 0)?;
    let text = std::str::from_utf8(&page[..length]);
    text.map(str::to_owned)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn every_reading_is_of_what_stands_there_now() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("setting");
        let file = KernelFile::at(&path);
        assert_eq!(
            file.read().expect_err("none").kind(),
            io::ErrorKind::NotFound
        );
        for text in ["1\n", "432000\n", "0\n"] {
            fs::write(&path, text).expect("written");
            assert_eq!(file.read().expect("there"), text);
        }
    }

    #[test]
    fn the_kernels_own_can_be_read_twice() {
        for path in ["/proc/sys/kernel/ostype", "/proc/thread-self/net/dev"] {
            let file = KernelFile::at(path);
            let text = file.read().expect("there");
            assert!(!text.is_empty(), "{path}");
            let first = |text: &str| text.lines().next().map(str::to_owned);
            assert_eq!(first(&file.read().expect("again")), first(&text), "{path}");
        }
    }
}
