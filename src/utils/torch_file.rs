//! Checkpoints that `torch.save` wrote: a zip archive of a pickle and of the tensors' storages.

use super::pickle::{Id, Object, Pickle};
use super::state_dict::{check_finite, StateDict};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use std::collections::HashMap;
use std::io::{Cursor, Read};
use zip::{CompressionMethod, ZipArchive};

/// Whether these are the first bytes of a file in one of torch's two formats.
pub(super) fn is_torch(bytes: &[u8]) -> bool {
    bytes.starts_with(b"PK\x03\x04") || is_legacy(bytes)
}

/// What torch wrote before version 1.6: several pickles, the first of them a magic number.
fn is_legacy(bytes: &[u8]) -> bool {
    bytes.starts_with(b"\x80\x02\x8a\x0a")
}

/// The tensors of a state dict. They share memory as they did when they were saved.
pub(super) fn parse(bytes: &[u8], device: &Device) -> Result<StateDict> {
    if is_legacy(bytes) {
        return Err(malformed("the format of torch before 1.6: load and save it with a newer one"));
    }
    let mut archive = Archive::open(bytes)?;
    let data = archive.read("data.pkl")?;
    let (pickle, root) = Pickle::read(&data).map_err(malformed)?;
    let Object::Dict(items) = pickle.get(root) else {
        return Err(malformed(format!("it holds {}, not a state dict", kind(pickle.get(root)))));
    };
    let (mut storages, mut tensors) = (HashMap::new(), StateDict::new());
    for &(key, value) in items {
        let Object::Text(name) = *pickle.get(key) else {
            return Err(malformed(format!("an entry named by {}", kind(pickle.get(key)))));
        };
        let mut read = || {
            let view = view(&pickle, value)?;
            if !storages.contains_key(view.storage) {
                let storage = archive.storage(&view, device)?;
                storages.insert(view.storage.to_owned(), storage);
            }
            let Some(storage) = storages.get(view.storage) else { return Err("lost".to_owned()) };
            view.tensor(storage)
        };
        let tensor = read().map_err(|reason| Error::tensor(name, reason))?;
        check_finite(name, &tensor)?;
        if tensors.insert(name.to_owned(), tensor).is_some() {
            return Err(Error::tensor(name, "the file has it twice"));
        }
    }
    Ok(tensors)
}

fn malformed(reason: impl ToString) -> Error {
    Error::Format { format: "torch", reason: reason.to_string() }
}

/// The entries of an archive, all of which lie uncompressed in one folder.
struct Archive<'a> {
    zip: ZipArchive<Cursor<&'a [u8]>>,
    folder: String,
    /// How many bytes there are to read. Entries that overlap would give more than the file has.
    left: u64,
}

impl<'a> Archive<'a> {
    fn open(bytes: &'a [u8]) -> Result<Self> {
        let zip = ZipArchive::new(Cursor::new(bytes)).map_err(malformed)?;
        let names: std::result::Result<Vec<_>, _> = zip.file_names().collect();
        let names = names.map_err(malformed)?;
        let mut folders = names.iter().filter_map(|name| name.strip_suffix("data.pkl"));
        let folder = match (folders.next(), folders.next()) {
            (Some(folder), None) => folder.to_owned(),
            _ => return Err(malformed("a zip archive without exactly one data.pkl")),
        };
        drop(names);
        let mut archive = Self { zip, folder, left: bytes.len() as u64 };
        let order = format!("{}byteorder", archive.folder);
        if archive.zip.index_for_name(&order).is_some()
            && archive.read("byteorder")?.trim_ascii() != b"little"
        {
            return Err(malformed("numbers that are not little-endian"));
        }
        Ok(archive)
    }

    fn read(&mut self, name: &str) -> Result<Vec<u8>> {
        let failed = |e: &dyn ToString| malformed(format!("{name}: {}", e.to_string()));
        let entry = self.zip.by_name(&format!("{}{name}", self.folder)).map_err(|e| failed(&e))?;
        if entry.compression() != CompressionMethod::Stored {
            return Err(failed(&"it is compressed"));
        }
        let size = entry.size();
        self.left = match self.left.checked_sub(size) {
            Some(left) => left,
            None => return Err(failed(&"it is larger than what is left of the file")),
        };
        let mut bytes = Vec::with_capacity(size as usize);
        entry.take(size + 1).read_to_end(&mut bytes).map_err(|e| failed(&e))?;
        if bytes.len() as u64 != size {
            return Err(failed(&format!("it has {} bytes instead of {size}", bytes.len())));
        }
        Ok(bytes)
    }

    /// A whole storage, in one dimension.
    fn storage(&mut self, view: &View, device: &Device) -> std::result::Result<Tensor, String> {
        let bytes = self.read(&format!("data/{}", view.storage)).map_err(|e| e.to_string())?;
        if view.stored.checked_mul(view.dtype.size_in_bytes()) != Some(bytes.len()) {
            let (n, dtype) = (view.stored, view.dtype);
            return Err(format!("{} bytes for {n} values of {dtype:?}", bytes.len()));
        }
        let storage = Tensor::from_raw_buffer(&bytes, view.dtype, &[view.stored], device);
        storage.map_err(|e| e.to_string())
    }
}

