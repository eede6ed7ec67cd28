//! An adapter.

use super::norms::norms;
use super::{picture, Args};
use crate::adapter;
use crate::chat::Speaker;
use crate::encoder::{self, is_encoder};
use crate::format::Format;
use crate::model::Base;
use crate::report::Report;
use crate::Result;
use candle_core::{Device, Tensor};
use loralib::formats::{diffusers, kohya};
use loralib::layers::LayerKind;
use loralib::{gguf, LoraWeights};
use serde_json::{json, Value};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;

pub fn tell(args: &Args, format: Format, report: Report) -> Result<()> {
    let weights = read(args, format)?;
    let config = weights.config();
    let tensors = weights.state_dict();
    let mut layers = vec![];
    for (path, layer) in weights.layers() {
        let config = weights.lora_config(path);
        let alpha = config.map_or(layer.lora_alpha, |config| config.lora_alpha);
        let scaling = config.map_or(alpha / layer.r as f64, |config| config.scaling());
        layers.push((path, layer, alpha, scaling));
    }
    let rank = Range::of(layers.iter().map(|(_, layer, ..)| layer.r as f64));
    let alpha = Range::of(layers.iter().map(|(_, _, alpha, _)| *alpha));
    let scaling = Range::of(layers.iter().map(|(.., scaling)| *scaling));
    let mut kinds = BTreeMap::<String, usize>::new();
    for (_, layer, ..) in &layers {
        let kind = layer.kind.as_ref().map_or("of any kind", name);
        let dora = if layer.magnitude.is_some() { " with DoRA" } else { "" };
        *kinds.entry(format!("{kind}{dora}")).or_default() += 1;
    }
    let targets: BTreeSet<_> =
        layers.iter().map(|(path, ..)| path.rsplit('.').next().unwrap_or(path)).collect();
    let factors = |name: &str| name.rsplit('.').next().unwrap_or(name).starts_with("lora_");
    let others: Vec<_> = tensors.keys().filter(|name| !factors(name)).cloned().collect();
    let parameters: usize = tensors.values().map(Tensor::elem_count).sum();
    let bytes: usize = tensors.values().map(|t| t.elem_count() * t.dtype().size_in_bytes()).sum();
    let dtypes: BTreeSet<_> = tensors.values().map(|t| t.dtype().as_str()).collect();
    let norms = norms(&weights)?;
    let fits = args.model.as_ref().map(|model| fits(args, model));
    let fits = fits.map(|fits| fits.unwrap_or_else(|e| format!("no: {e}")));

    let list = |names: &mut dyn Iterator<Item = &str>| names.collect::<Vec<_>>().join(", ");
    let kinds_told: Vec<_> = kinds.iter().map(|(kind, n)| format!("{n} {kind}")).collect();
    let mut rows = vec![
        (
            "adapter",
            format!(
                "{format}, {parameters} parameters, {}, {}",
                size(bytes),
                list(&mut dtypes.iter().copied())
            ),
        ),
        ("rank", format!("{rank}, alpha {alpha}, scaling {scaling}")),
        ("layers", kinds_told.join(", ")),
        ("targets", list(&mut targets.iter().copied())),
    ];
    if !others.is_empty() {
        rows.push(("also", list(&mut others.iter().map(String::as_str))));
    }
    if let Some(base) = &config.base_model_name_or_path {
        rows.push(("base", base.clone()));
    }
    if let Some(task) = &config.task_type {
        rows.push(("task", task.clone()));
    }
    if let Some(fits) = &fits {
        rows.push(("fits", fits.clone()));
    }
    let mut text: String = rows.iter().map(|(name, value)| format!("{name:8} {value}\n")).collect();
    text += &format!("\nnorms of the updates by layer\n{}", picture::text(&norms));
    let values = json!({
        "format": format.to_string(), "parameters": parameters, "bytes": bytes, "dtypes": dtypes,
        "rank": rank.json(), "alpha": alpha.json(), "scaling": scaling.json(), "layers": kinds, "targets": targets, "others": others,
        "base": config.base_model_name_or_path, "task": config.task_type, "fits": fits,
        "norms": norms.iter().cloned().collect::<BTreeMap<_, _>>(),
    });
    report.tell(text.trim_end(), "adapter", values);
    match &args.svg {
        Some(file) => picture::svg(&norms, file),
        None => Ok(()),
    }
}

/// The smallest and the largest of the layers' values.
struct Range(f64, f64);

impl Range {
    fn of(values: impl Iterator<Item = f64>) -> Self {
        let least_and_most = |Self(low, high), v: f64| Self(v.min(low), v.max(high));
        values.fold(Self(f64::MAX, f64::MIN), least_and_most)
    }

    /// A number, or both in a list; null without layers.
    fn json(&self) -> Value {
        match *self {
            Self(low, high) if low > high => Value::Null,
            Self(low, high) if low == high => json!(low),
            Self(low, high) => json!([low, high]),
        }
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match *self {
            Self(low, high) if low > high => f.write_str("none"),
            Self(low, high) if low == high => write!(f, "{low}"),
            Self(low, high) => write!(f, "{low} to {high}"),
        }
    }
}

/// An adapter of any format; names of kohya's that have no dots stay as they are.
fn read(args: &Args, format: Format) -> Result<LoraWeights> {
    let (path, cpu) = (&args.path, Device::Cpu);
    match format {
        Format::Kohya => Ok(kohya::load(path, &cpu)?),
        Format::Diffusers => Ok(diffusers::load(path, &cpu)?),
        Format::Gguf => match &args.model {
            Some(model) => adapter::read(path, Some(&gguf::File::open(model)?)),
            None => Err(format!("{}: give the adapter's model by --model", path.display()).into()),
        },
        _ => adapter::read(path, None),
    }
}

/// That the model has each layer of the adapter, with the shape that it is for.
fn fits(args: &Args, model: &Path) -> Result<String> {
    if is_encoder(model) {
        let base = encoder::Base::read(model, usize::MAX, &Device::Cpu)?;
        base.check(&adapter::read(&args.path, None)?)?;
        return Ok(base.describe());
    }
    let base = Base::read(model, &Device::Cpu)?;
    Speaker::new(&base, &[args.path.display().to_string()])?;
    Ok(base.describe())
}

fn name(kind: &LayerKind) -> &'static str {
    match kind {
        LayerKind::Linear => "Linear",
        LayerKind::Embedding => "Embedding",
        LayerKind::Conv1d { .. } => "Conv1d",
        LayerKind::Conv2d { .. } => "Conv2d",
        LayerKind::Conv3d { .. } => "Conv3d",
        LayerKind::MergedLinear(_) | LayerKind::MergedSplits(_) => "MergedLinear",
        LayerKind::Parameter { .. } => "parameter",
        _ => "of another kind",
    }
}

pub fn size(bytes: usize) -> String {
    match bytes as f64 / (1 << 20) as f64 {
        mib if mib >= 1024. => format!("{:.2} GiB", mib / 1024.),
        mib => format!("{mib:.1} MiB"),
    }
}
