//! What all ranks must have alike, in a form that can be sent and compared.

use crate::{Error, Result};
use blake3::{Hash, Hasher};
use candle_core::{DType, Device, Var};
use serde::Serialize;
use serde_json::Value;
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::Path;

/// The crate's version, the names, shapes, dtypes and values of variables, and what the caller adds.
///
/// Rank 0 broadcasts its [`to_json`](Self::to_json), and each rank [`check`](Self::check)s its own against it: at the
/// start, and after every so many steps. A rank that differs has to end the run. Where an engine only sums, rank 0
/// gives the text's bytes as numbers, and the other ranks zeros.
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
/// of(&[1., 2.])?.check(&first, "rank 0")?;
/// let error = of(&[1.])?.check(&first, "rank 0").unwrap_err().to_string();
/// assert!(error.contains("q.lora_A") && error.contains("[1] of F32"));
/// # Ok(()) }
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Fingerprint {
    /// What is compared, with its description.
    entries: BTreeMap<String, String>,
}

/// The longest value that is compared as it is, and not by its hash.
const SHOWN: usize = 200;

/// The differences that an error names.
const NAMED: usize = 3;

impl Fingerprint {
    /// Of variables, such as those of [`Adapter::named_vars`](crate::Adapter::named_vars), and of the crate's version;
    /// [`default`](Self::default) has neither. The values are copied from a device, and represented by a hash. The
    /// frozen base is compared if its files are added by [`with_file`](Self::with_file).
    ///
    /// # Errors
    /// If values cannot be copied.
    pub fn new(vars: &BTreeMap<String, Var>) -> Result<Self> {
        let mut entries = BTreeMap::new();
        entries.insert("loralib".to_owned(), env!("CARGO_PKG_VERSION").to_owned());
        for (name, var) in vars {
            // Exact for all float dtypes.
            let values = var.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_all()?;
            let values: Vec<u8> =
                values.to_vec1::<f64>()?.into_iter().flat_map(f64::to_le_bytes).collect();
            let hash = short(blake3::hash(&values));
            let description = format!("{:?} of {:?}, values {hash}", var.dims(), var.dtype());
            entries.insert(format!("variable {name:?}"), description);
        }
        Ok(Self { entries })
    }

    /// Adds `value` under `name`: options, or the data. Each field of an object is an entry of its own, as JSON or,
    /// where that is long, by its length and hash. NaN and infinities are `null` in JSON, and so are equal.
    ///
    /// # Errors
    /// If it is not representable as JSON, or the name is there already.
    pub fn with(mut self, name: &str, value: &impl Serialize) -> Result<Self> {
        // A value's fields are sorted, unlike those of a `HashMap`.
        let value = serde_json::to_value(value)
            .map_err(|e| Error::Invalid(format!("the fingerprint's {name:?}: {e}")))?;
        self.add(name.to_owned(), value)?;
        Ok(self)
    }

    /// Adds the content of a file under `name`, by its length and the first digits of its BLAKE3 hash: of the base, or
    /// of a checkpoint that is resumed. It is read in parts, and may be larger than memory.
    ///
    /// # Errors
    /// If it cannot be read, or the name is there already.
    pub fn with_file(mut self, name: &str, path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let mut hasher = Hasher::new();
        let read = File::open(path).and_then(|file| hasher.update_reader(file).map(|_| ()));
        read.map_err(|e| Error::from(e).at(path))?;
        let (len, hash) = (hasher.count(), short(hasher.finalize()));
        self.insert(name.to_owned(), format!("a file of {len} bytes, {hash}"))?;
        Ok(self)
    }

    fn add(&mut self, name: String, value: Value) -> Result<()> {
        if let Value::Object(fields) = value {
            return fields
                .into_iter()
                .try_for_each(|(key, value)| self.add(format!("{name}.{key}"), value));
        }
        let json = value.to_string();
        let value = match json.len() {
            ..=SHOWN => json,
            len => format!("{len} bytes of JSON, {}", short(blake3::hash(json.as_bytes()))),
        };
        self.insert(name, value)
    }

    fn insert(&mut self, name: String, description: String) -> Result<()> {
        match self.entries.entry(name) {
            Entry::Vacant(entry) => entry.insert(description),
            Entry::Occupied(entry) => {
                let reason = format!("the fingerprint has {:?} already", entry.key());
                return Err(Error::Invalid(reason));
            }
        };
        Ok(())
    }

    /// As JSON, to be sent to the other ranks, or saved with a checkpoint.
    pub fn to_json(&self) -> String {
        serde_json::json!(self.entries).to_string()
    }