/// Where a tensor lies in its storage.
#[derive(Debug)]
struct View<'a> {
    storage: &'a str,
    dtype: DType,
    /// The number of values in the storage.
    stored: usize,
    offset: usize,
    dims: Vec<usize>,
    strides: Vec<usize>,
}

/// Reads `_rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks)`, also as a
/// parameter's data.
fn view<'a>(pickle: &Pickle<'a>, id: Id) -> std::result::Result<View<'a>, String> {
    let (mut call, mut args) = call(pickle, id)?;
    if let (("torch._utils", "_rebuild_parameter"), [data, ..]) = (call, args) {
        (call, args) = self::call(pickle, *data)?;
    }
    let ("torch._utils", "_rebuild_tensor_v2") = call else {
        return Err(format!("an object of {}.{}, not a tensor", call.0, call.1));
    };
    let [storage, offset, size, stride, _, _] = args else {
        return Err(format!("a tensor of {} arguments instead of 6", args.len()));
    };
    let number = |id: &Id| match *pickle.get(*id) {
        Object::Int(n) => usize::try_from(n).map_err(|_| format!("a size of {n}")),
        ref other => Err(format!("{} for a size", kind(other))),
    };
    let numbers = |id: &Id| match pickle.get(*id) {
        Object::Tuple(ids) => ids.iter().map(number).collect::<std::result::Result<Vec<_>, _>>(),
        other => Err(format!("{} for a shape", kind(other))),
    };
    let storage = match pickle.get(*storage) {
        Object::Persistent(key) => pickle.get(*key),
        other => other,
    };
    let Object::Tuple(parts) = storage else { return Err("a tensor without a storage".into()) };
    let [_, class, key, _, stored] = parts[..] else { return Err("a storage like none".into()) };
    let (&Object::Class(_, class), &Object::Text(key)) = (pickle.get(class), pickle.get(key))
    else {
        return Err("a storage without a type or a key".into());
    };
    let dtype = match class {
        "DoubleStorage" => DType::F64,
        "FloatStorage" => DType::F32,
        "HalfStorage" => DType::F16,
        "BFloat16Storage" => DType::BF16,
        "LongStorage" => DType::I64,
        "IntStorage" => DType::I32,
        "ShortStorage" => DType::I16,
        "ByteStorage" => DType::U8,
        _ => return Err(format!("values of torch.{class}, which candle has no type for")),
    };
    Ok(View {
        storage: key,
        dtype,
        stored: number(&stored)?,
        offset: number(offset)?,
        dims: numbers(size)?,
        strides: numbers(stride)?,
    })
}

type Call<'a, 'p> = ((&'a str, &'a str), &'p [Id]);

fn call<'a, 'p>(pickle: &'p Pickle<'a>, id: Id) -> std::result::Result<Call<'a, 'p>, String> {
    let Object::Call(class, args) = pickle.get(id) else {
        return Err(format!("{}, not a tensor", kind(pickle.get(id))));
    };
    match (pickle.get(*class), pickle.get(*args)) {
        (&Object::Class(module, name), Object::Tuple(args)) => Ok(((module, name), args)),
        _ => Err("a call of what is no class".to_owned()),
    }
}

impl View<'_> {
    /// The tensor, in any order of its dimensions; one with gaps between its values is an error.
    fn tensor(&self, storage: &Tensor) -> std::result::Result<Tensor, String> {
        let Self { dims, strides, offset, stored, dtype, .. } = self;
        let fits = || {
            if dims.len() != strides.len() || storage.dtype() != *dtype {
                return None;
            }
            let count = super::state_dict::elements(dims)?;
            (offset.checked_add(count)? <= storage.elem_count()).then_some(count)
        };
        let Some(count) = fits() else {
            return Err(format!(
                "a shape {dims:?}, strides {strides:?} and offset {offset} in a storage of \
                 {stored} {dtype:?}"
            ));
        };
        let mut order: Vec<usize> = (0..dims.len()).collect();
        order.sort_by_key(|&d| (std::cmp::Reverse(strides[d]), dims[d] != 1));
        let mut dense = 1;
        for &d in order.iter().rev() {
            if dims[d] > 1 && strides[d] != dense && count > 0 {
                return Err(format!(
                    "gaps between its values: shape {dims:?}, strides {strides:?}"
                ));
            }
            dense *= dims[d].max(1);
        }
        let read = || {
            let ordered: Vec<usize> = order.iter().map(|&d| dims[d]).collect();
            let mut places = vec![0; order.len()];
            order.iter().enumerate().for_each(|(place, &d)| places[d] = place);
            storage.narrow(0, *offset, count)?.reshape(ordered)?.permute(places)
        };
        read().map_err(|e| e.to_string())
    }
}

fn kind(object: &Object) -> &'static str {
    match object {
        Object::None => "None",
        Object::Bool => "a bool",
        Object::Float | Object::Int(_) => "a number",
        Object::Text(_) => "a string",
        Object::Class(..) => "a class",
        Object::Tuple(_) => "a tuple",
        Object::List => "a list",
        Object::Dict(_) => "a dict",
        Object::Call(..) | Object::Persistent(_) => "an object",
    }
}
