//! The matrices of single experts, of a base that has them in one tensor.

use super::cache::Cache;
use super::source::{from_source, Source, Wanted};
use crate::layers::Part;
use crate::weights::ExpertProjection;
use crate::{Error, Result};
use candle_core::quantized::{QStorage, QTensor};
use candle_core::{DType, DeviceLocation, Tensor};
use candle_nn::VarBuilder;
use std::borrow::Cow;

/// `base` for a model with a layer for each expert, over a base with fused ones: `experts.0.gate_proj.weight` is a part of
/// `experts.gate_up_proj` (experts, 2·inner, hidden), as transformers 5 has it in memory, or of `experts.gate_proj`
/// (experts, inner, hidden), as llama.cpp. `up_proj`, `down_proj`, and Mixtral's `w1`, `w3` and `w2` are alike. (experts, in, out) is
/// transposed; of a square tensor the module's other one tells. A tensor that the base has itself stays. The parts are views,
/// and a transposed one a copy.
///
/// A fused quantised tensor is sliced by [`gguf::var_builder`](crate::gguf::var_builder) itself, and stays quantised.
///
/// ```
/// # fn main() -> loralib::Result<()> {
/// use candle_core::{DType, Device, Tensor};
/// use loralib::nn::{self, VarBuilder};
///
/// let fused = Tensor::arange(0f32, 24., &Device::Cpu)?.reshape((2, 4, 3))?; // gate and up of two experts
/// let base = [("mlp.experts.gate_up_proj".to_owned(), fused)].into();
/// let vb = loralib::base::split_experts(VarBuilder::from_tensors(base, DType::F32, &Device::Cpu));
/// let up = nn::linear_no_bias(3, 2, vb.pp("mlp.experts.1.up_proj"))?;
/// assert_eq!(up.weight().to_vec2::<f32>()?, [[18., 19., 20.], [21., 22., 23.]]);
/// # Ok(()) }
/// ```
pub fn split_experts(base: VarBuilder<'_>) -> VarBuilder<'_> {
    let (dtype, device) = (base.dtype(), base.device().clone());
    from_source(SplitExperts { base, fused: Cache::default() }, dtype, &device)
}

struct SplitExperts<'a> {
    base: VarBuilder<'a>,
    fused: Cache<(String, DeviceLocation, DType), Tensor>,
}

impl Source for SplitExperts<'_> {
    fn tensor(&self, name: &str, wanted: &Wanted) -> Result<Tensor> {
        let Some(part) = ExpertPart::find(name, |name| self.base.has(name)) else {
            return self.base.tensor(name, wanted);
        };
        let key = (part.fused.clone(), wanted.device.location(), wanted.dtype);
        let any = Wanted { shape: None, ..*wanted };
        let fused = self.fused.get(key, || Source::tensor(&self.base, &part.fused, &any))?;
        let sibling = |name: &str| {
            let name = Some(name).filter(|name| self.base.has(name))?;
            Some(Source::tensor(&self.base, name, &any).ok()?.dims().to_vec())
        };
        let Place { first, rows, is_transposed } =
            part.place(name, fused.dims(), wanted, sibling)?;
        let expert = fused.get(part.expert)?;
        Ok(match is_transposed {
            false => expert.narrow(0, first, rows)?,
            true => expert.narrow(1, first, rows)?.t()?.contiguous()?,
        })
    }

    fn has(&self, name: &str) -> bool {
        self.base.has(name) || ExpertPart::find(name, |name| self.base.has(name)).is_some()
    }
}

/// A part of a tensor of fused experts.
pub(crate) struct ExpertPart {
    /// The tensor's name.
    pub fused: String,
    expert: usize,
    /// Which of an expert's projections in the tensor, and of how many.
    part: (usize, usize),
}

/// The outputs of a part among those of its expert.
struct Place {
    first: usize,
    rows: usize,
    is_transposed: bool,
}

