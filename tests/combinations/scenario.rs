//! A small model with some features, beside the formula.

use crate::feature::Feature::{self, *};
use crate::fixture::{self, HIDDEN, VOCAB};
use crate::reference::{forward, weight, Factors, Layer};
use candle_core::backprop::GradStore;
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Module, Tensor, Var};
use candle_nn::VarBuilder;
use loralib::formats::{diffusers, kohya, mlx};
use loralib::layers::InitLoraWeights;
use loralib::{gguf, nn, Adapter, Adapters, LoraConfig, LoraWeights, Result};
use std::collections::HashMap;
use std::sync::Arc;

const CPU: Device = Device::Cpu;
const R: usize = 4;
const HEAD: &str = "lm_head.weight";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Update {
    Lora,
    Dora,
    Pissa,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Through {
    Model,
    With,
    Rows,
    Sum,
}

/// The features of one model; each field has the value of one feature at most.
#[derive(Debug, Clone)]
pub struct Scenario {
    update: Update,
    layer: Layer,
    through: Through,
    file: Option<Feature>,
    is_quantised: bool,
    dropout: f32,
    checkpoints: bool,
}

impl Scenario {
    /// Both features, unless one excludes the other.
    pub fn of(one: Feature, other: Feature) -> Option<Self> {
        let plain = Self {
            update: Update::Lora,
            layer: Layer::Linear,
            through: Through::Model,
            file: None,
            is_quantised: false,
            dropout: 0.,
            checkpoints: false,
        };
        let kind = |feature| match feature {
            Lora | Dora | Pissa => 0,
            Tied | Embedding | Convolution => 1,
            Feature::Adapters | Rows | Sums => 2,
            Own | Peft | Diffusers | Kohya | Mlx | Gguf => 3,
            Quantised => 4,
            Dropout => 5,
            Checkpointing => 6,
        };
        (one == other || kind(one) != kind(other)).then(|| plain.with(one).with(other))
    }

    fn with(mut self, feature: Feature) -> Self {
        match feature {
            Lora => self.update = Update::Lora,
            Dora => self.update = Update::Dora,
            Pissa => self.update = Update::Pissa,
            Quantised => self.is_quantised = true,
            Tied => self.layer = Layer::Tied,
            Embedding => self.layer = Layer::Embedding,
            Convolution => self.layer = Layer::Conv,
            Dropout => self.dropout = 0.5,
            Checkpointing => self.checkpoints = true,
            Feature::Adapters => self.through = Through::With,
            Rows => self.through = Through::Rows,
            Sums => self.through = Through::Sum,
            Own | Peft | Diffusers | Kohya | Mlx | Gguf => self.file = Some(feature),
        }
        self
    }

    fn path(&self) -> &'static str {
        match self.layer {
            Layer::Linear => "model.layers.0.self_attn.v_proj",
            Layer::Embedding | Layer::Tied => "model.embed_tokens",
            Layer::Conv => "model.conv",
        }
    }

    /// The base's tensors. A tied base has no head.
    fn tensors(&self) -> HashMap<String, Tensor> {
        let mut tensors: HashMap<_, _> =
            fixture::model("llama", self.layer != Layer::Tied).into_iter().collect();
        tensors.insert("model.conv.weight".to_owned(), fixture::random(99, &[4, 3, 3, 3]));
        tensors
    }

    /// The base, and the values of the weight in it.
    fn base(&self) -> Result<(VarBuilder<'static>, Tensor)> {
        let name = format!("{}.weight", self.path());
        let tensors = self.tensors();
        if !self.is_quantised {
            let weight = tensors[&name].clone();
            return Ok((VarBuilder::from_tensors(tensors, DType::F32, &CPU), weight));
        }
        let dtype = |t: &Tensor| if t.rank() == 2 { GgmlDType::Q8_0 } else { GgmlDType::F32 };
        let quantised =
            |(n, t): (String, Tensor)| Ok((n, Arc::new(QTensor::quantize(&t, dtype(&t))?)));
        let blocks = tensors.into_iter().map(quantised).collect::<Result<HashMap<_, _>>>()?;
        let weight = blocks[&name].dequantize(&CPU)?;
        Ok((gguf::var_builder(blocks, DType::F32, &CPU), weight))
    }

    fn adapter(&self, seed: u64) -> Adapter {
        let init_lora_weights = match self.update {
            Update::Pissa => InitLoraWeights::Pissa,
            Update::Lora | Update::Dora => InitLoraWeights::Uniform,
        };
        let cfg = LoraConfig {
            r: R,
            lora_alpha: 6.,
            lora_dropout: self.dropout,
            use_dora: self.update == Update::Dora,
            init_lora_weights,
            ..Default::default()
        };
        Adapter::new(cfg).targets([self.path()]).seed(seed)
    }

    pub fn run(&self) -> Result<()> {
        let (base, w) = self.base()?;
        let (a, b, set) = (self.adapter(1), self.adapter(2), Adapters::new());
        let net = match self.through {
            Through::Model => Net::new(self.layer, &a.var_builder(base.clone()))?,
            _ => Net::new(self.layer, &set.var_builder(base.clone()))?,
        };
        if self.through != Through::Model {
            set.add("a", &a)?;
            set.add("b", &b)?;
            randomize(&b)?;
        }
        a.check()?;
        randomize(&a)?;
        if self.through == Through::Rows {
            a.eval()?;
            b.eval()?;
        }
        let (net, x) = (Arc::new(net), self.input()?);
        let serve = |forward: &(dyn Fn() -> candle_core::Result<Tensor> + Sync)| -> Result<Tensor> {
            match self.through {
                Through::Model => Ok(forward()?),
                Through::With => set.with("a", || Ok(forward()?)),
                Through::Sum => set.with([("a", 0.5), ("b", 2.)], || Ok(forward()?)),
                Through::Rows => set.with_rows(&[Some("a"), None], || Ok(forward()?)),
            }
        };
        let plain = || net.forward(&x);
        let run = || match self.checkpoints {
            false => net.forward(&x),
            true => {
                let net = net.clone();
                a.checkpoint("", &x, move |x| net.forward(x))
            }
        };
        if self.dropout > 0. {
            let first = serve(&run)?;
            a.set_dropout_position(0)?;
            assert!(apart(&first, &serve(&run)?)? == 0., "{self:?}: the same masks");
        } else {
            self.trains(&w, &x, (&a, &b), || serve(&run))?;
        }
        a.eval()?;
        b.eval()?;
        let y = serve(&plain)?;
        let expected = self.expected(&w, &x, (&factors(&a)?, &factors(&b)?))?;
        assert!(apart(&y, &expected)? < 1e-5, "{self:?} in evaluation");
        let alone = weight(self.layer, &w, &[(&factors(&a)?, 1.)])?;
        self.merges(&a, &base, &alone)?;
        if let Some(format) = self.file {
            let dir = tempfile::tempdir()?;
            let folder = dir.path().join("adapter");
            std::fs::create_dir(&folder)?;
            let weights = self.through_a_file(format, &a.weights()?, &folder)?;
            self.merges(&Adapter::from_weights(&weights)?, &base, &alone)?;
        }
        Ok(())
    }

    /// The output and the gradients are those of the formula.
    fn trains(
        &self,
        w: &Tensor,
        x: &Tensor,
        (a, b): (&Adapter, &Adapter),
        run: impl Fn() -> Result<Tensor>,
    ) -> Result<()> {
        let y = run()?;
        let (fa, fb) = (factors(a)?, factors(b)?);
        let expected = self.expected(w, x, (&fa, &fb))?;
        assert!(apart(&y, &expected)? < 1e-5, "{self:?} in training");
        if self.through == Through::Rows {
            return Ok(()); // which do not train
        }
        let (grads, expected) = (loss_grads(&y)?, loss_grads(&expected)?);
        let used: &[(&Adapter, &Factors)] = match self.through {
            Through::Sum => &[(a, &fa), (b, &fb)],
            _ => &[(a, &fa)],
        };
        for (adapter, factors) in used {
            for (name, var) in adapter.named_vars()? {
                let reference = match name.rsplit_once('.').map(|(_, last)| last) {
                    Some("lora_A") => &factors.a,
                    Some("lora_B") => &factors.b,
                    _ => factors.magnitude.as_ref().unwrap(),
                };
                let (Some(ours), Some(theirs)) = (grads.get(&var), expected.get(reference)) else {
                    panic!("{self:?}: {name} has no gradient")
                };
                assert!(apart(ours, &theirs.reshape(ours.shape())?)? < 1e-4, "{self:?}: {name}");
            }
        }
        Ok(())
    }

    /// The output by the formula.
    fn expected(&self, w: &Tensor, x: &Tensor, (a, b): (&Factors, &Factors)) -> Result<Tensor> {
        let of = |summands: &[(&Factors, f64)]| -> Result<Tensor> {
            Ok(forward(self.layer, x, &weight(self.layer, w, summands)?, w)?)
        };
        Ok(match self.through {
            Through::Model | Through::With => of(&[(a, 1.)])?,
            Through::Sum => of(&[(a, 0.5), (b, 2.)])?,
            Through::Rows => {
                let (first, second) = (of(&[(a, 1.)])?, of(&[])?);
                Tensor::cat(&[first.narrow(0, 0, 1)?, second.narrow(0, 1, 1)?], 0)?
            }
        })
    }

    /// A model on the merged base has this weight, and a tied head the base's table.
    fn merges(&self, adapter: &Adapter, base: &VarBuilder, expected: &Tensor) -> Result<()> {
        let merged = adapter.merged(base.clone())?;
        let w = merged.get(expected.shape(), &format!("{}.weight", self.path()))?;
        assert!(apart(&w, expected)? < 1e-5, "{self:?} merged");
        if self.layer == Layer::Tied {
            let head = merged.get(expected.shape(), HEAD)?;
            assert!(apart(&head, &self.base()?.1)? == 0., "{self:?}: the head");
        }
        adapter.check()
    }

    /// The adapter after a file of a format.
    fn through_a_file(
        &self,
        format: Feature,
        weights: &LoraWeights,
        dir: &std::path::Path,
    ) -> Result<LoraWeights> {
        let file = dir.join("adapter.safetensors");
        match format {
            Own => {
                Adapter::from_weights(weights)?.save(&file)?;
                Adapter::load(&file, &CPU)?.weights()
            }
            Peft => {
                Adapter::from_weights(weights)?.save_pretrained(dir)?;
                Adapter::load(dir, &CPU)?.weights()
            }
            Diffusers => {
                diffusers::save(&file, &weights.in_component("unet"))?;
                diffusers::load(&file, &CPU)?.component("unet")
            }
            Kohya => {
                kohya::save(&file, &weights.in_component("unet"))?;
                let names: Vec<_> =
                    self.tensors().into_keys().map(|name| format!("unet.{name}")).collect();
                kohya::with_paths(&kohya::load(&file, &CPU)?, &names)?.component("unet")
            }
            Mlx => {
                mlx::save(dir, weights)?;
                mlx::load(dir, &CPU)
            }
            _ => {
                let head = self.layer != Layer::Tied;
                let base = fixture::write_model(dir, "llama", head, GgmlDType::F32);
                let base = gguf::File::open(base)?;
                gguf::save_adapter(dir.join("adapter.gguf"), weights, &base)?;
                gguf::load_adapter(dir.join("adapter.gguf"), &base, &CPU)
            }
        }
    }

    /// Two rows.
    fn input(&self) -> Result<Tensor> {
        Ok(match self.layer {
            Layer::Linear => fixture::random(7, &[2, 3, HIDDEN]),
            Layer::Conv => fixture::random(7, &[2, 3, 5, 6]),
            Layer::Embedding | Layer::Tied => {
                let ids = (0..6u32).map(|i| i * 7 % VOCAB as u32);
                Tensor::from_iter(ids, &CPU)?.reshape((2, 3))?
            }
        })
    }
}

