//! Merges an adapter into its base as a safetensors file.

use super::layout::{self, Item};
use super::plan::{plan, with_kinds};
use crate::files::{atomic_file, check_finite, header};
use crate::gguf::architecture::HEAD;
use crate::gguf::convert::dense;
use crate::gguf::file::File;
use crate::gguf::names::{Names, ROPE_FREQS};
use crate::merge::{MergeProgress, Plan};
use crate::weights::LoraWeights;
use crate::{Error, Result};
use ::safetensors::tensor::{TensorInfo, View};
use candle_core::quantized::GgmlDType;
use candle_core::{DType, Tensor};
use serde_json::Value;
use std::fs;
use std::io::{BufWriter, Write};
use std::path::Path;

/// Writes the base with the adapter merged into it as a safetensors file, by Hugging Face's names, for programs that do
/// not read GGUF, and returns the model's `config.json`. Every tensor is in `dtype`: `F32`, `BF16` or `F16`.
///
/// The base's quantised values are dequantised, so that no part of the update is lost, and the file is several times as
/// large as the base. If the embedding is the output layer too and the adapter changes one of the two alone, the
/// file has the output layer apart, and the returned `tie_word_embeddings` is `false`.
///
/// One tensor is in memory at a time. The file appears complete or not at all.
///
/// ```no_run
/// # fn main() -> loralib::Result<()> {
/// use candle_core::DType;
/// use loralib::{self as lora, gguf};
/// let base = gguf::File::open("model-q4_0.gguf")?;
/// let adapter = lora::Adapter::load("adapter.safetensors", &candle_core::Device::Cpu)?;
/// std::fs::create_dir_all("merged")?;
/// let (weights, out) = (adapter.weights()?, "merged/model.safetensors");
/// let config = gguf::merge_to_safetensors(&base, &weights, out, DType::BF16, |_| {})?;
/// // What else the folder of a model has.
/// std::fs::write("merged/config.json", config.to_string())?;
/// std::fs::write("merged/tokenizer.json", base.tokenizer_json()?)?;
/// # Ok(()) }
/// ```
///
/// # Errors
/// As [`merge_into`](crate::merge::merge_into), for names before anything is written; if the architecture or a tensor's name
/// is unknown, or the metadata has no [configuration](File::config); if `dtype` is another one or cannot hold a value;
/// and if the file system refuses. The error names the file and the tensor.
pub fn merge_to_safetensors(
    base: &File,
    adapter: &LoraWeights,
    out: impl AsRef<Path>,
    dtype: DType,
    mut progress: impl FnMut(MergeProgress),
) -> Result<Value> {
    if !matches!(dtype, DType::F32 | DType::BF16 | DType::F16) {
        let what = format!("merging into {dtype:?}");
        return Err(Error::unsupported(
            what,
            "safetensors files of models are in F32, BF16 or F16",
        ));
    }
    let (out, of_base) = (out.as_ref(), |error: Error| error.at(base.path()));
    let names = Names::of(base).map_err(of_base)?;
    let adapter = &with_kinds(adapter);
    let plan = plan(base, &names, adapter).map_err(of_base)?;
    let items = layout::items(base, &names, &plan, GgmlDType::F32).map_err(of_base)?;
    let tensors = tensors(&names, &items, dtype).map_err(of_base)?;
    let mut config: Value = base.config()?;
    if items.iter().any(|item| item.name == HEAD.0) {
        config["tie_word_embeddings"] = false.into();
    }
    let write = |file: &mut fs::File| {
        let (mut done, total) = (0, tensors.iter().map(|(_, info, _)| size(info)).sum());
        let mut file = BufWriter::new(file);
        let infos = tensors.iter().map(|(name, info, _)| (name.clone(), info.clone())).collect();
        file.write_all(&header(infos)?)?;
        for (name, info, source) in &tensors {
            let tensor = merged(base, &names, &plan, name, source).map_err(of_base)?;
            let tensor = tensor.to_dtype(dtype)?;
            check_finite(name, &tensor)?;
            file.write_all(&View::data(&tensor))?;
            done += size(info);
            progress(MergeProgress { done, total });
        }
        Ok(file.flush()?)
    };
    atomic_file::replace_with(out, write).map_err(|error| match error {
        Error::File { .. } => error,
        error => error.at(out),
    })?;
    Ok(config)
}

/// The tensors of the new file by name, and the base's tensors that they come from. The configuration has the divisors
/// of the rotation's frequencies.
fn tensors<'a>(
    names: &Names,
    items: &[Item<'a>],
    dtype: DType,
) -> Result<Vec<(String, TensorInfo, &'a str)>> {
    let mut tensors = vec![];
    for item in items.iter().filter(|item| item.name != ROPE_FREQS) {
        let unknown = || Error::tensor(item.name, "it has no name in the model of Hugging Face");
        let name = names.hugging_face(item.name).ok_or_else(unknown)?;
        let shape = item.info.dims.to_vec();
        let info = TensorInfo { dtype: dtype.into(), shape, data_offsets: (0, 0) };
        tensors.push((name, info, item.source));
    }
    tensors.sort_by(|one, other| one.0.cmp(&other.0));
    let mut end = 0;
    for (_, info, _) in &mut tensors {
        let start = end;
        end += info.shape.iter().product::<usize>() * dtype.size_in_bytes();
        info.data_offsets = (start, end);
    }
    Ok(tensors)
}

fn size(info: &TensorInfo) -> u64 {
    (info.data_offsets.1 - info.data_offsets.0) as u64
}

fn merged(base: &File, names: &Names, plan: &Plan, name: &str, source: &str) -> Result<Tensor> {
    let tensor = dense(base, names, source)?;
    Ok(plan.apply(name, &tensor)?.unwrap_or(tensor))
}
