//! `classify`'s BERT and RoBERTa agree with transformers, and train the selected variables only.

use crate::bert::{Adapt, Bert};
use crate::classifier::Classifier;
use crate::common::{device, difference};
use crate::config::Config;
use crate::{names, Result};
use candle_core::{DType, Tensor};
use candle_nn::{VarBuilder, VarMap};
use lora::train::Pooling;
use lora::utils::{StateDict, Trainable};
use lora::{Bias, LoraConfig, LoraModule};
use loralib as lora;
use std::collections::HashSet;

const LABELS: usize = 3;

struct Fixture {
    config: Config,
    tensors: StateDict,
    ids: Tensor,
    real: Tensor,
    hidden: Tensor,
}

impl Fixture {
    fn read(name: &str) -> Result<Self> {
        let folder = format!("{}/tests/fixtures/{name}", env!("CARGO_MANIFEST_DIR"));
        let read = |file| lora::read_state_dict(format!("{folder}/{file}"), &device());
        let mut expected = read("expected.safetensors")?.tensors;
        let mut part = |name| expected.remove(name).unwrap();
        let config = Config::from_json(&std::fs::read_to_string(format!("{folder}/config.json"))?)?;
        let (ids, real, hidden) = (part("ids"), part("real"), part("hidden"));
        let tensors = names::own_names(read("model.safetensors")?.tensors, &config)?;
        Ok(Self { config, tensors, ids, real, hidden })
    }

    fn base(&self) -> VarBuilder<'static> {
        let tensors = self.tensors.clone().into_iter().collect();
        VarBuilder::from_tensors(tensors, DType::F32, &device())
    }

    fn classifier(&self, targets: &str, vars: &VarMap, trainable: Trainable) -> Result<Classifier> {
        let vb = lora::var_builder(self.base(), vars, trainable);
        Ok(Classifier::new(&self.config, &adapt(targets), LABELS, Pooling::Mean, vb)?)
    }

    /// The difference of the hidden states of real tokens from those of transformers.
    fn error(&self, model: &Bert) -> Result<f64> {
        let hidden = model.forward(&self.ids, Some(&self.real))?;
        let real = self.real.unsqueeze(2)?;
        Ok(difference(&hidden.broadcast_mul(&real)?, &self.hidden.broadcast_mul(&real)?)?)
    }
}

fn adapt(targets: &str) -> Adapt {
    let lora = LoraConfig { r: 2, lora_alpha: 3., ..Default::default() };
    Adapt { lora, targets: targets.split(',').map(str::to_owned).collect() }
}

#[test]
fn hidden_states_agree_with_transformers() -> Result<()> {
    for name in ["bert", "roberta"] {
        let fixture = Fixture::read(name)?;
        let vars = VarMap::new();
        for (how, adapt, vb) in [
            ("plain", Adapt::default(), fixture.base()),
            (
                "adapted",
                adapt("query,key,value,dense"),
                lora::var_builder(fixture.base(), &vars, Bias::None),
            ),
            (
                "trained",
                Adapt::default(),
                lora::var_builder(fixture.base(), &VarMap::new(), Trainable::all_parameters()),
            ),
        ] {
            let mut model = Bert::new(&fixture.config, &adapt, vb)?;
            let d = fixture.error(&model)?;
            assert!(d < 1e-5, "{name}, {how}: {d}");
            model.eval()?;
            let d = fixture.error(&model)?;
            assert!(d < 1e-5, "{name}, {how}, in evaluation: {d}");
        }
        // Six linear layers each.
        assert_eq!(vars.all_vars().len(), fixture.config.num_hidden_layers * 12);
    }
    Ok(())
}

#[test]
fn prefixes_and_old_names_are_read() -> Result<()> {
    let Fixture { config, tensors, .. } = Fixture::read("bert")?;
    let named = |rename: &dyn Fn(&str) -> String| {
        let renamed = tensors.iter().map(|(name, t)| (rename(name), t.clone())).collect();
        names::own_names(renamed, &config).map(|own| own.into_keys().collect::<Vec<_>>())
    };
    let own: Vec<_> = tensors.keys().cloned().collect();
    assert_eq!(named(&|name| name.to_owned())?, own);
    assert_eq!(named(&|name| format!("bert.{name}"))?, own);
    let older = |name: &str| {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("Norm.bias", "Norm.beta")
    };
    assert_eq!(named(&older)?, own);
    let error = named(&|name| name.replace("layer.1", "layer.7")).unwrap_err().to_string();
    assert!(error.contains("encoder.layer.7"), "{error}");
    Ok(())
}

/// The names without a gradient, and the number of gradients of constants.
fn trained(fixture: &Fixture, model: &Classifier, vars: &VarMap) -> Result<(Vec<String>, usize)> {
    let logits = model.forward(&fixture.ids, Some(&fixture.real))?;
    let targets = Tensor::new(&[0u32, 2], &device())?;
    let grads = candle_nn::loss::cross_entropy(&logits, &targets)?.backward()?;
    let ids: HashSet<_> = vars.all_vars().iter().map(|var| var.id()).collect();
    let others = grads.get_ids().filter(|id| !ids.contains(id)).count();
    Ok((lora::missing_grads(vars, &grads), others))
}

#[test]
fn only_trained_variables_get_gradients() -> Result<()> {
    let fixture = Fixture::read("bert")?;
    let everything = Trainable::all_parameters().and("classifier");
    for (targets, trainable, expected) in [
        ("", Bias::None.and("classifier"), 2),
        ("query,value", Bias::None.and("classifier"), 2 + 8),
        ("query,value", Bias::LoraOnly.and("classifier"), 2 + 8 + 4),
        ("", everything, 2 + fixture.tensors.len()),
    ] {
        let vars = VarMap::new();
        let model = fixture.classifier(targets, &vars, trainable)?;
        assert_eq!(vars.all_vars().len(), expected, "{targets}");
        let (missing, constants) = trained(&fixture, &model, &vars)?;
        assert!(missing.is_empty(), "{targets}, {expected}: {missing:?}");
        // candle's sums and products give one to the first residual's input, and to the pooling's zeros and counts.
        assert!(constants <= 3, "{targets}, {expected}: {constants}");
    }
    Ok(())
}
