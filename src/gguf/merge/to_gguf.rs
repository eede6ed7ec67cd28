//! Merges an adapter into its base, from file to file.

use super::layout::{self, metadata, Item};
use super::plan::{plan, with_kinds};
use super::rounded::rounded;
use crate::files::atomic_file;
use crate::gguf::convert::{dense, stored};
use crate::gguf::file::File;
use crate::gguf::names::Names;
use crate::gguf::writer::{Entry, Writer};
use crate::merge::{MergeProgress, Plan};
use crate::weights::LoraWeights;
use crate::{Error, Result};
use candle_core::quantized::GgmlDType;
use std::collections::BTreeMap;
use std::fs;
use std::io::{BufWriter, Write};
use std::path::Path;

/// How [`merge`] stores the merged weights.
///
/// ```
/// use candle_core::quantized::GgmlDType;
/// use loralib::gguf::MergeOptions;
/// let options = MergeOptions::from(GgmlDType::Q8_0);
/// assert!(!options.force);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MergeOptions {
    /// The dtype of the merged matrices: `Q8_0`, `F16`, `BF16` or `F32`. Any other that candle can write
    /// is possible too; the fewer bits, the more of the update is lost.
    pub dtype: GgmlDType,
    /// Whether to write weights that keep less than half of their update, or that are in the base's own
    /// dtype of less than 8 bits. `false` by `From`.
    pub force: bool,
}

impl From<GgmlDType> for MergeOptions {
    fn from(dtype: GgmlDType) -> Self {
        Self { dtype, force: false }
    }
}

/// Writes the base with the adapter merged into it as a new GGUF file, and returns for each changed tensor,
/// by Hugging Face's name, the share of the update that is left after rounding, ⟨Q(W+ΔW)−W, ΔW⟩ / ⟨ΔW, ΔW⟩:
/// about 1 if the dtype is fine enough.
///
/// The values of a base in 4 bits lie on the grid of its dtype, and an update is often a small part of a step:
/// rounded to the same grid, the weights are the base's again. So merge into a finer dtype, or keep the
/// adapter beside the base by [`save_adapter`](crate::gguf::save_adapter).
///
/// Merged are lora_A and lora_B, and trained biases and modules replace those of the base. Layers need no kinds. The
/// metadata and all other tensors
/// are copied byte for byte, but for `general.file_type`. If the
/// embedding is the output layer too and the adapter changes one of the two alone, the output layer becomes a tensor of
/// its own, as in PEFT's model.
///
/// One tensor is in memory at a time. The file appears complete or not at all; it may be the base's own.
///
/// ```no_run
/// # fn main() -> loralib::Result<()> {
/// use candle_core::quantized::GgmlDType;
/// use loralib::{self as lora, gguf};
/// let base = gguf::File::open("model-q4_0.gguf")?;
/// let adapter = lora::Adapter::load("adapter.safetensors", &candle_core::Device::Cpu)?;
/// gguf::merge(&base, &adapter.weights()?, "merged.gguf", GgmlDType::Q8_0, |_| {})?;
/// # Ok(()) }
/// ```
///
/// # Errors
/// As [`merge_into`](crate::merge::merge_into), for names before anything is written; if the architecture is unknown;
/// if the rows of a tensor are not whole blocks of the dtype, or the dtype cannot hold a value; without `force`, if
/// a weight keeps less than half of its update, or is in its own dtype of less than 8 bits, with the share in
/// the error; and if the file system refuses. The error names the file and the tensor.
pub fn merge(
    base: &File,
    adapter: &LoraWeights,
    out: impl AsRef<Path>,
    options: impl Into<MergeOptions>,
    mut progress: impl FnMut(MergeProgress),
) -> Result<BTreeMap<String, f64>> {
    let (out, options) = (out.as_ref(), options.into());
    let of_base = |error: Error| error.at(base.path());
    let names = Names::of(base).map_err(of_base)?;
    let adapter = &with_kinds(adapter);
    let plan = plan(base, &names, adapter).map_err(of_base)?;
    let items = layout::items(base, &names, &plan, options.dtype).map_err(of_base)?;
    let metadata = metadata(base, &items).map_err(of_base)?;
    let merge = Merge { base, names, plan, options };
    let mut kept = BTreeMap::new();
    let write =
        |file: &mut fs::File| merge.write(file, &metadata, &items, &mut kept, &mut progress);
    atomic_file::replace_with(out, write).map_err(|error| match error {
        Error::File { .. } => error,
        error => error.at(out),
    })?;
    Ok(kept)
}

struct Merge<'a> {
    base: &'a File,
    names: Names,
    plan: Plan,
    options: MergeOptions,
}

impl Merge<'_> {
    fn write(
        &self,
        file: &mut fs::File,
        metadata: &[Vec<u8>],
        items: &[Item],
        kept: &mut BTreeMap<String, f64>,
        progress: &mut dyn FnMut(MergeProgress),
    ) -> Result<()> {
        let entries: Vec<_> = items
            .iter()
            .map(|item| Entry {
                name: item.name,
                dtype: item.dtype,
                dims: &item.info.dims,
                bytes: item.bytes,
            })
            .collect();
        let mut out = BufWriter::new(file);
        let mut writer = Writer::new(&mut out, metadata, &entries, self.base.header().alignment)?;
        let (mut done, total) = (0, items.iter().map(|item| item.bytes).sum());
        for item in items {
            let bytes = match &item.changed {
                None => self.base.bytes(item.info),
                Some(name) => self.merged(item, name).map(|(bytes, share)| {
                    kept.insert(name.clone(), share);
                    bytes
                }),
            };
            writer.tensor(&bytes.map_err(|error| error.at(self.base.path()))?)?;
            done += item.bytes;
            progress(MergeProgress { done, total });
        }
        Ok(out.flush()?)
    }

    /// The bytes of a changed tensor, and the share of the update that they keep.
    fn merged(&self, item: &Item, name: &str) -> Result<(Vec<u8>, f64)> {
        let before = dense(self.base, &self.names, item.source)?;
        let Some(after) = self.plan.apply(name, &before)? else {
            return Err(Error::tensor(name, "the adapter does not change it"));
        };
        let before = stored(&self.names, item.source, before)?;
        let after = stored(&self.names, item.source, after)?;
        let (bytes, share) =
            rounded(&before, &after, item.dtype).map_err(|e| Error::tensor(name, e))?;
        let low_bit = item.dtype.type_size() < item.dtype.block_size();
        let own = low_bit && item.dtype == item.info.dtype;
        if (own || share < 0.5) && !self.options.force {
            let finer = if item.dtype == GgmlDType::Q8_0 { "F16" } else { "Q8_0 or F16" };
            let reason = format!(
                "in {:?}{} {:.1} % of its update would be left: merge into a finer dtype, such as {finer}, or keep \
                 the adapter beside the base by `save_adapter`",
                item.dtype,
                if own { ", the base's own dtype," } else { "" },
                100. * share
            );
            return Err(Error::tensor(name, reason));
        }
        Ok((bytes, share))
    }
}
