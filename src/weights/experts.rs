//! Adapters of fused experts, and of experts with a matrix each: the same updates under two sets of names.
//!
//! transformers 5 has the gate and up projections of all experts in one parameter `experts.gate_up_proj`, and
//! `experts.down_proj` beside it; checkpoints of most models, transformers 4 and candle's models have a matrix for each
//! expert and projection.

use super::layer::{Factors, LayerWeights};
use super::lora_weights::LoraWeights;
use crate::layers::{LayerKind, Part};
use crate::{Error, Result};
use candle_core::Tensor;
use std::collections::{BTreeMap, BTreeSet};

/// What the matrices of single experts are called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ExpertNames {
    /// `mlp.experts.0.gate_proj`, `up_proj` and `down_proj`, of most models.
    Projections,
    /// `block_sparse_moe.experts.0.w1`, `w3` and `w2`, of Mixtral.
    Mixtral,
}

impl ExpertNames {
    pub(crate) const ALL: [Self; 2] = [Self::Projections, Self::Mixtral];

    /// Of the gate, up and down projections.
    fn projections(self) -> [&'static str; 3] {
        match self {
            Self::Projections => ["gate_proj", "up_proj", "down_proj"],
            Self::Mixtral => ["w1", "w3", "w2"],
        }
    }

    /// The module of the experts `module` under these names.
    fn module(self, module: &str) -> String {
        renamed(module, ["mlp", "block_sparse_moe"], self == Self::Mixtral)
    }

    /// The path of a projection of an expert.
    fn path(self, module: &str, expert: usize, projection: usize) -> String {
        format!("{}.{expert}.{}", self.module(module), self.projections()[projection])
    }
}

/// The module of experts, with the other of the two names for the component before `experts`.
fn renamed(module: &str, [from, to]: [&str; 2], forward: bool) -> String {
    let (from, to) = if forward { (from, to) } else { (to, from) };
    match module.strip_suffix(".experts").and_then(|path| path.strip_suffix(from)) {
        Some(start) if start.is_empty() || start.ends_with('.') => format!("{start}{to}.experts"),
        _ => module.to_owned(),
    }
}

const GATE_UP: &str = "gate_up_proj";
const DOWN: &str = "down_proj";

/// The module and the parameter, if a path is of fused experts.
fn fused(path: &str) -> Option<(&str, &str)> {
    let (module, name) = path.rsplit_once('.')?;
    let is_fused = [GATE_UP, DOWN].contains(&name) && module.rsplit('.').next() == Some("experts");
    is_fused.then_some((module, name))
}

/// The parameter that a layer of [`LoraWeights::with_unfused`] at this path is of.
pub(crate) fn parameter_of(path: &str) -> Option<String> {
    let (expert, name) = path.rsplit_once('.')?;
    let (module, index) = expert.rsplit_once('.')?;
    let parameter = format!("{module}.{name}");
    (index.parse::<usize>().is_ok() && fused(&parameter).is_some()).then_some(parameter)
}

/// The module, the expert and the projection, if a path is of a single expert's matrix.
fn single(path: &str) -> Option<(&str, usize, usize, ExpertNames)> {
    let (path, name) = path.rsplit_once('.')?;
    let (module, expert) = path.rsplit_once('.')?;
    let find = |names: ExpertNames| {
        Some((names.projections().iter().position(|own| *own == name)?, names))
    };
    let (projection, names) = ExpertNames::ALL.into_iter().find_map(find)?;
    let is_module = module.rsplit('.').next() == Some("experts");
    Some((module, expert.parse().ok().filter(|_| is_module)?, projection, names))
}

/// A projection of an expert, as a model has it, in the update that PEFT has of it.
pub(crate) struct ExpertProjection {
    /// The modules that the experts may be called: the model's own, and transformers 5's.
    pub modules: [String; 2],
    pub expert: usize,
    /// The parameter, `gate_up_proj` or `down_proj`.
    pub parameter: &'static str,
    /// Which of the parameter's projections, and of how many.
    pub part: (usize, usize),
}

