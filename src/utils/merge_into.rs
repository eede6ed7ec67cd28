//! An adapter folded into its base by name, without the model: a plain checkpoint, to serve without
//! this crate.

use super::{join, read_state_dict, split, Shards, StateDict};
use crate::peft::{Kind, PeftConfig};
use crate::{Conv1d, Conv2d, Conv3d, Embedding, Error, Linear, LoraConfig, MergedLinear, Result};
use candle_core::{bail, DType, Device, Tensor};
use candle_nn::{Conv1dConfig, Conv2dConfig, VarBuilder};
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

/// The base of a merge: tensors, or where they lie.
#[derive(Debug, Clone)]
pub enum Base {
    /// Tensors in memory.
    Tensors(StateDict),
    /// A checkpoint, the index of a sharded one (`model.safetensors.index.json`), or a folder with
    /// either.
    Path(PathBuf),
}

impl From<StateDict> for Base {
    fn from(tensors: StateDict) -> Self {
        Self::Tensors(tensors)
    }
}

impl From<&StateDict> for Base {
    fn from(tensors: &StateDict) -> Self {
        Self::Tensors(tensors.clone())
    }
}

impl From<PathBuf> for Base {
    fn from(path: PathBuf) -> Self {
        Self::Path(path)
    }
}

impl From<&Path> for Base {
    fn from(path: &Path) -> Self {
        Self::Path(path.to_owned())
    }
}

impl From<&str> for Base {
    fn from(path: &str) -> Self {
        Self::Path(path.into())
    }
}

/// Every tensor of the base, with ΔW added to the adapted ones, rounded once, and the biases and
/// modules that the adapter carries in place of the base's. Names, shapes and dtypes are the base's.
///
/// `cfg` is a [`LoraConfig`], or a [`PeftConfig`] for a model with merged linear layers or with
/// layers of their own rank or alpha. What a layer is tells the shape of its weight, and whether it
/// lies transposed; for a square one `fan_in_fan_out` does, and a square embedding must be declared.
///
/// # Errors
/// When a tensor of the adapter has no counterpart in the base, a shape does not fit, a merged value
/// is not finite, or the base cannot be read. The error names the tensor.
pub fn merge_into(
    base: impl Into<Base>,
    adapter: &StateDict,
    cfg: impl Into<PeftConfig>,
) -> Result<StateDict> {
    let mut tensors = match base.into() {
        Base::Tensors(tensors) => tensors,
        Base::Path(path) => {
            let mut tensors = StateDict::new();
            for shard in Shards::find(&path)?.paths() {
                tensors.extend(read_state_dict(shard, &Device::Cpu)?.tensors);
            }
            tensors
        }
    };
    let plan = Plan::new(adapter, cfg.into(), |name| tensors.contains_key(name))?;
    for (name, tensor) in &mut tensors {
        if let Some(changed) = plan.apply(name, tensor)? {
            *tensor = changed;
        }
    }
    Ok(tensors)
}

/// What happens to which tensor of the base.
pub(super) struct Plan {
    changes: BTreeMap<String, Change>,
    config: PeftConfig,
}

enum Change {
    Update { path: String, a: Tensor, b: Tensor },
    Replace(Tensor),
}

impl Plan {
    pub fn new(
        adapter: &StateDict,
        config: PeftConfig,
        exists: impl Fn(&str) -> bool,
    ) -> Result<Self> {
        if adapter.is_empty() {
            return Err(Error::Empty { wanted: "an empty adapter".to_owned(), held: 0 });
        }
        let missing = |name: &str| Error::tensor(name, "the base has no such tensor to change");
        // A convolution's tensors may stand under loralib's second name.
        let find = |path: &str, last: &str| {
            let names = [join(path, last), join(&join(path, "conv"), last)];
            names.into_iter().find(|name| exists(name)).ok_or_else(|| missing(&join(path, last)))
        };
        let (mut updates, mut replacements) = (BTreeMap::new(), BTreeMap::new());
        for (name, tensor) in adapter {
            let (path, last) = split(name);
            let other = |last| {
                let other = adapter.get(&join(path, last)).cloned();
                other.ok_or_else(|| Error::tensor(name, format!("it has no {last} beside it")))
            };
            match last {
                "lora_A" => {
                    let (a, b) = (tensor.clone(), other("lora_B")?);
                    let update = Change::Update { path: path.to_owned(), a, b };
                    updates.insert(find(path, "weight")?, update);
                }
                "lora_B" => drop(other("lora_A")?),
                _ if exists(name) => {
                    replacements.insert(name.clone(), Change::Replace(tensor.clone()));
                }
                _ => {
                    let path = path.strip_suffix(".conv").unwrap_or(path);
                    replacements.insert(find(path, last)?, Change::Replace(tensor.clone()));
                }
            }
        }
        config.check_used(updates.values().filter_map(|change| match change {
            Change::Update { path, .. } => Some(path.as_str()),
            Change::Replace(_) => None,
        }))?;
        if let Some(both) = replacements.keys().find(|name| updates.contains_key(*name)) {
            return Err(Error::tensor(both, "the adapter has it and an update of it"));
        }
        updates.append(&mut replacements);
        Ok(Self { changes: updates, config })
    }

