//! Reading PEFT's folder.

use super::common::settle;
use super::convert::{from_peft, same_scaling};
use super::pairs::sort;
use super::pattern::Pattern;
use super::read_config::{read_config, Json};
use super::{keys, malformed, Kind, PeftConfig, BIN, CONFIG, SAFETENSORS};
use crate::utils::{join, read, StateDict};
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use std::path::{Path, PathBuf};
use std::{fs, io};

/// Reads an adapter that PEFT or [`save_pretrained`](super::save_pretrained) wrote, in loralib's
/// names and shapes.
///
/// A layer over a linear one comes as a [`Kind::Linear`]; the configuration has those of other kinds
/// and those with a rank or alpha of their own. See [`load_pretrained_as`] for models with a
/// [`MergedLinear`](crate::MergedLinear).
///
/// # Errors
/// When a file is missing or malformed, the configuration has an option that changes the mathematics
/// and is not supported (DoRA, initial values that move the base, a key that is not understood and
/// has a value, a pattern with more in it than characters, escapes, `.`, `\d`, `\w`, `*`, `+`, `?`, `^`
/// and `$`), a layer is a convolution of several groups as PEFT adapts them, a factor lacks the other,
/// a shape does not fit the others or the rank, a tensor is not accounted for, or a value is not
/// finite. The error names the file and the key or tensor.
pub fn load_pretrained(dir: impl AsRef<Path>, device: &Device) -> Result<(PeftConfig, StateDict)> {
    load_pretrained_as::<&str>(dir, &[], device)
}

/// [`load_pretrained`] for a model in which some layers are merged ones: `kinds` has them, each by
/// its path or the end of it after a dot.
///
/// ```no_run
/// # fn main() -> loralib::Result<()> {
/// use loralib::peft::{self, Kind};
/// let c_attn = ("c_attn", Kind::MergedLinear(vec![true, false, true]));
/// let device = candle_core::Device::Cpu;
/// let (config, tensors) = peft::load_pretrained_as("adapter", &[c_attn], &device)?;
/// # let _ = (config, tensors); Ok(()) }
/// ```
///
/// # Errors
/// As [`load_pretrained`]; and when a layer that was named is not in the adapter, is of another kind
/// or changes outputs that are not enabled.
pub fn load_pretrained_as<S: AsRef<str>>(
    dir: impl AsRef<Path>,
    kinds: &[(S, Kind)],
    device: &Device,
) -> Result<(PeftConfig, StateDict)> {
    let dir = dir.as_ref();
    if dir.is_file() {
        let reason = "PEFT's format is a folder; `load_checkpoint` reads loralib's files";
        return Err(malformed(reason).at(dir));
    }
    let (text, path, tensors) = read_both(dir, device)?;
    let mut json = read_config(&text).map_err(|e| e.at(&dir.join(CONFIG)))?;
    for (module, kind) in kinds {
        json.config = json.config.with(module.as_ref(), kind.clone());
    }
    convert(json, tensors).map_err(|e| e.at(&path))
}

/// The configuration, and the tensors with their path. A writer may be at work in the folder, or may
/// have been stopped: the tensors carry the configuration that they were saved with, for the time
/// when it is not there.
fn read_both(dir: &Path, device: &Device) -> Result<(Vec<u8>, PathBuf, StateDict)> {
    let path = dir.join(CONFIG);
    let config = || match fs::read(&path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        text => text.map(Some).map_err(|e| Error::from(e).at(&path)),
    };
    for _ in 0..TRIES {
        let before = config()?;
        let safetensors = dir.join(SAFETENSORS);
        let file = match dir.join(BIN) {
            bin if bin.exists() && !safetensors.exists() => bin,
            _ => safetensors,
        };
        let (tensors, mut metadata) = read(&file, device).map_err(|e| e.at(&file))?;
        if config()? == before {
            let own = metadata.remove(CONFIG).map(String::into_bytes);
            let missing = || malformed("there is none, nor do the tensors carry it").at(&path);
            return Ok((before.or(own).ok_or_else(missing)?, file, tensors));
        }
    }
    Err(malformed(format!("it was replaced {TRIES} times while the tensors were read")).at(&path))
}

