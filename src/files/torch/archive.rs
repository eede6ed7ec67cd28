//! The zip archive of a torch file: a pickle and a file of bytes for each storage.

use super::tensor::View;
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use std::io::{Cursor, Read};
use zip::{CompressionMethod, ZipArchive};

/// The entries of an archive, all uncompressed in one folder.
pub(super) struct Archive<'a> {
    zip: ZipArchive<Cursor<&'a [u8]>>,
    folder: String,
    /// The number of bytes that may still be read. Overlapping entries would exceed the file's size.
    left: u64,
}

impl<'a> Archive<'a> {
    pub fn open(bytes: &'a [u8]) -> Result<Self> {
        let zip = ZipArchive::new(Cursor::new(bytes)).map_err(malformed)?;
        let names: std::result::Result<Vec<_>, _> = zip.file_names().collect();
        let names = names.map_err(malformed)?;
        let mut folders = names.iter().filter_map(|name| name.strip_suffix("data.pkl"));
        let folder = match (folders.next(), folders.next()) {
            (Some(folder), None) => folder.to_owned(),
            _ => return Err(malformed("the zip archive does not have exactly one data.pkl")),
        };
        drop(names);
        let mut archive = Self { zip, folder, left: bytes.len() as u64 };
        let order = format!("{}byteorder", archive.folder);
        if archive.zip.index_for_name(&order).is_some()
            && archive.read("byteorder")?.trim_ascii() != b"little"
        {
            return Err(malformed("its numbers are not little-endian"));
        }
        Ok(archive)
    }

    pub fn read(&mut self, name: &str) -> Result<Vec<u8>> {
        let failed = |e: &dyn ToString| malformed(format!("{name}: {}", e.to_string()));
        let entry = self.zip.by_name(&format!("{}{name}", self.folder)).map_err(|e| failed(&e))?;
        if entry.compression() != CompressionMethod::Stored {
            return Err(failed(&"it is compressed"));
        }
        let size = entry.size();
        self.left = match self.left.checked_sub(size) {
            Some(left) => left,
            None => return Err(failed(&"it exceeds the size of the file")),
        };
        let mut bytes = Vec::with_capacity(size as usize);
        entry.take(size + 1).read_to_end(&mut bytes).map_err(|e| failed(&e))?;
        if bytes.len() as u64 != size {
            return Err(failed(&format!("it has {} bytes instead of {size}", bytes.len())));
        }
        Ok(bytes)
    }

    /// A whole storage, in one dimension.
    pub fn storage(&mut self, view: &View, device: &Device) -> std::result::Result<Tensor, String> {
        let bytes = self.read(&format!("data/{}", view.storage)).map_err(|e| e.to_string())?;
        if view.stored.checked_mul(view.dtype.size_in_bytes()) != Some(bytes.len()) {
            let (n, dtype) = (view.stored, view.dtype);
            return Err(format!(
                "its storage has {} bytes, expected {n} values of {dtype:?}",
                bytes.len()
            ));
        }
        let storage = Tensor::from_raw_buffer(&bytes, view.dtype, &[view.stored], device);
        storage.map_err(|e| e.to_string())
    }
}

pub(super) fn malformed(reason: impl ToString) -> Error {
    Error::Format { format: "torch", reason: reason.to_string() }
}
