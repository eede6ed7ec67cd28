//! Writes an adapter as llama.cpp takes it.

use super::place::Place;
use crate::files::{atomic_file, check_finite};
use crate::formats::shapes::to_peft;
use crate::gguf::architecture::HEAD;
use crate::gguf::file::File;
use crate::gguf::names::Names;
use crate::gguf::writer::{f32, string, Entry, Writer};
use crate::layers::{LayerKind, LoraConfig, Part};
use crate::weights::{common_alpha, rescaled, Factors, LayerWeights, LoraWeights};
use crate::{Error, Result};
use candle_core::quantized::GgmlDType;
use candle_core::{DType, Device, Tensor};
use safetensors::tensor::View;
use std::collections::BTreeMap;
use std::io::{BufWriter, Write};
use std::path::Path;

const ALIGNMENT: u64 = 32;

const WAY_OUT: &str = "merge it into the base by `gguf::merge`";

/// Writes an adapter as a GGUF file, for `llama-cli --lora` and other programs on llama.cpp, beside a base
/// of the same model.
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
pub fn save_adapter(path: impl AsRef<Path>, weights: &LoraWeights, base: &File) -> Result<()> {
    let path = path.as_ref();
    write(path, weights, base).map_err(|error| error.at(path))
}

fn write(path: &Path, weights: &LoraWeights, base: &File) -> Result<()> {
    let weights = weights.joined()?;
    let layers = layers(&weights, base)?;
    // The file's alpha is an F32.
    let rounded = |layer: &Layer| f64::from(layer.factors.lora_alpha as f32);
    let alpha = common_alpha(layers.iter().map(rounded)).ok_or_else(|| {
        let all: Vec<_> = layers.iter().map(|layer| layer.factors.lora_alpha).take(3).collect();
        Error::Invalid(format!("no layer has an alpha other than 0 that fits an F32: {all:?}"))
    })?;
    let mut tensors = BTreeMap::new();
    for layer in &layers {
        let name = Part::A.at(layer.path);
        let Factors { a, b, lora_alpha, .. } = &layer.factors;
        let own = if rounded(layer) == alpha { alpha } else { *lora_alpha };
        let b = rescaled(b.clone(), own, alpha)?;
        let (a, b) = layer.place.written(a, &b).map_err(|e| Error::tensor(&name, e))?;
        for (last, factor) in [("lora_a", a), ("lora_b", b)] {
            let factor = factor.to_dtype(DType::F32)?.contiguous()?;
            check_finite(&name, &factor)?;
            tensors.insert(format!("{}.{last}", layer.place.weight), factor);
        }
    }
    let metadata = [
        string("general.architecture", base.architecture()),
        string("general.type", "adapter"),
        string("adapter.type", "lora"),
        f32("adapter.lora.alpha", alpha as f32),
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
    /// On the CPU, with the `alpha` that gives the layer's scaling without `rslora`.
    factors: Factors,
}

fn layers<'a>(weights: &'a LoraWeights, base: &File) -> Result<Vec<Layer<'a>>> {
    weights.refuse_others("llama.cpp's format", WAY_OUT)?;
    let names = Names::of(base)?;
    let layer = |(path, own): (&'a str, _)| {
        let found = layer(path, own, &weights.options.lora, base, &names);
        let (place, factors) = found.map_err(|reason| Error::tensor(Part::A.at(path), reason))?;
        Ok(Layer { path, place, factors })
    };
    weights.layers().map(layer).collect()
}

fn layer(
    path: &str,
    layer: &LayerWeights,
    common: &LoraConfig,
    base: &File,
    names: &Names,
) -> std::result::Result<(Place, Factors), String> {
    let text = |error: &dyn ToString| error.to_string();
    let weight = names.gguf(&Part::Base("weight").at(path));
    let Some(weight) = weight.clone().filter(|weight| base.find(weight).is_some()) else {
        let head = weight.as_deref() == Some(HEAD.0);
        let tied = if head { ", which ties it to the embeddings" } else { "" };
        let way_out = if head { format!(": {WAY_OUT}") } else { String::new() };
        let base = base.path().display();
        return Err(format!("the base {base}{tied} has no weight for it{way_out}"));
    };
    let place = Place::find(base, names, &weight).map_err(|e| text(&e))?;
    let kind = match (&layer.kind, place.embedding) {
        (None | Some(LayerKind::Embedding), true) => LayerKind::Embedding,
        (None, false) => LayerKind::Linear,
        (Some(kind), false) if kind.is_linear() => kind.clone(),
        (Some(kind), _) => return Err(format!("its layer is declared as a {kind:?}")),
    };
    if place.embedding && base.find(HEAD.0).is_none() {
        let reason = "the embedding is the output layer too, and llama.cpp stops on its adapter";
        return Err(format!("{reason}: {WAY_OUT}"));
    }
    layer.options(common).validate(DType::F32).map_err(|e| text(&e))?;
    let cpu = |t: &Tensor| t.to_device(&Device::Cpu).map_err(|e| text(&e));
    let (a, b) = (cpu(&layer.a)?, cpu(&layer.b)?);
    let on_cpu = LayerWeights::new(Some(kind), Factors { a, b, ..layer.factors() });
    let factors = to_peft(&on_cpu, common.rslora).map_err(|e| text(&e))?;
    Ok((place, factors.without_rslora(common.rslora)))
}