impl ExpertPart {
    /// Where the weight of this name is in a base that lacks it, and has fused experts.
    pub fn find(name: &str, has: impl Fn(&str) -> bool) -> Option<Self> {
        let (path, Part::Base("weight")) = Part::parse(name) else { return None };
        let projection = ExpertProjection::of(path).filter(|_| !has(name))?;
        let ExpertProjection { modules, expert, parameter, part } = projection;
        let alone = ["gate_proj", "up_proj"].get(part.0).filter(|_| part.1 == 2);
        let all = [(parameter, part)].into_iter().chain(alone.map(|alone| (*alone, (0, 1))));
        let named = all.flat_map(|(of, part)| {
            modules.iter().flat_map(move |module| {
                let fused = format!("{module}.{of}");
                [(Part::Base("weight").at(&fused), part), (fused, part)]
            })
        });
        let (fused, part) = named.into_iter().find(|(fused, _)| has(fused))?;
        Some(Self { fused, expert, part })
    }

    /// Where it is in a tensor of these dimensions; `sibling` gives those of the module's other tensor. An error if the tensor
    /// does not have it.
    fn place(
        &self,
        name: &str,
        dims: &[usize],
        wanted: &Wanted,
        sibling: impl Fn(&str) -> Option<Vec<usize>>,
    ) -> Result<Place> {
        let (part, parts) = self.part;
        let wrong = |reason: String| Err(Error::tensor(name, reason));
        let &[experts, rows, columns] = dims else {
            return wrong(format!("{:?} is {dims:?}, expected (experts, out, in)", self.fused));
        };
        if self.expert >= experts {
            return wrong(format!("{:?} has {experts} experts", self.fused));
        }
        let fits = |rows: usize, columns: usize| {
            let own = [rows / parts, columns];
            rows.is_multiple_of(parts) && wanted.shape.is_none_or(|shape| shape.dims() == own)
        };
        // (2·inner, hidden) or (hidden, inner), and transposed; of square ones the other tensor tells.
        let (gate_up, down) = ("gate_up_proj", "down_proj");
        let is_gate_up = self.fused.contains(gate_up);
        let (other, transposed) = match is_gate_up {
            true => (self.fused.replace(gate_up, down), [columns / 2, rows]),
            false => (self.fused.replace(down, gate_up), [columns, 2 * rows]),
        };
        let tells = || sibling(&other).is_some_and(|dims| dims.get(1..) == Some(&transposed));
        let is_transposed = match (fits(rows, columns), fits(columns, rows)) {
            (true, true) => tells(),
            (true, false) => false,
            (false, true) => true,
            (false, false) => {
                let shape = wanted.shape.map(|shape| shape.dims().to_vec()).unwrap_or_default();
                return wrong(format!(
                    "{:?} is {dims:?}, for {parts} projections, of which the model expects {shape:?}",
                    self.fused
                ));
            }
        };
        let rows = if is_transposed { columns } else { rows } / parts;
        Ok(Place { first: part * rows, rows, is_transposed })
    }

    /// The part of a quantised tensor, in its blocks.
    pub fn of_blocks(
        &self,
        name: &str,
        fused: &QTensor,
        wanted: &Wanted,
        sibling: impl Fn(&str) -> Option<Vec<usize>>,
    ) -> Result<QTensor> {
        let dims = fused.shape().dims();
        let Place { first, rows, is_transposed } = self.place(name, dims, wanted, sibling)?;
        if is_transposed {
            let reason =
                format!("{:?} is {dims:?} and quantised, expected (experts, out, in)", self.fused);
            return Err(Error::tensor(name, reason));
        }
        let (of_expert, columns) = (dims[1], dims[2]);
        let bytes = fused.data()?;
        let row = bytes.len() / (dims[0] * of_expert).max(1);
        let start = (self.expert * of_expert + first) * row;
        let bytes = bytes.get(start..start + rows * row).unwrap_or_default();
        let storage = QStorage::from_data(Cow::Borrowed(bytes), &fused.device(), fused.dtype())?;
        Ok(QTensor::new(storage, (rows, columns))?)
    }
}
