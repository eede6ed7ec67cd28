//! What all ranks must have alike, in a form that can be sent and compared.

use crate::utils::fnv1a;
use crate::{Error, Result};
use candle_core::{DType, Device, Var};
use serde::Serialize;
use std::collections::BTreeMap;

/// The crate's version, the names, shapes, dtypes and values of variables, and what the caller adds.
///
/// Rank 0 broadcasts its [`to_json`](Self::to_json), and each rank [`check`](Self::check)s its own against it: at the
/// start, and after every so many steps. A rank that differs has to end the run, as `MPI_Abort` does.
///
/// ```
/// use candle_core::{Device, Var};
/// use loralib::train::Fingerprint;
/// # fn main() -> loralib::Result<()> {
/// let of = |values: &[f32]| {
///     let vars = [("q.lora_A".to_owned(), Var::new(values, &Device::Cpu)?)].into();
///     Fingerprint::new(&vars)?.with("seed", &7)
/// };
/// let first = of(&[1., 2.])?.to_json();
/// of(&[1., 2.])?.check(&first)?;
/// let error = of(&[1.])?.check(&first).unwrap_err().to_string();
/// assert!(error.contains("q.lora_A") && error.contains("[1] of F32"));
/// # Ok(()) }
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fingerprint {
    /// What is compared, with its description.
    entries: BTreeMap<String, String>,
}

/// The longest value that is compared as it is, and not by its hash.
const SHOWN: usize = 200;

impl Fingerprint {
    /// Of variables, such as those of [`Adapter::named_vars`](crate::Adapter::named_vars). Their values are
    /// copied from a device, and represented by a hash.
    ///
    /// # Errors
    /// If values cannot be copied.
    pub fn new(vars: &BTreeMap<String, Var>) -> Result<Self> {
        let mut entries = BTreeMap::new();
        entries.insert("loralib".to_owned(), env!("CARGO_PKG_VERSION").to_owned());
        for (name, var) in vars {
            // Exact for all float dtypes.
            let values = var.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_all()?;
            let values = values.to_vec1::<f64>()?.into_iter().flat_map(f64::to_le_bytes);
            let description =
                format!("{:?} of {:?}, values {:016x}", var.dims(), var.dtype(), fnv1a(values));
            entries.insert(format!("variable {name:?}"), description);
        }
        Ok(Self { entries })
    }

    /// Adds `value` under `name`: options, or the data. As JSON or, where that is long, by its length and hash.
    ///
    /// # Errors
    /// If it is not representable as JSON.
    pub fn with(mut self, name: &str, value: &impl Serialize) -> Result<Self> {
        let json = serde_json::to_string(value)
            .map_err(|e| Error::Invalid(format!("the fingerprint's {name:?}: {e}")))?;
        let value = match json.len() {
            ..=SHOWN => json,
            len => format!("{len} bytes of JSON, {:016x}", fnv1a(json.bytes())),
        };
        self.entries.insert(name.to_owned(), value);
        Ok(self)
    }

    /// As JSON, to be sent to the other ranks.
    pub fn to_json(&self) -> String {
        serde_json::json!(self.entries).to_string()
    }

    /// Compares with rank 0's [`to_json`](Self::to_json).
    ///
    /// # Errors
    /// If they differ: what differs, here and there. If `first` is no fingerprint.
    pub fn check(&self, first: &str) -> Result<()> {
        let first: BTreeMap<String, String> = serde_json::from_str(first)
            .map_err(|e| Error::Invalid(format!("rank 0's fingerprint: {e}")))?;
        let names = self.entries.keys().chain(first.keys());
        let mut differ = names.filter(|&name| self.entries.get(name) != first.get(name));
        let Some(name) = differ.next() else { return Ok(()) };
        let value = |of: &BTreeMap<String, String>| {
            of.get(name).cloned().unwrap_or_else(|| "nothing".to_owned())
        };
        let (here, there) = (value(&self.entries), value(&first));
        Err(Error::Invalid(format!(
            "this rank differs from rank 0: {name} is {here} here and {there} on rank 0"
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Tensor;

    fn of(names: &[(&str, &[usize], DType, f64)]) -> Result<Fingerprint> {
        let var = |(name, shape, dtype, value): &(&str, &[usize], DType, f64)| {
            let tensor = (Tensor::ones(*shape, *dtype, &Device::Cpu)? * *value)?;
            Ok((name.to_string(), Var::from_tensor(&tensor)?))
        };
        Fingerprint::new(&names.iter().map(var).collect::<Result<_>>()?)
    }

    #[test]
    fn each_difference_is_told() -> Result<()> {
        let dtype = DType::F32;
        let first = of(&[("a", &[2, 3], dtype, 1.)])?.with("data", &[1, 2])?.to_json();
        let cases = [
            (of(&[("b", &[2, 3], dtype, 1.)])?, vec!["\"b\"", "nothing on rank 0"]),
            (
                of(&[("a", &[2, 3], dtype, 1.), ("b", &[1], dtype, 1.)])?,
                vec!["\"b\"", "nothing on"],
            ),
            (of(&[("a", &[3, 2], dtype, 1.)])?, vec!["[3, 2] of F32", "[2, 3] of F32"]),
            (of(&[("a", &[2, 3], DType::BF16, 1.)])?, vec!["BF16"]),
            (of(&[("a", &[2, 3], dtype, 1.0000001)])?, vec!["values"]),
        ];
        for (other, expected) in cases {
            let error = other.with("data", &[1, 2])?.check(&first).unwrap_err().to_string();
            assert!(expected.iter().all(|part| error.contains(part)), "{error}");
        }
        let same = of(&[("a", &[2, 3], dtype, 1.)])?;
        same.clone().with("data", &[1, 2])?.check(&first)?;
        let error = same.with("data", &[1, 3])?.check(&first).unwrap_err().to_string();
        assert!(error.contains("data is [1,3] here and [1,2] on rank 0"), "{error}");
        Ok(())
    }

    #[test]
    fn long_values_are_compared_by_their_hash() -> Result<()> {
        let of = |last: u32| of(&[])?.with("data", &[vec![7; 1000], vec![last]].concat());
        assert!(of(1)?.to_json().len() < 200);
        of(1)?.check(&of(1)?.to_json())?;
        assert!(of(1)?.check(&of(2)?.to_json()).is_err());
        Ok(())
    }
}