impl ExpertProjection {
    /// Of a layer at this path, if it is one.
    pub fn of(path: &str) -> Option<Self> {
        let (module, expert, projection, _) = single(path)?;
        let modules = [module.to_owned(), renamed(module, ["block_sparse_moe", "mlp"], true)];
        let (parameter, part) = match projection {
            2 => (DOWN, (0, 1)),
            place => (GATE_UP, (place, 2)),
        };
        Some(Self { modules, expert, parameter, part })
    }

    /// The path of the parameter of all experts, and of this one's update, in a module.
    pub fn paths(&self, module: &str) -> [String; 2] {
        let Self { expert, parameter, .. } = self;
        [format!("{module}.{parameter}"), format!("{module}.{expert}.{parameter}")]
    }
}

impl LoraWeights {
    /// The adapter with a layer for each of the experts of fused parameters, such as `experts.0.gate_up_proj`, and the
    /// parameters' paths: to be trained. They are layers of no format.
    pub(crate) fn with_unfused(mut self) -> Result<(Self, Vec<String>)> {
        let mut parameters = vec![];
        let of_parameters = self.layers.iter().filter(|(_, layer)| layer.is_parameter());
        // Other parameters of a module would lose their places, and (experts, in, out) is another layout.
        let module = |path: &str| path.rsplit_once('.').map(|(module, _)| module.to_owned());
        let others: BTreeSet<_> = of_parameters
            .clone()
            .filter(|(path, layer)| fused(path).is_none() || layer.fan_in_fan_out == Some(true))
            .filter_map(|(path, _)| module(path))
            .collect();
        let is_whole = |module: &str| {
            !others.contains(module) && self.is_swapped(module).is_ok_and(|is_swapped| !is_swapped)
        };
        let whole =
            of_parameters.filter(|(path, _)| fused(path).is_some_and(|(of, _)| is_whole(of)));
        let whole: Vec<_> = whole.map(|(path, layer)| (path.clone(), layer.clone())).collect();
        for (path, layer) in whole {
            let Some((module, name)) = self::fused(&path) else { continue };
            self.layers.remove(&path);
            for (expert, layer) in split(&layer, false)?.into_iter().enumerate() {
                self.layers.insert(format!("{module}.{expert}.{name}"), layer);
            }
            parameters.push(path);
        }
        Ok((self, parameters))
    }

    /// The parameters of the layers that [`with_unfused`](Self::with_unfused) makes, where `is_parameter` is true.
    pub(crate) fn with_fused(mut self, is_parameter: impl Fn(&str) -> bool) -> Result<Self> {
        let mut found = BTreeMap::<String, BTreeMap<usize, (String, LayerWeights)>>::new();
        for (path, layer) in &self.layers {
            let Some(parameter) = parameter_of(path).filter(|parameter| is_parameter(parameter))
            else {
                continue;
            };
            let expert = path.rsplit('.').nth(1).and_then(|expert| expert.parse().ok());
            let of_parameter = found.entry(parameter).or_default();
            of_parameter.extend(expert.map(|expert| (expert, (path.clone(), layer.clone()))));
        }
        for (parameter, experts) in &found {
            let count = experts.keys().last().map_or(0, |last| last + 1);
            let layers = experts.iter().map(|(e, (path, layer))| ((*e, 0), (path.as_str(), layer)));
            let Some(mut layer) = fuse(count, &[0], &layers.collect(), self.options.lora.rslora)?
            else {
                continue;
            };
            let has_gate = parameter.strip_suffix(DOWN).map(|module| format!("{module}{GATE_UP}"));
            let index = usize::from(has_gate.is_some_and(|gate| found.contains_key(&gate)));
            layer.kind = Some(LayerKind::Parameter { index });
            for (path, _) in experts.values() {
                self.layers.remove(path);
            }
            self.layers.insert(parameter.clone(), layer);
        }
        Ok(self)
    }

