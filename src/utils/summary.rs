//! A table of the adapted layers and the trainable parameters.

use super::trainable::Trainable;
use crate::layers::Part;
use crate::Result;
use candle_nn::VarMap;
use std::collections::BTreeMap;
use std::fmt;

/// The result of [`summary`]. It is displayed as a table with a row for each adapted layer and each other
/// trainable tensor; the last line is that of PEFT's `print_trainable_parameters`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Summary {
    /// The adapted layers, sorted by name.
    pub adapted: Vec<AdaptedLayer>,
    /// Names and shapes of the other trainable tensors: biases, a new head.
    pub others: BTreeMap<String, Vec<usize>>,
    /// The number of parameters of the whole model, if it was given by [`with_total`](Self::with_total).
    pub total: Option<usize>,
}

/// An adapted layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdaptedLayer {
    /// The layer's path.
    pub name: String,
    /// The shape of `lora_A`.
    pub a: Vec<usize>,
    /// The shape of `lora_B`.
    pub b: Vec<usize>,
    /// The length of DoRA's `lora_magnitude_vector`, or 0.
    pub magnitude: usize,
}

impl AdaptedLayer {
    /// The rank: r, also in each split of a `MergedLinear`; r·k in a convolution.
    pub fn rank(&self) -> usize {
        self.b.last().copied().unwrap_or(0)
    }

    /// The number of elements of both factors and the magnitude.
    pub fn parameters(&self) -> usize {
        elem_count(&self.a) + elem_count(&self.b) + self.magnitude
    }
}

/// The adapted layers and the trainable parameters of a model.
///
/// ```
/// use candle_core::{DType, Device};
/// use candle_nn::{VarBuilder, VarMap};
/// use loralib as lora;
///
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let cfg = lora::LoraConfig { r: 4, ..Default::default() };
/// let _fc = lora::linear(6, 5, cfg, vb.pp("fc"))?;
/// let summary = lora::utils::summary(&vars, lora::Bias::None)?.with_total(5 * 6 + 5 + 44);
/// assert_eq!(
///     summary.to_string(),
///     "\
/// layer   lora_A  lora_B  rank  parameters
/// fc      (4, 6)  (5, 4)     4          44
/// trained 44 of 79 parameters (55.70 %)"
/// );
/// # Ok::<(), lora::Error>(())
/// ```
///
/// # Errors
/// If nothing is trainable, or nothing in a named module.
pub fn summary(vars: &VarMap, trainable: impl Into<Trainable>) -> Result<Summary> {
    let trained = trainable.into().trained(vars)?;
    let mut others: BTreeMap<_, _> =
        trained.iter().map(|(name, var)| (name.clone(), var.dims().to_vec())).collect();
    let mut adapted = vec![];
    for name in trained.keys() {
        let (layer, Part::A) = Part::parse(name) else { continue };
        // A factor without the other one is not an adapted layer, but it is trained.
        if let Some(b) = others.remove(&Part::B.at(layer)) {
            let a = others.remove(name).unwrap_or_default();
            let magnitude = others.remove(&Part::Magnitude.at(layer));
            let magnitude = magnitude.map_or(0, |dims| elem_count(&dims));
            adapted.push(AdaptedLayer { name: layer.to_owned(), a, b, magnitude });
        }
    }
    Ok(Summary { adapted, others, total: None })
}

impl Summary {
    /// Sets the number of parameters of the whole model, for the trainable share.
    pub fn with_total(self, total: usize) -> Self {
        Self { total: Some(total), ..self }
    }

    /// The number of trainable parameters.
    pub fn trainable(&self) -> usize {
        let adapted = self.adapted.iter().map(AdaptedLayer::parameters);
        adapted.chain(self.others.values().map(|dims| elem_count(dims))).sum()
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rows = vec![];
        if !self.adapted.is_empty() {
            let has_magnitudes = self.adapted.iter().any(|layer| layer.magnitude > 0);
            let magnitude = if has_magnitudes { "magnitude" } else { "" };
            let (a, b) = (Part::A.name(), Part::B.name());
            let head = ["layer", a, b, magnitude, "rank", "parameters"];
            rows.push(head.map(str::to_owned));
        }
        for layer in &self.adapted {
            let [a, b] = [&layer.a, &layer.b].map(|dims| shape(dims));
            let magnitude = match layer.magnitude {
                0 => String::new(),
                len => shape(&[len]),
            };
            let (rank, parameters) = (layer.rank().to_string(), grouped(layer.parameters()));
            rows.push([layer.name.clone(), a, b, magnitude, rank, parameters]);
        }
        if !self.others.is_empty() {
            let head = if rows.is_empty() { "trained" } else { "also trained" };
            rows.push([head, "shape", "", "", "", "parameters"].map(str::to_owned));
        }
        for (name, dims) in &self.others {
            let [b, magnitude, rank] = Default::default();
            let parameters = grouped(elem_count(dims));
            rows.push([name.clone(), shape(dims), b, magnitude, rank, parameters]);
        }
        let mut widths = [0, 1, 2, 3, 4, 5]
            .map(|i| rows.iter().map(|row| row[i].chars().count()).max().unwrap_or(0));
        // At least the width of the last line's first word.
        widths[0] = widths[0].max(6);
        for row in &rows {
            let cells = row.iter().zip(widths).enumerate().filter(|(_, (_, width))| *width > 0);
            let cells = cells.map(|(i, (cell, width))| match i < 4 {
                true => format!("{cell:<width$}"),
                false => format!("{cell:>width$}"),
            });
            writeln!(f, "{}", cells.collect::<Vec<_>>().join("  "))?;
        }
        write!(f, "trained {}", grouped(self.trainable()))?;
        match self.total {
            None => write!(f, " parameters"),
            Some(total) => {
                let share = 100. * self.trainable() as f64 / total as f64;
                write!(f, " of {} parameters ({share:.2} %)", grouped(total))
            }
        }
    }
}

fn elem_count(dims: &[usize]) -> usize {
    dims.iter().product()
}

fn shape(dims: &[usize]) -> String {
    let dims: Vec<_> = dims.iter().map(usize::to_string).collect();
    format!("({})", dims.join(", "))
}

/// 1234567 as 1,234,567.
fn grouped(n: usize) -> String {
    let digits = n.to_string();
    let groups = digits.as_bytes().rchunks(3).rev().map(String::from_utf8_lossy);
    groups.collect::<Vec<_>>().join(",")
}