    /// Compares with the [`to_json`](Self::to_json) of `whose`, such as `"rank 0"`.
    ///
    /// # Errors
    /// If they differ: what differs, here and there. If `other` is no fingerprint.
    pub fn check(&self, other: &str, whose: &str) -> Result<()> {
        let other: BTreeMap<String, String> = serde_json::from_str(other)
            .map_err(|e| Error::Invalid(format!("the fingerprint of {whose}: {e}")))?;
        let names: BTreeSet<_> = self.entries.keys().chain(other.keys()).collect();
        let differ = names.into_iter().filter(|name| self.entries.get(*name) != other.get(*name));
        let mut differ = differ.map(|name| {
            let [here, there] = [&self.entries, &other]
                .map(|of| of.get(name).map_or("nothing", |description| description));
            format!("{name} is {here} here and {there} there")
        });
        let named: Vec<_> = differ.by_ref().take(NAMED).collect();
        let named = match (named.len(), differ.count()) {
            (0, _) => return Ok(()),
            (_, 0) => named.join("; "),
            (_, more) => format!("{}; and {more} more", named.join("; ")),
        };
        Err(Error::Invalid(format!("this rank differs from {whose}: {named}")))
    }
}

/// The first digits, which two contents share by chance once in 2⁶⁴.
fn short(hash: Hash) -> String {
    hash.to_hex()[..16].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Tensor;
    use serde_json::json;
    use std::collections::HashMap;

    fn of(names: &[(&str, &[usize], DType, f64)]) -> Result<Fingerprint> {
        let var = |(name, shape, dtype, value): &(&str, &[usize], DType, f64)| {
            let tensor = (Tensor::ones(*shape, *dtype, &Device::Cpu)? * *value)?;
            Ok((name.to_string(), Var::from_tensor(&tensor)?))
        };
        Fingerprint::new(&names.iter().map(var).collect::<Result<_>>()?)
    }

    fn told(of: &Fingerprint, other: &Fingerprint) -> String {
        of.check(&other.to_json(), "rank 0").unwrap_err().to_string()
    }

    #[test]
    fn each_difference_is_told() -> Result<()> {
        let dtype = DType::F32;
        let first = of(&[("a", &[2, 3], dtype, 1.)])?;
        let cases = [
            (of(&[("b", &[2, 3], dtype, 1.)])?, vec!["\"b\"", "nothing there"]),
            (
                of(&[("a", &[2, 3], dtype, 1.), ("b", &[1], dtype, 1.)])?,
                vec!["\"b\"", "nothing there"],
            ),
            (of(&[("a", &[3, 2], dtype, 1.)])?, vec!["[3, 2] of F32", "[2, 3] of F32"]),
            (of(&[("a", &[2, 3], DType::BF16, 1.)])?, vec!["BF16"]),
            (of(&[("a", &[2, 3], dtype, 1.0000001)])?, vec!["\"a\" is [2, 3] of F32, values"]),
        ];
        for (other, expected) in cases {
            let error = told(&other, &first);
            assert!(expected.iter().all(|part| error.contains(part)), "{error}");
        }
        first.check(&of(&[("a", &[2, 3], dtype, 1.)])?.to_json(), "rank 0")?;
        let version = env!("CARGO_PKG_VERSION");
        let newer = first.to_json().replace(version, "999.0.0");
        let error = first.check(&newer, "rank 0").unwrap_err().to_string();
        let expected = format!("from rank 0: loralib is {version} here and 999.0.0 there");
        assert!(error.ends_with(&expected), "{error}");
        Ok(())
    }

    #[test]
    fn each_field_of_an_object_is_compared() -> Result<()> {
        let of = |lr: f64, r: usize, long: usize| {
            let lora = HashMap::from([("r", r), ("alpha", 16)]);
            let value = json!({ "lr": lr, "lora": lora, "targets": vec!["query"; long] });
            Fingerprint::default().with("flags", &value)
        };
        let error = told(&of(0.1, 8, 1000)?, &of(0.2, 4, 1000)?);
        let expected = "flags.lora.r is 8 here and 4 there; flags.lr is 0.1 here and 0.2 there";
        assert!(error.ends_with(expected), "{error}");
        assert!(of(0.1, 8, 1000)?.to_json().len() < 200);
        assert!(told(&of(0.1, 8, 1000)?, &of(0.1, 8, 1001)?).contains("flags.targets is"));
        let fields = |value: usize| -> Vec<_> { (0..9).map(|i| (i.to_string(), value)).collect() };
        let of = |value| {
            Fingerprint::default().with("x", &fields(value).into_iter().collect::<HashMap<_, _>>())
        };
        of(1)?.check(&of(1)?.to_json(), "rank 0")?;
        assert!(told(&of(1)?, &of(2)?).ends_with("x.2 is 1 here and 2 there; and 6 more"));
        Ok(())
    }

    #[test]
    fn files_are_compared_by_their_content() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("model.safetensors");
        let of = |content: &str| {
            std::fs::write(&path, content)?;
            Fingerprint::default().with_file("base", &path)
        };
        of("same")?.check(&of("same")?.to_json(), "rank 0")?;
        let error = told(&of("this")?, &of("that")?);
        assert!(error.contains("base is a file of 4 bytes, "), "{error}");
        std::fs::remove_file(&path)?;
        let error = Fingerprint::default().with_file("base", &path).unwrap_err().to_string();
        assert!(error.contains("model.safetensors: "), "{error}");
        Ok(())
    }

    #[test]
    fn a_name_is_not_replaced() -> Result<()> {
        let error = of(&[])?.with("loralib", &1).unwrap_err().to_string();
        assert!(error.contains("\"loralib\" already"), "{error}");
        Ok(())
    }
}
