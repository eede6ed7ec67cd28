//! Replaces files atomically: a reader, or a crash at any moment, finds the old file or the new one.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use tempfile::{Builder, NamedTempFile};

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
    temporary: NamedTempFile,
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
        let mut builder = Builder::new();
        builder.prefix(".loralib-").suffix(".tmp");
        // The temporary file of an existing one is private until it has the old permissions.
        #[cfg(unix)]
        if old.is_none() {
            use std::os::unix::fs::PermissionsExt;
            builder.permissions(fs::Permissions::from_mode(0o666)); // less the umask
        }
        let mut temporary = builder.tempfile_in(folder_of(&target))?;
        fill(temporary.as_file_mut())?;
        if let Some(old) = old {
            temporary.as_file().set_permissions(old.permissions())?;
        }
        temporary.as_file().sync_all()?;
        Ok(Self { temporary, target })
    }

    /// Renames the file to its target and flushes the folder.
    pub fn commit(self) -> io::Result<()> {
        let folder = folder_of(&self.target).to_owned();
        self.rename()?;
        match File::open(folder) {
            Ok(folder) if cfg!(unix) => folder.sync_all(),
            // The file is in place: this is not a failed save.
            _ => Ok(()),
        }
    }

    /// [`Staged::commit`] without flushing the folder: for all but the last file of a folder.
    pub fn rename(self) -> io::Result<()> {
        self.temporary.persist(self.target)?;
        Ok(())
    }
}

/// The target of a chain of links, whether or not it exists.
pub(super) fn followed(path: &Path) -> io::Result<PathBuf> {
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

fn folder_of(target: &Path) -> &Path {
    match target.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}
