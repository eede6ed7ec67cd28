//! A folder of tensors and their configuration, replaced file by file.

use super::atomic_file::Staged;
use crate::{Error, Result};
use std::path::Path;
use std::{fs, io, io::Write};

/// Replaces both files of a folder, each (name, contents) and each complete or not at all. If the configuration
/// changes, its old file is removed before the tensors are replaced: the new tensors are never read with it. An
/// error of a write has the file's name.
pub(crate) fn replace(dir: &Path, tensors: (&str, &[u8]), config: (&str, &[u8])) -> Result<()> {
    fs::create_dir_all(dir)?;
    let path = dir.join(config.0);
    let same = fs::read(&path).is_ok_and(|old| old == config.1);
    let stage = |(name, bytes): (&str, &[u8])| {
        let staged = Staged::new(&dir.join(name), |file| file.write_all(bytes));
        staged.map_err(|e: io::Error| Error::from(e).at(Path::new(name)))
    };
    let (tensors, config) = (stage(tensors)?, stage(config)?);
    if !same {
        remove(&path)?;
    }
    tensors.rename()?;
    Ok(config.commit()?)
}

/// Removes a file if it is there.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}