    /// The adapter with factors for each expert's own matrices, in place of those of fused experts
    /// (`experts.gate_up_proj` and `experts.down_proj`, PEFT's `target_parameters`): for candle's models, which have a
    /// layer for each, to be trained or served. The updates are the same: the gate and up projections share A.
    ///
    /// Fused gate and up projections are halves, one behind the other, as in Mixtral, Qwen-MoE, DeepSeek and Llama 4, and not
    /// interleaved, as in GPT-OSS.
    ///
    /// # Errors
    /// If no layer is of fused experts, or the factors of one do not fit.
    pub fn split_experts(&self, names: ExpertNames) -> Result<Self> {
        self.split_experts_of(names, |_| None)
    }

    /// [`split_experts`](Self::split_experts) for a base whose tensors have these shapes.
    fn split_experts_of(
        &self,
        names: ExpertNames,
        dims: impl Fn(&str) -> Option<Vec<usize>>,
    ) -> Result<Self> {
        let mut layers = self.layers.clone();
        let mut found = false;
        for (path, layer) in self.layers.iter().filter(|(_, layer)| layer.is_parameter()) {
            let Some((module, name)) = fused(path) else { continue };
            found = true;
            layers.remove(path);
            let place = if name == DOWN { 2 } else { 0 };
            let first = dims(&Part::Base("weight").at(&names.path(module, 0, place)));
            let split = || match first.as_deref() {
                // The base's matrix (out, in).
                Some(&[_, inputs]) => split(layer, layer.a.dims().last() != Some(&inputs)),
                _ => split(layer, self.is_swapped(module)?),
            };
            let experts = split().map_err(|e| Error::tensor(path, e))?;
            for (expert, projections) in experts.into_iter().enumerate() {
                let places = if name == DOWN { vec![2] } else { vec![0, 1] };
                let halves =
                    if name == DOWN { vec![projections] } else { halved(path, projections)? };
                for (place, layer) in places.into_iter().zip(halves) {
                    layers.insert(names.path(module, expert, place), layer);
                }
            }
        }
        if !found {
            return Err(Error::Invalid(
                "no layer is of fused experts, `experts.gate_up_proj` or `experts.down_proj`"
                    .to_owned(),
            ));
        }
        Self { layers, ..self.clone() }.checked()
    }

    /// Whether A of a module's fused experts is on the outputs of the experts' projections, and B on their inputs, as PEFT has
    /// it where it takes (experts, in, out) for (experts, out, in). The sizes of both parameters tell.
    fn is_swapped(&self, module: &str) -> candle_core::Result<bool> {
        let sizes = |name: &str| {
            let layer = self.layers.get(&format!("{module}.{name}"))?;
            Some((layer.a.dims().last().copied()?, layer.b.dims().get(1).copied()?))
        };
        let (Some((gate_in, gate_out)), Some((down_in, down_out))) = (sizes(GATE_UP), sizes(DOWN))
        else {
            return Ok(false); // one alone does not tell
        };
        match (gate_in, gate_out) {
            (hidden, double) if hidden == down_out && double == 2 * down_in => Ok(false),
            (double, hidden) if hidden == down_in && double == 2 * down_out => Ok(true),
            _ => candle_core::bail!(
                "{GATE_UP} has {gate_in} inputs and {gate_out} outputs, {DOWN} {down_in} and {down_out}: these are not \
                 those of experts with a gate"
            ),
        }
    }