    /// The tensor that stands for this one of the base, where that is another.
    pub fn apply(&self, name: &str, base: &Tensor) -> Result<Option<Tensor>> {
        let changed = match self.changes.get(name) {
            None => return Ok(None),
            Some(Change::Replace(tensor)) => replaced(base, tensor),
            Some(Change::Update { path, a, b }) => {
                updated(base, a, b, self.config.kind(path), self.config.lora_config(path))
            }
        };
        changed.map(Some).map_err(|e| Error::tensor(name, e))
    }

    pub fn changes(&self, name: &str) -> bool {
        self.changes.contains_key(name)
    }
}

fn replaced(base: &Tensor, tensor: &Tensor) -> candle_core::Result<Tensor> {
    if base.shape() != tensor.shape() {
        bail!("its shape is {:?} in the base, {:?} in the adapter", base.dims(), tensor.dims())
    }
    tensor.to_device(base.device())?.to_dtype(base.dtype())
}

/// The merged weight of the layer that this is: its checks and its mathematics are the layer's own.
fn updated(
    w: &Tensor,
    a: &Tensor,
    b: &Tensor,
    kind: Option<&Kind>,
    cfg: LoraConfig,
) -> candle_core::Result<Tensor> {
    if cfg.r == 0 {
        bail!("the configuration has r = 0, the adapter a lora_A {:?}", a.dims())
    }
    let wide = match (a.dtype(), b.dtype()) {
        (DType::F64, _) | (_, DType::F64) => DType::F64,
        _ => DType::F32,
    };
    let factors = [("lora_A", a), ("lora_B", b)];
    let factors: HashMap<_, _> = factors.map(|(name, t)| (name.to_owned(), t.clone())).into();
    let vb = VarBuilder::from_tensors(factors, wide, w.device());
    let cfg = LoraConfig { lora_dropout: 0., lora_dtype: Some(wide), ..cfg };
    let inputs = *a.dims().last().unwrap_or(&0);
    match (kind.unwrap_or(&Kind::Linear), w.dims()) {
        (Kind::Embedding, &[_, dim]) => {
            let cfg = LoraConfig { fan_in_fan_out: false, ..cfg };
            Embedding::new(candle_nn::Embedding::new(w.clone(), dim), cfg, vb)?.merged_weight()
        }
        (kind @ (Kind::Linear | Kind::MergedLinear(_) | Kind::Splits(_)), &[rows, cols]) => {
            let fan_in_fan_out = match (rows == inputs, cols == inputs) {
                (true, false) => true,
                (false, true) => false,
                _ => cfg.fan_in_fan_out,
            };
            let cfg = LoraConfig { fan_in_fan_out, ..cfg };
            let base = candle_nn::Linear::new(w.clone(), None);
            let out = if fan_in_fan_out { cols } else { rows };
            match kind.splits(crate::peft::Total::All(out)) {
                Some(splits) => MergedLinear::with_splits(base, &splits, cfg, vb)?.merged_weight(),
                None if *kind == Kind::Linear => Linear::new(base, cfg, vb)?.merged_weight(),
                None => bail!("{kind:?} does not make up its {out} outputs"),
            }
        }
        (Kind::Linear | Kind::Conv1d | Kind::Conv2d | Kind::Conv3d, &[_, per_group, k, ..]) => {
            // A has the inputs of all groups.
            let width = k.saturating_pow((w.rank() as u32 - 2).div_ceil(2));
            let groups = inputs.checked_div(per_group.saturating_mul(width)).unwrap_or(0);
            let cfg = LoraConfig { fan_in_fan_out: false, ..cfg };
            match w.rank() {
                3 => {
                    let options = Conv1dConfig { groups, ..Default::default() };
                    let base = candle_nn::Conv1d::new(w.clone(), None, options);
                    Conv1d::new(base, cfg, vb)?.merged_weight()
                }
                4 => {
                    let options = Conv2dConfig { groups, ..Default::default() };
                    let base = candle_nn::Conv2d::new(w.clone(), None, options);
                    Conv2d::new(base, cfg, vb)?.merged_weight()
                }
                _ => {
                    let options = crate::Conv3dConfig { groups, ..Default::default() };
                    Conv3d::new(w.clone(), None, options, cfg, vb)?.merged_weight()
                }
            }
        }
        (kind, dims) => bail!("a weight {dims:?} is not that of a {kind:?}"),
    }
}
