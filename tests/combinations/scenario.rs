//! A small model with some features, beside the formula.

use crate::feature::Feature::{self, *};
use crate::fixture::{self, HIDDEN, VOCAB};
use crate::reference::{forward, weight, with_rows, Factors, Layer, TRAINED};
use candle_core::backprop::GradStore;
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Module, Tensor, Var};
use candle_nn::VarBuilder;
use loralib::adapter::AdapterConfig;
use loralib::formats::{diffusers, kohya, mlx};
use loralib::layers::InitLoraWeights;
use loralib::{gguf, nn, Adapter, Adapters, LoraConfig, LoraWeights, Result};
use std::collections::HashMap;
use std::sync::Arc;

const CPU: Device = Device::Cpu;
const R: usize = 4;
const HEAD: &str = "lm_head.weight";
const TABLE: &str = "model.embed_tokens";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Update {
    Lora,
    Dora,
    Pissa,
    BiasOfB,
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
            Lora | Dora | Pissa | BiasOfB => 0,
            Tied | TiedUpdate | TokenRows | Embedding | Convolution => 1,
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
            BiasOfB => self.update = Update::BiasOfB,
            Quantised => self.is_quantised = true,
            Tied => self.layer = Layer::Tied,
            TiedUpdate => self.layer = Layer::TiedUpdate,
            TokenRows => self.layer = Layer::Rows,
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
            Layer::Rows => "model.layers.0.self_attn.q_proj",
            Layer::Embedding | Layer::Tied | Layer::TiedUpdate => TABLE,
            Layer::Conv => "model.conv",
        }
    }

    /// The base's tensors. A tied base has no head.
    fn tensors(&self) -> HashMap<String, Tensor> {
        let mut tensors: HashMap<_, _> =
            fixture::model("llama", !self.is_tied()).into_iter().collect();
        tensors.insert("model.conv.weight".to_owned(), fixture::random(99, &[4, 3, 3, 3]));
        if self.update == Update::BiasOfB {
            let out = tensors[&format!("{}.weight", self.path())].dims()[0];
            tensors.insert(format!("{}.bias", self.path()), fixture::random(98, &[out]));
        }
        tensors
    }

    fn is_tied(&self) -> bool {
        matches!(self.layer, Layer::Tied | Layer::TiedUpdate | Layer::Rows)
    }

    /// The base, and the values of the weight in it, and of the table.
    fn base(&self) -> Result<(VarBuilder<'static>, [Tensor; 2])> {
        let names = [self.path(), TABLE].map(|path| format!("{path}.weight"));
        let tensors = self.tensors();
        if !self.is_quantised {
            let weights = names.map(|name| tensors[&name].clone());
            return Ok((VarBuilder::from_tensors(tensors, DType::F32, &CPU), weights));
        }
        let dtype = |t: &Tensor| if t.rank() == 2 { GgmlDType::Q8_0 } else { GgmlDType::F32 };
        let quantised =
            |(n, t): (String, Tensor)| Ok((n, Arc::new(QTensor::quantize(&t, dtype(&t))?)));
        let blocks = tensors.into_iter().map(quantised).collect::<Result<HashMap<_, _>>>()?;
        let [weight, table] = names.map(|name| blocks[&name].dequantize(&CPU));
        Ok((gguf::var_builder(blocks, DType::F32, &CPU), [weight?, table?]))
    }

    fn adapter(&self, seed: u64) -> Adapter {
        let init_lora_weights = match self.update {
            Update::Pissa => InitLoraWeights::Pissa,
            _ => InitLoraWeights::Uniform,
        };
        let cfg = LoraConfig {
            r: R,
            lora_alpha: 6.,
            lora_dropout: self.dropout,
            use_dora: self.update == Update::Dora,
            lora_bias: self.update == Update::BiasOfB,
            init_lora_weights,
            ..Default::default()
        };
        let mut config = AdapterConfig::from(cfg);
        config.ensure_weight_tying = self.layer == Layer::TiedUpdate;
        if self.layer == Layer::Rows {
            config.trainable_token_indices.insert("embed_tokens".to_owned(), TRAINED.to_vec());
        }
        Adapter::new(config).targets([self.path()]).seed(seed)
    }

    pub fn run(&self) -> Result<()> {
        let (base, [w, table]) = self.base()?;
        let (a, b, set) = (self.adapter(1), self.adapter(2), Adapters::new());
        let net = match self.through {
            Through::Model => Net::new(self, &a.var_builder(base.clone()))?,
            _ => Net::new(self, &set.var_builder(base.clone()))?,
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
            self.trains((&w, &table), &x, (&a, &b), || serve(&run))?;
        }
        a.eval()?;
        b.eval()?;
        let y = serve(&plain)?;
        let expected = self.expected((&w, &table), &x, (&factors(&a)?, &factors(&b)?))?;
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
        w: (&Tensor, &Tensor),
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
                    Some("lora_bias") => factors.bias.as_ref().unwrap(),
                    Some("trainable_tokens") => factors.rows.as_ref().unwrap(),
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
    fn expected(
        &self,
        (w, table): (&Tensor, &Tensor),
        x: &Tensor,
        (a, b): (&Factors, &Factors),
    ) -> Result<Tensor> {
        let of = |summands: &[(&Factors, f64)]| -> Result<Tensor> {
            let table = match summands {
                [(Factors { rows: Some(rows), .. }, _), ..] => with_rows(table, rows)?,
                _ => table.clone(),
            };
            let y = forward(self.layer, x, &weight(self.layer, w, summands)?, &table)?;
            let Some((Factors { bias: Some(bias), scaling, .. }, _)) = summands.first() else {
                return Ok(y);
            };
            let own = self.tensors()[&format!("{}.bias", self.path())].to_dtype(DType::F64)?;
            let bias = (own + (bias * *scaling)?)?;
            Ok(match self.layer {
                Layer::Conv => y.broadcast_add(&bias.reshape((1, (), 1, 1))?)?,
                Layer::Rows => {
                    y.broadcast_add(&bias.unsqueeze(0)?.matmul(&table.to_dtype(DType::F64)?.t()?)?)?
                }
                _ => y.broadcast_add(&bias)?,
            })
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
        let table = &self.base()?.1[1];
        let head = || merged.get(table.shape(), HEAD);
        match self.layer {
            Layer::Tied => assert!(apart(&head()?, table)? == 0., "{self:?}: the head"),
            Layer::TiedUpdate => assert!(apart(&head()?, expected)? < 1e-5, "{self:?}: the head"),
            Layer::Rows => {
                let rows = factors(adapter)?.rows.unwrap();
                let own = merged.get(table.shape(), &format!("{TABLE}.weight"))?;
                for table_of in [own, head()?] {
                    let apart = apart(&table_of, &with_rows(table, &rows)?)?;
                    assert!(apart < 1e-6, "{self:?}: the rows");
                }
            }
            _ => {}
        }
        if self.update == Update::BiasOfB {
            let own = self.tensors()[&format!("{}.bias", self.path())].clone();
            let bias = merged.get(own.shape(), &format!("{}.bias", self.path()))?;
            let Factors { bias: of_b, scaling, .. } = factors(adapter)?;
            let expected = (own.to_dtype(DType::F64)? + (of_b.unwrap() * scaling)?)?;
            assert!(apart(&bias, &expected)? < 1e-6, "{self:?}: the bias");
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
                let head = !self.is_tied();
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
            Layer::Embedding | Layer::Tied | Layer::TiedUpdate | Layer::Rows => {
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
    Rows(nn::Embedding, nn::Linear, nn::Linear),
}

impl Net {
    fn new(scenario: &Scenario, vb: &VarBuilder) -> Result<Self> {
        let table = || nn::embedding(VOCAB, HIDDEN, vb.pp(TABLE));
        let linear = |out| {
            let (path, bias) = (vb.pp(scenario.path()), scenario.update == Update::BiasOfB);
            nn::linear_b(HIDDEN, out, bias, path)
        };
        Ok(match scenario.layer {
            Layer::Linear => Self::Linear(linear(HIDDEN / 2)?),
            Layer::Embedding => Self::Embedding(table()?),
            Layer::Conv => {
                let padded = candle_nn::Conv2dConfig { padding: 1, ..Default::default() };
                let vb = vb.pp("model.conv");
                Self::Conv(match scenario.update {
                    Update::BiasOfB => nn::conv2d(3, 4, 3, padded, vb)?,
                    _ => nn::conv2d_no_bias(3, 4, 3, padded, vb)?,
                })
            }
            Layer::Tied | Layer::TiedUpdate | Layer::Rows => {
                let table = table()?;
                let head = nn::Linear::new(table.embeddings().clone(), None);
                match scenario.layer {
                    Layer::Rows => Self::Rows(table, linear(HIDDEN)?, head),
                    _ => Self::Tied(table, head),
                }
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
            Self::Rows(table, layer, head) => head.forward(&layer.forward(&table.forward(x)?)?),
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
        bias: of(".lora_bias")?,
        rows: of(".trainable_tokens")?,
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