    /// The adapter with factors of fused experts in place of those of each expert's matrices, as PEFT has it in
    /// transformers 5: `experts.gate_up_proj` and `experts.down_proj` of modules with `experts` experts. The updates are
    /// the same: a gate and an up projection with different A have the sum of their ranks, and an expert without factors
    /// has zeros.
    ///
    /// # Errors
    /// If no layer is a matrix of an expert; if an expert's index is not below `experts`; if the matrices of a module
    /// differ in shape; and for `use_dora` and `lora_bias`, which PEFT does not have for parameters.
    pub fn fuse_experts(&self, experts: usize) -> Result<Self> {
        let mut layers = self.layers.clone();
        let mut modules =
            BTreeMap::<String, BTreeMap<(usize, usize), (&str, &LayerWeights)>>::new();
        let whole = self.joined()?;
        for (path, layer) in whole.layers() {
            let Some((module, expert, projection, _)) = single(path) else { continue };
            if expert >= experts {
                let reason = format!("it is of expert {expert}, the module has {experts}");
                return Err(Error::tensor(Part::A.at(path), reason));
            }
            if let Some(part) = layer.other_part() {
                let reason = "fused experts have factors alone, PEFT's target_parameters no use_dora and no lora_bias";
                return Err(Error::tensor(part.at(path), reason));
            }
            layers.remove(path);
            // transformers 5 has one name for the module.
            let module = renamed(module, ["block_sparse_moe", "mlp"], true);
            let of_module = modules.entry(module).or_default();
            if of_module.insert((expert, projection), (path, layer)).is_some() {
                return Err(Error::tensor(Part::A.at(path), "the expert has it under two names"));
            }
        }
        if modules.is_empty() {
            let reason = "no layer is a matrix of an expert, such as `experts.0.gate_proj`";
            return Err(Error::Invalid(reason.to_owned()));
        }
        let rslora = self.options.lora.rslora;
        for (module, found) in modules {
            let mut index = 0;
            for (name, places) in [(GATE_UP, &[0, 1][..]), (DOWN, &[2])] {
                if let Some(mut layer) = fuse(experts, places, &found, rslora)? {
                    layer.kind = Some(LayerKind::Parameter { index });
                    layers.insert(format!("{module}.{name}"), layer);
                    index += 1;
                }
            }
        }
        Self { layers, ..self.clone() }.checked()
    }

    /// The adapter with experts as a base has them, in which these tensors exist; `dims` gives their shapes.
    pub(crate) fn with_experts_of(
        &self,
        exists: impl Fn(&str) -> bool,
        dims: impl Fn(&str) -> Option<Vec<usize>>,
    ) -> Result<Self> {
        let weight = |path: String| Part::Base("weight").at(&path);
        let parameter = self.layers.iter().find_map(|(path, layer)| {
            // A base that gives both, as `split_experts`, is for a model that reads the matrices of each.
            let (module, name) = fused(path).filter(|_| layer.is_parameter())?;
            let place = if name == DOWN { 2 } else { 0 };
            ExpertNames::ALL.into_iter().find(|names| exists(&weight(names.path(module, 0, place))))
        });
        if let Some(names) = parameter {
            return self.split_experts_of(names, dims);
        }
        let count = self.layers.keys().find_map(|path| {
            let (module, _, projection, _) = single(path)?;
            let name = if projection == 2 { DOWN } else { GATE_UP };
            let fused = format!("{}.{name}", renamed(module, ["block_sparse_moe", "mlp"], true));
            let is_apart = exists(&weight(path.clone()));
            dims(&fused).filter(|dims| !is_apart && dims.len() == 3).map(|dims| dims[0])
        });
        match count {
            Some(experts) => self.fuse_experts(experts),
            None => Ok(self.clone()),
        }
    }
}

/// The factors of each of the fused experts, A on the inputs.
fn split(layer: &LayerWeights, is_swapped: bool) -> candle_core::Result<Vec<LayerWeights>> {
    let ((experts, r, _), (of_b, _, of_r)) = (layer.a.dims3()?, layer.b.dims3()?);
    if experts != of_b || r != of_r {
        candle_core::bail!("lora_A is {:?} and lora_B {:?}", layer.a.dims(), layer.b.dims())
    }
    let expert = |e: usize| {
        let (mut a, mut b) = (layer.a.get(e)?, layer.b.get(e)?);
        if is_swapped {
            (a, b) = (b.t()?, a.t()?);
        }
        let (a, b) = (a.contiguous()?, b.contiguous()?);
        let kind = Some(LayerKind::Linear);
        Ok(LayerWeights { a, b, kind, fan_in_fan_out: None, ..layer.clone() })
    };
    (0..experts).map(expert).collect()
}

