//! Reading PEFT's folder.

use super::convert::{from_peft, same_scaling};
use super::json::{common_or_most, from_json, Json};
use super::keys::{self, Key};
use super::pattern::Pattern;
use super::{malformed, Kind, Layer, PeftConfig, BIN, CONFIG, SAFETENSORS};
use crate::utils::{join, read_state_dict, StateDict};
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

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
/// has a value), a factor lacks the other, a shape does not fit the others or the rank, a tensor is
/// not accounted for, or a value is not finite. The error names the file and the key or tensor.
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
    let path = dir.join(CONFIG);
    let json = fs::read(&path).map_err(Error::from).and_then(|text| from_json(&text));
    let mut json = json.map_err(|e| e.at(&path))?;
    for (module, kind) in kinds {
        json.config = json.config.with(module.as_ref(), kind.clone());
    }
    let safetensors = dir.join(SAFETENSORS);
    let path = match dir.join(BIN) {
        bin if bin.exists() && !safetensors.exists() => bin,
        _ => safetensors,
    };
    let tensors = read_state_dict(&path, device)?.tensors;
    convert(json, tensors).map_err(|e| e.at(&path))
}

/// The factors of a layer as the file has them.
#[derive(Default)]
struct Pair {
    a: Option<Tensor>,
    b: Option<Tensor>,
    embedding: bool,
}

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
        let kind = kind(&a, pair.embedding, json.config.kind(&path))
            .map_err(|reason| Error::tensor(&a_key, reason))?;
        let factors = from_peft(&kind, a, b).map_err(|e| Error::tensor(&a_key, e))?;
        let alpha = same_scaling(alpha, r, factors.r, given.rslora);
        loaded.insert(join(&path, "lora_A"), factors.a);
        loaded.insert(join(&path, "lora_B"), factors.b);
        layers.push((path, kind, factors.r, alpha));
    }
    Ok((settle(json.config, layers), loaded))
}

/// The pairs by path, and everything else by its name.
fn sort(config: &PeftConfig, tensors: StateDict) -> Result<(BTreeMap<String, Pair>, StateDict)> {
    let (mut pairs, mut others) = (BTreeMap::<String, Pair>::new(), vec![]);
    for (key, tensor) in tensors {
        let unknown = || Error::tensor(&key, "it is no part of a LoRA adapter in PEFT's format");
        let (path, embedding) = match keys::parse(&key).ok_or_else(unknown)? {
            Key::A(path, embedding) | Key::B(path, embedding) if !path.is_empty() => {
                (path, embedding)
            }
            Key::A(..) | Key::B(..) => return Err(unknown()),
            Key::Base(path, last) => {
                others.push((join(path, last), Some(path.to_owned()), key.clone(), tensor));
                continue;
            }
            Key::Plain(name) => {
                others.push((name.to_owned(), None, key.clone(), tensor));
                continue;
            }
        };
        let pair = pairs.entry(path.to_owned()).or_default();
        if (pair.a.is_some() || pair.b.is_some()) && pair.embedding != embedding {
            return Err(Error::tensor(
                &key,
                "its layer has factors of an embedding and of another",
            ));
        }
        pair.embedding = embedding;
        match keys::parse(&key) {
            Some(Key::A(..)) => pair.a = Some(tensor),
            _ => pair.b = Some(tensor),
        }
    }
    if pairs.is_empty() {
        return Err(malformed("no lora_A and lora_B in it"));
    }
    let mut named = StateDict::new();
    for (name, base_of, key, tensor) in others {
        let fits = match base_of {
            Some(path) => {
                pairs.contains_key(&path)
                    && (name.ends_with(".weight") || keys::is_carried(&name, config))
            }
            None => keys::is_carried(&name, config),
        };
        if !fits {
            let reason = "neither modules_to_save nor bias of the configuration accounts for it";
            return Err(Error::tensor(key, reason));
        }
        if named.insert(name, tensor).is_some() {
            return Err(Error::tensor(key, "the file has it under two names"));
        }
    }
    Ok((pairs, named))
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

fn kind(a: &Tensor, embedding: bool, given: Option<&Kind>) -> std::result::Result<Kind, String> {
    let found = match (a.rank(), embedding) {
        (2, true) => Kind::Embedding,
        (2, false) => Kind::Linear,
        (3, false) => Kind::Conv1d,
        (4, false) => Kind::Conv2d,
        (5, false) => Kind::Conv3d,
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

/// The configuration with the layers that differ from the common options.
fn settle(mut config: PeftConfig, layers: Vec<(String, Kind, usize, f64)>) -> PeftConfig {
    let common = (config.lora.r, config.lora.lora_alpha);
    let values = layers.iter().map(|&(_, _, r, alpha)| (r, alpha));
    let (r, alpha) = common_or_most(common, values).unwrap_or(common);
    (config.lora.r, config.lora.lora_alpha) = (r, alpha);
    let layers: BTreeMap<_, _> = layers
        .into_iter()
        .map(|(path, kind, own_r, own_alpha)| {
            let r = (own_r != r).then_some(own_r);
            (path, Layer { kind, r, lora_alpha: (own_alpha != alpha).then_some(own_alpha) })
        })
        .collect();
    let (plain, own): (BTreeMap<_, _>, _) =
        layers.into_iter().partition(|(_, layer)| *layer == Layer::default());
    config.layers = own;
    for (path, layer) in plain {
        // The end of its path may be another layer's whole path.
        if config.layer(&path).is_some() {
            config.layers.insert(path, layer);
        }
    }
    config
}
