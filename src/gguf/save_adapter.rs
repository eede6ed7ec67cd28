//! Writes an adapter as llama.cpp takes it.

use super::architecture::HEAD;
use super::factors::Place;
use super::file::File;
use super::names::Names;
use super::writer::{f32, string, Entry, Writer};
use crate::layers::LayerKind;
use crate::peft::{plain_alpha, to_peft, Factors};
use crate::utils::checkpoint::atomic_file;
use crate::utils::names::{is_factor, join, refuse_other_names};
use crate::utils::{check_finite, factors, plain, AdapterConfig, StateDict};
use crate::{Error, Result};
use candle_core::quantized::GgmlDType;
use candle_core::{DType, Device, Tensor};
use safetensors::tensor::View;
use std::collections::BTreeMap;
use std::io::{BufWriter, Write};
use std::path::Path;

const ALIGNMENT: u64 = 32;

/// Writes an adapter as a GGUF file, for `llama-cli --lora` and other programs on llama.cpp, beside a base
/// of the same model. `adapter` and `config` are those of [`lora_state_dict`](crate::lora_state_dict) and
/// of the layers; [`Adapter::save_gguf`](crate::Adapter::save_gguf) has both.
///
/// Factors are saved in F32, with the rows of q and k in the base's order. llama.cpp multiplies by `alpha /
/// r`, with one `alpha` for the whole file and the `r` of each layer. A layer with another
/// `alpha` has the ratio multiplied into its B, which is exact if the ratio is a power of two. The options
/// `rslora` and `lora_dropout` are not in the file. A `MergedLinear` is saved as a Linear of rank r·e, for e
/// enabled splits.
///
/// The file appears complete and flushed to disk, or not at all. Equal contents give equal bytes.
///
/// # Errors
/// If the adapter has something other than factors, which llama.cpp cannot take: biases, modules that are
/// trained as a whole, and DoRA's magnitudes; merge those. If the base lacks a layer, has another shape or an unknown
/// architecture; if a factor is missing or its rank is not the configuration's; if the embedding has an
/// adapter and is the output layer too, on which llama.cpp stops; if a value is not finite; and if the file
/// system refuses. The error names the file and the tensor.
pub fn save_adapter(
    path: impl AsRef<Path>,
    adapter: &StateDict,
    config: impl Into<AdapterConfig>,
    base: &File,
) -> Result<()> {
    let (path, config) = (path.as_ref(), config.into());
    write(path, adapter, &config, base).map_err(|error| error.at(path))
}

fn write(path: &Path, adapter: &StateDict, config: &AdapterConfig, base: &File) -> Result<()> {
    let (adapter, config) = &plain(adapter, config)?;
    let layers = layers(adapter, config, base)?;
    let alpha = common_alpha(&layers)?;
    let mut tensors = BTreeMap::new();
    for Layer { path, place, factors: Factors { a, b, .. }, alpha: own } in &layers {
        let name = join(path, "lora_A");
        let b = match *own as f32 == alpha {
            true => b.clone(),
            false => (b.to_dtype(DType::F64)? * (own / f64::from(alpha)))?,
        };
        let (a, b) = place.written(a, &b).map_err(|e| Error::tensor(&name, e))?;
        for (last, factor) in [("lora_a", a), ("lora_b", b)] {
            let factor = factor.to_dtype(DType::F32)?.contiguous()?;
            check_finite(&name, &factor)?;
            tensors.insert(format!("{}.{last}", place.weight), factor);
        }
    }
    let metadata = [
        string("general.architecture", base.architecture()),
        string("general.type", "adapter"),
        string("adapter.type", "lora"),
        f32("adapter.lora.alpha", alpha),
    ];
    let entries: Vec<_> = tensors
        .iter()
        .map(|(name, tensor)| Entry {
            name,
            dtype: GgmlDType::F32,
            dims: tensor.dims(),
            bytes: View::data_len(&tensor) as u64,
        })
        .collect();
    atomic_file::replace_with(path, |file| {
        let mut out = BufWriter::new(file);
        let mut writer = Writer::new(&mut out, &metadata, &entries, ALIGNMENT)?;
        tensors.values().try_for_each(|tensor| writer.tensor(&View::data(&tensor)))?;
        Ok(out.flush()?)
    })
}

