//! Replacing a file so that a reader, or a crash at any moment, finds the old one or the new one.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Writes `bytes` to `path`, as [`replace_with`].
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    replace_with(path, |file| file.write_all(bytes))
}

/// Writes what `fill` writes to `path`: to a temporary file in the same folder, flushed to the disk,
/// then renamed. A link is followed. The file keeps its mode; a new one has that of any other new
/// file.
pub(crate) fn replace_with<E: From<io::Error>>(
    path: &Path,
    fill: impl FnOnce(&mut File) -> Result<(), E>,
) -> Result<(), E> {
    Ok(Staged::new(path, fill)?.commit()?)
}

/// A file that is complete and on the disk, under a temporary name that goes when this does.
#[derive(Debug)]
pub(crate) struct Staged {
    temporary: PathBuf,
    target: PathBuf,
}

impl Staged {
    pub fn new<E: From<io::Error>>(
        path: &Path,
        fill: impl FnOnce(&mut File) -> Result<(), E>,
    ) -> Result<Self, E> {
        let target = followed(path)?;
        let old = fs::metadata(&target).ok();
        if old.as_ref().is_some_and(|old| !old.is_file()) {
            let reason = "there is something else than a file";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, reason).into());
        }
        let (temporary, mut file) = create_beside(&target, old.as_ref())?;
        let staged = Self { temporary, target };
        fill(&mut file)?;
        if let Some(old) = old {
            file.set_permissions(old.permissions())?;
        }
        file.sync_all()?;
        Ok(staged)
    }

    /// Puts the file in its place.
    pub fn commit(self) -> io::Result<()> {
        self.rename()?;
        sync_folder_of(&self.target)
    }

    /// [`Staged::commit`] without waiting for the disk: for all but the last of a folder.
    pub fn rename(&self) -> io::Result<()> {
        fs::rename(&self.temporary, &self.target)
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        // After a commit it is not there; else the error that matters is the one of the write.
        let _ = fs::remove_file(&self.temporary);
    }
}

/// What a chain of links ends in, whether or not that exists.
fn followed(path: &Path) -> io::Result<PathBuf> {
    let mut target = path.to_owned();
    // As many links as Linux follows.
    for _ in 0..40 {
        match fs::read_link(&target) {
            Ok(link) => target = target.parent().unwrap_or(Path::new("")).join(link),
            Err(_) => return Ok(target),
        }
    }
    Err(io::Error::other("too many links"))
}

/// A new file of a name that no other save uses, in the folder of `target`.
fn create_beside(target: &Path, old: Option<&Metadata>) -> io::Result<(PathBuf, File)> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    if target.file_name().is_none() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the path names no file"));
    }
    loop {
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!(".loralib-{}-{count}.tmp", std::process::id());
        let temporary = target.with_file_name(name);
        match options(old).write(true).create_new(true).open(&temporary) {
            Ok(file) => return Ok((temporary, file)),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(e),
        }
    }
}

/// Nobody may read the new contents who may not read the old ones, at any moment.
fn options(old: Option<&Metadata>) -> OpenOptions {
    let mut options = OpenOptions::new();
    #[cfg(unix)]
    if old.is_some() {
        use std::os::unix::fs::OpenOptionsExt;
        options.mode(0o600);
    }
    let _ = old;
    options
}

/// Makes the rename itself durable, where the system lets a folder be opened for it.
fn sync_folder_of(target: &Path) -> io::Result<()> {
    let folder = match target.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    match File::open(folder) {
        Ok(folder) if cfg!(unix) => folder.sync_all(),
        // The file is in place: what is left undone is no reason to report a failed save.
        _ => Ok(()),
    }
}
