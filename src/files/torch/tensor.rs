//! A tensor of a torch file, which is a view of a storage.

use super::object::{Id, Object};
use super::pickle::Pickle;
use crate::ops::checked_elem_count;
use candle_core::{DType, Tensor};

type Result<T> = std::result::Result<T, String>;

/// The position of a tensor in its storage.
#[derive(Debug)]
pub(super) struct View<'a> {
    pub storage: &'a str,
    pub dtype: DType,
    /// The number of values in the storage.
    pub stored: usize,
    offset: usize,
    dims: Vec<usize>,
    strides: Vec<usize>,
}

impl<'a> View<'a> {
    /// Reads `_rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks)`, also as a
    /// parameter's data.
    pub fn read(pickle: &Pickle<'a>, id: Id) -> Result<Self> {
        let (mut call, mut args) = call(pickle, id)?;
        if let (("torch._utils", "_rebuild_parameter"), [data, ..]) = (call, args) {
            (call, args) = self::call(pickle, *data)?;
        }
        // How torch writes dtypes without a class of storage: float8 and unsigned ones.
        if let (("torch._utils", "_rebuild_tensor_v3"), [.., dtype]) = (call, args) {
            let dtype = match pickle.get(*dtype) {
                Object::Class(_, name) => name,
                other => other.kind(),
            };
            return Err(format!(
                "its dtype torch.{dtype} is not read: convert it by `.float()` before it is saved"
            ));
        }
        let ("torch._utils", "_rebuild_tensor_v2") = call else {
            return Err(format!("it is an object of {}.{}, expected a tensor", call.0, call.1));
        };
        let [storage, offset, size, stride, _, _] = args else {
            return Err(format!("it has {} arguments, expected 6", args.len()));
        };
        let number = |id: &Id| match *pickle.get(*id) {
            Object::Int(n) => usize::try_from(n).map_err(|_| format!("a size is {n}")),
            ref other => Err(format!("a size is {}", other.kind())),
        };
        let numbers = |id: &Id| match pickle.get(*id) {
            Object::Tuple(ids) => ids.iter().map(number).collect::<Result<Vec<_>>>(),
            other => Err(format!("its shape is {}", other.kind())),
        };
        let storage = match pickle.get(*storage) {
            Object::Persistent(key) => pickle.get(*key),
            other => other,
        };
        let Object::Tuple(parts) = storage else { return Err("it has no storage".into()) };
        let [_, class, key, _, stored] = parts[..] else {
            return Err("its storage is malformed".into());
        };
        let (&Object::Class(_, class), &Object::Text(key)) = (pickle.get(class), pickle.get(key))
        else {
            return Err("its storage has no type or key".into());
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
            _ => {
                return Err(format!(
                    "its values are a torch.{class}, which candle has no dtype for"
                ))
            }
        };
        Ok(Self {
            storage: key,
            dtype,
            stored: number(&stored)?,
            offset: number(offset)?,
            dims: numbers(size)?,
            strides: numbers(stride)?,
        })
    }

    /// The tensor, with its dimensions in any order. Gaps between its values are an error.
    pub fn tensor(&self, storage: &Tensor) -> Result<Tensor> {
        let Self { dims, strides, offset, stored, dtype, .. } = self;
        let fits = || {
            if dims.len() != strides.len() || storage.dtype() != *dtype {
                return None;
            }
            let count = checked_elem_count(dims)?;
            (offset.checked_add(count)? <= storage.elem_count()).then_some(count)
        };
        let Some(count) = fits() else {
            return Err(format!(
                "the shape {dims:?}, strides {strides:?} and offset {offset} exceed its storage of \
                 {stored} {dtype:?}"
            ));
        };
        let mut order: Vec<usize> = (0..dims.len()).collect();
        order.sort_by_key(|&d| (std::cmp::Reverse(strides[d]), dims[d] != 1));
        let mut dense = 1;
        for &d in order.iter().rev() {
            if dims[d] > 1 && strides[d] != dense && count > 0 {
                return Err(format!("its values have gaps: shape {dims:?}, strides {strides:?}"));
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

type Call<'a, 'p> = ((&'a str, &'a str), &'p [Id]);

fn call<'a, 'p>(pickle: &'p Pickle<'a>, id: Id) -> Result<Call<'a, 'p>> {
    let Object::Call(class, args) = pickle.get(id) else {
        return Err(format!("it is {}, expected a tensor", pickle.get(id).kind()));
    };
    match (pickle.get(*class), pickle.get(*args)) {
        (&Object::Class(module, name), Object::Tuple(args)) => Ok(((module, name), args)),
        _ => Err("an object that is not a class is called".to_owned()),
    }
}