/// How often a reader begins anew because a writer came between.
const TRIES: usize = 100;

fn convert(json: Json, tensors: StateDict) -> Result<(PeftConfig, StateDict)> {
    let (pairs, mut loaded) = sort(&json.config, tensors)?;
    json.config.check_used(pairs.keys().map(String::as_str))?;
    let given = &json.config.lora;
    let mut layers = vec![];
    for (path, pair) in pairs {
        let (a_key, b_key) = keys::pair(&path, pair.embedding);
        let (a, b) = match (pair.a, pair.b) {
            (Some(a), Some(b)) => (a, b),
            (None, _) => return Err(Error::tensor(a_key, "it is missing")),
            (_, None) => return Err(Error::tensor(b_key, "it is missing")),
        };
        for (key, factor) in [(&a_key, &a), (&b_key, &b)] {
            if !factor.dtype().is_float() {
                return Err(Error::tensor(key, format!("it holds {:?}", factor.dtype())));
            }
        }
        let r = own(&json.ranks, &path)?.unwrap_or(given.r);
        let alpha = own(&json.alphas, &path)?.unwrap_or(given.lora_alpha);
        if a.dims().first() != Some(&r) {
            let reason = format!("its shape is {:?}, the configuration's rank {r}", a.dims());
            return Err(Error::tensor(a_key, reason));
        }
        let kind = kind([&a, &b], pair.embedding, json.config.kind(&path))
            .map_err(|reason| Error::tensor(&a_key, reason))?;
        let factors = from_peft(&kind, a, b).map_err(|e| Error::tensor(&a_key, e))?;
        let alpha = same_scaling(alpha, r, factors.r, given.rslora);
        loaded.insert(join(&path, "lora_A"), factors.a);
        loaded.insert(join(&path, "lora_B"), factors.b);
        layers.push((path, kind, factors.r, alpha));
    }
    Ok((settle(json.config, layers), loaded))
}

/// The value of the patterns that match a path. PEFT takes the first of them in the order of the
/// file, which JSON does not keep.
fn own<T: Copy + PartialEq>(patterns: &[(Pattern, T)], path: &str) -> Result<Option<T>> {
    let mut values = patterns.iter().filter(|(p, _)| p.matches(path)).map(|(_, value)| *value);
    let first = values.next();
    match values.find(|value| Some(*value) != first) {
        None => Ok(first),
        Some(_) => Err(malformed(format!("patterns with different values match {path:?}"))),
    }
}

/// What the factors are, where it does not contradict what is `given`.
fn kind(
    [a, b]: [&Tensor; 2],
    embedding: bool,
    given: Option<&Kind>,
) -> std::result::Result<Kind, String> {
    // A sees all inputs, B the ranks of one group.
    let groups = match (a.dims(), b.dims()) {
        (&[ranks, ..], &[_, own, ..]) if ranks.checked_rem(own) == Some(0) => ranks / own,
        _ => 1,
    };
    let found = match (a.rank(), embedding) {
        (2, true) => Kind::Embedding,
        (2, false) => Kind::Linear,
        (3, false) => Kind::Conv1d { groups },
        (4, false) => Kind::Conv2d { groups },
        (5, false) => Kind::Conv3d { groups },
        _ => return Err(format!("its shape is {:?}", a.dims())),
    };
    match given {
        Some(given @ (Kind::MergedLinear(_) | Kind::Splits(_))) if found == Kind::Linear => {
            Ok(given.clone())
        }
        Some(given) if *given != found => {
            Err(format!("it belongs to a {found:?}, not a {given:?}"))
        }
        _ => Ok(found),
    }
}
