//! A folder of tensors and their configuration, replaced file by file.

use super::atomic_file::Staged;
use std::path::Path;
use std::{fs, io, io::Write};

/// Replaces both files of a folder, each (name, contents) and each complete or not at all. If the configuration
/// changes, its old file is removed before the tensors are replaced: the new tensors are never read with it.
pub(crate) fn replace(dir: &Path, tensors: (&str, &[u8]), config: (&str, &[u8])) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    let path = dir.join(config.0);
    let same = fs::read(&path).is_ok_and(|old| old == config.1);
    let tensors = Staged::new(&dir.join(tensors.0), |file| file.write_all(tensors.1))?;
    let config = Staged::new(&path, |file| file.write_all(config.1))?;
    if !same {
        remove(&path)?;
    }
    tensors.rename()?;
    config.commit()
}

/// Removes a file if it is there.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}
