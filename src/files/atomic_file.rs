//! Replaces files atomically: a reader, or a crash at any moment, finds the old file or the new one.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Writes `bytes` to `path`, as [`replace_with`].
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    replace_with(path, |file| file.write_all(bytes))
}

/// Has `fill` write a temporary file in the folder of `path`, flushes it to disk and renames it. Links
/// are followed. An existing file's permissions are kept; a new file has those of any other new file.
pub(crate) fn replace_with<E: From<io::Error>>(
    path: &Path,
    fill: impl FnOnce(&mut File) -> Result<(), E>,
) -> Result<(), E> {
    Ok(Staged::new(path, fill)?.commit()?)
}

/// A complete file under a temporary name, which is removed on drop.
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
            let reason = "it exists and is not a file";
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

    /// Renames the file to its target and flushes the folder.
    pub fn commit(self) -> io::Result<()> {
        self.rename()?;
        sync_folder_of(&self.target)
    }

    /// [`Staged::commit`] without flushing the folder: for all but the last file of a folder.
    pub fn rename(&self) -> io::Result<()> {
        fs::rename(&self.temporary, &self.target)
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        // After a commit there is none; otherwise the error to report is that of the write.
        let _ = fs::remove_file(&self.temporary);
    }
}

/// The target of a chain of links, whether or not it exists.
fn followed(path: &Path) -> io::Result<PathBuf> {
    let mut target = path.to_owned();
    // Linux's limit.
    for _ in 0..40 {
        match fs::read_link(&target) {
            Ok(link) => target = target.parent().unwrap_or(Path::new("")).join(link),
            Err(_) => return Ok(target),
        }
    }
    Err(io::Error::other("too many links"))
}

/// A new file with a unique name in the folder of `target`.
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

/// The temporary file of an existing one is private until it has the old permissions.
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

/// Makes the rename durable, on systems that allow to flush a folder.
fn sync_folder_of(target: &Path) -> io::Result<()> {
    let folder = match target.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    match File::open(folder) {
        Ok(folder) if cfg!(unix) => folder.sync_all(),
        // The file is in place: this is not a failed save.
        _ => Ok(()),
    }
}