/// The gate and the up projection of one expert.
fn halved(path: &str, layer: LayerWeights) -> Result<Vec<LayerWeights>> {
    let outs = layer.b.dim(0)?;
    if outs % 2 > 0 {
        let reason =
            format!("it has {outs} outputs, expected those of a gate and an up projection");
        return Err(Error::tensor(path, reason));
    }
    let half = |start| -> Result<_> {
        Ok(LayerWeights { b: layer.b.narrow(0, start, outs / 2)?.contiguous()?, ..layer.clone() })
    };
    Ok(vec![half(0)?, half(outs / 2)?])
}

/// One layer of the matrices of all experts at these places, whose outputs are one behind the other.
fn fuse(
    experts: usize,
    places: &[usize],
    found: &BTreeMap<(usize, usize), (&str, &LayerWeights)>,
    rslora: bool,
) -> Result<Option<LayerWeights>> {
    let all = found.iter().filter(|((_, place), _)| places.contains(place));
    let Some((_, (first_path, first))) = all.clone().next() else { return Ok(None) };
    let scaling = |layer: &LayerWeights| match rslora {
        true => layer.lora_alpha / (layer.r as f64).sqrt(),
        false => layer.lora_alpha / layer.r as f64,
    };
    let sizes = |layer: &LayerWeights| Ok::<_, Error>((layer.a.dims2()?.1, layer.b.dims2()?.0));
    let (common, (inputs, outs)) = (scaling(first), sizes(first)?);
    for (_, (path, layer)) in all {
        if sizes(layer)? != (inputs, outs) {
            let reason = format!(
                "lora_A is {:?} and lora_B {:?}, those of {first_path:?} {:?} and {:?}",
                layer.a.dims(),
                layer.b.dims(),
                first.a.dims(),
                first.b.dims()
            );
            return Err(Error::tensor(Part::A.at(path), reason));
        }
    }
    // A (r, in) and B (out, r) of each expert, with the scaling in B where it is another.
    let mut each = vec![];
    for expert in 0..experts {
        let (mut a, mut b) = (Vec::<Tensor>::new(), vec![]);
        for (i, place) in places.iter().enumerate() {
            let Some((_, layer)) = found.get(&(expert, *place)) else { continue };
            let own = match scaling(layer) == common {
                true => layer.b.clone(),
                false => (&layer.b * (scaling(layer) / common))?,
            };
            let own = own.pad_with_zeros(0, i * outs, (places.len() - 1 - i) * outs)?;
            let shared = match a.last() {
                Some(last) if super::is_equal(last, &layer.a)? => b.pop(),
                _ => None,
            };
            match shared {
                // One A for both: their outputs do not overlap.
                Some(other) => b.push((other + own)?),
                None => {
                    a.push(layer.a.clone());
                    b.push(own);
                }
            }
        }
        each.push(match a.is_empty() {
            true => None,
            false => Some((Tensor::cat(&a, 0)?, Tensor::cat(&b, 1)?)),
        });
    }
    let ranks: BTreeSet<_> = each.iter().flatten().map(|(a, _)| a.dims()[0]).collect();
    let rank = ranks.last().copied().unwrap_or(first.r);
    let (mut all_a, mut all_b) = (vec![], vec![]);
    for own in each {
        let (a, b) = match own {
            Some(own) => own,
            None => (
                Tensor::zeros((0, inputs), first.a.dtype(), first.a.device())?,
                Tensor::zeros((places.len() * outs, 0), first.b.dtype(), first.b.device())?,
            ),
        };
        let missing = rank - a.dim(0)?;
        all_a.push(a.pad_with_zeros(0, 0, missing)?);
        all_b.push(b.pad_with_zeros(1, 0, missing)?);
    }
    let tensors = [Tensor::stack(&all_a, 0)?, Tensor::stack(&all_b, 0)?];
    Ok(Some(LayerWeights::new(None, Factors::scaled(tensors, rank, common, rslora))))
}