struct Layer<'a> {
    path: &'a str,
    place: Place,
    /// On the CPU.
    factors: Factors,
    /// The `alpha` that gives the layer's scaling with the rank of the factors.
    alpha: f64,
}

fn layers<'a>(
    adapter: &'a StateDict,
    config: &AdapterConfig,
    base: &File,
) -> Result<Vec<Layer<'a>>> {
    refuse_other_names(adapter.keys())?;
    if let Some(name) = adapter.keys().find(|name| !is_factor(name)) {
        let reason = "llama.cpp's adapters have lora_A and lora_B alone: merge it into the base";
        return Err(Error::tensor(name, reason));
    }
    let names = Names::of(base)?;
    let mut layers = vec![];
    for (path, [a, b]) in factors(adapter, config)? {
        let layer = layer(path, (a, b), config, base, &names);
        layers.push(layer.map_err(|reason| Error::tensor(join(path, "lora_A"), reason))?);
    }
    config.check_used(layers.iter().map(|layer| layer.path))?;
    match layers.is_empty() {
        true => Err(Error::Invalid("the adapter is empty: there is nothing to save".to_owned())),
        false => Ok(layers),
    }
}

fn layer<'a>(
    path: &'a str,
    (a, b): (&Tensor, &Tensor),
    config: &AdapterConfig,
    base: &File,
    names: &Names,
) -> std::result::Result<Layer<'a>, String> {
    let text = |error: &dyn ToString| error.to_string();
    let weight = names.gguf(&join(path, "weight")).filter(|weight| base.find(weight).is_some());
    let Some(weight) = weight else {
        return Err(format!("the base {} has no weight for it", base.path().display()));
    };
    let place = Place::find(base, names, &weight).map_err(|e| text(&e))?;
    let kind = match (config.kind(path), place.embedding) {
        (None | Some(LayerKind::Embedding), true) => &LayerKind::Embedding,
        (None, false) => &LayerKind::Linear,
        (Some(kind), false) if kind.is_linear() => kind,
        (Some(kind), _) => return Err(format!("its layer is declared as a {kind:?}")),
    };
    if place.embedding && base.find(HEAD.0).is_none() {
        return Err("the embedding is the output layer too, and llama.cpp stops on its adapter: \
                    merge it into the base"
            .to_owned());
    }
    let cfg = config.lora_config(path);
    cfg.validate(DType::F32).map_err(|e| text(&e))?;
    let cpu = |t: &Tensor| t.to_device(&Device::Cpu).map_err(|e| text(&e));
    let factors = Factors { a: cpu(a)?, b: cpu(b)?, r: cfg.r };
    let factors = to_peft(kind, factors).map_err(|e| text(&e))?;
    let alpha = plain_alpha(&cfg, factors.r);
    Ok(Layer { path, place, factors, alpha })
}

/// The most frequent `alpha`, the first of several. llama.cpp takes 0 as no scaling at all.
fn common_alpha(layers: &[Layer]) -> Result<f32> {
    let alphas = || layers.iter().map(|layer| layer.alpha as f32).filter(|alpha| alpha.is_normal());
    let count = |alpha: f32| alphas().filter(|other| *other == alpha).count();
    // `max_by_key` gives the last
    alphas().rev().max_by_key(|alpha| count(*alpha)).ok_or_else(|| {
        let all: Vec<_> = layers.iter().map(|layer| layer.alpha).take(3).collect();
        Error::Invalid(format!("no layer has an alpha other than 0 that fits an F32: {all:?}"))
    })
}