/// One layer, or a table with a head that is tied to it.
enum Net {
    Linear(nn::Linear),
    Embedding(nn::Embedding),
    Conv(nn::Conv2d),
    Tied(nn::Embedding, nn::Linear),
}

impl Net {
    fn new(layer: Layer, vb: &VarBuilder) -> Result<Self> {
        let table = || nn::embedding(VOCAB, HIDDEN, vb.pp("model.embed_tokens"));
        Ok(match layer {
            Layer::Linear => {
                let vb = vb.pp("model.layers.0.self_attn.v_proj");
                Self::Linear(nn::linear_no_bias(HIDDEN, HIDDEN / 2, vb)?)
            }
            Layer::Embedding => Self::Embedding(table()?),
            Layer::Conv => {
                let padded = candle_nn::Conv2dConfig { padding: 1, ..Default::default() };
                Self::Conv(nn::conv2d_no_bias(3, 4, 3, padded, vb.pp("model.conv"))?)
            }
            Layer::Tied => {
                let table = table()?;
                let head = nn::Linear::new(table.embeddings().clone(), None);
                Self::Tied(table, head)
            }
        })
    }
}

impl Module for Net {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        match self {
            Self::Linear(layer) => layer.forward(x),
            Self::Embedding(layer) => layer.forward(x),
            Self::Conv(layer) => layer.forward(x),
            Self::Tied(table, head) => head.forward(&table.forward(x)?),
        }
    }
}

