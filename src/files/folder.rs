//! A folder of tensors and their configuration, replaced file by file.

use super::atomic_file::{followed, Staged};
use crate::{Error, Result};
use std::path::Path;
use std::{fs, io, io::Write};

/// Replaces both files of a folder, each (name, contents) and each complete or not at all. If the configuration
/// changes, its old file is removed before the tensors are replaced: the new tensors are never read with it. An
/// error of a write has the file's name.
///
/// Two writers of a folder at a time may each replace a file of the other's: one that does not find its own files then
/// writes them again, so that both are of one writer in the end.
pub(crate) fn replace(dir: &Path, tensors: (&str, &[u8]), config: (&str, &[u8])) -> Result<()> {
    fs::create_dir_all(dir)?;
    let is_there =
        |(name, bytes): (&str, &[u8])| fs::read(dir.join(name)).is_ok_and(|found| found == bytes);
    for _ in 0..100 {
        replace_once(dir, tensors, config)?;
        if is_there(config) && is_there(tensors) && is_there(config) {
            return Ok(());
        }
    }
    Err(Error::Invalid("another process writes this folder all the time".to_owned()))
}

fn replace_once(dir: &Path, tensors: (&str, &[u8]), config: (&str, &[u8])) -> Result<()> {
    // What a link leads to is replaced, and the link stays.
    let path = followed(&dir.join(config.0))?;
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