/// Gives the variables values that are far from their first ones.
fn randomize(adapter: &Adapter) -> Result<()> {
    for (i, (name, var)) in adapter.named_vars()?.into_iter().enumerate() {
        let values = fixture::random(i as u64 + 20, var.dims());
        let values = match name.ends_with("magnitude_vector") {
            true => (values.abs()? + 3.)?,
            false => (values * 0.3)?,
        };
        var.set(&values.to_dtype(var.dtype())?)?;
    }
    Ok(())
}

/// Variables of the formula with the adapter's present values.
fn factors(adapter: &Adapter) -> Result<Factors> {
    let (mut named, scaling) =
        (adapter.named_vars().unwrap_or_default(), adapter.config().lora.scaling());
    named.extend(adapter.frozen_vars());
    let of = |last: &str| -> Result<Option<Tensor>> {
        let found = named.iter().find(|(name, _)| name.ends_with(last));
        let copy = |var: &Var| -> Result<Tensor> {
            Ok(Var::from_tensor(&var.copy()?.detach().to_dtype(DType::F64)?)?.into_inner())
        };
        found.map(|(_, var)| copy(var)).transpose()
    };
    let zeros = || Ok::<_, loralib::Error>(Tensor::zeros((1, 1), DType::F64, &CPU)?);
    let initial = [of(".lora_A_initial")?, of(".lora_B_initial")?];
    let initial = match initial {
        [Some(a), Some(b)] => Some([a, b]),
        _ => None,
    };
    Ok(Factors {
        a: of(".lora_A")?.map_or_else(zeros, Ok)?,
        b: of(".lora_B")?.map_or_else(zeros, Ok)?,
        magnitude: of("magnitude_vector")?,
        initial,
        scaling,
    })
}

fn loss_grads(y: &Tensor) -> Result<GradStore> {
    Ok(y.to_dtype(DType::F64)?.sqr()?.mean_all()?.backward()?)
}

/// The largest difference, relative to the largest value.
fn apart(a: &Tensor, b: &Tensor) -> Result<f64> {
    let wide = |t: &Tensor| t.detach().flatten_all()?.to_dtype(DType::F64);
    let (a, b) = (wide(a)?, wide(b)?);
    let largest = |t: &Tensor| t.abs()?.max(0)?.to_scalar::<f64>();
    let apart = largest(&(a - &b)?)? / largest(&b)?.max(1e-12);
    Ok(if apart.is_nan() { f64::INFINITY } else { apart })
}
