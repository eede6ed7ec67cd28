//! The mode of a layer, and of everything that consists of layers.

use crate::common::{bits, device, difference, rnd, CFG};
use candle_core::{DType, Module, Result};
use candle_nn::{VarBuilder, VarMap};
use lora::layers::InitLoraWeights;
use lora::{Bias, LoraConfig, LoraModule, Mode};
use loralib as lora;
use std::collections::HashMap;

fn layer() -> Result<lora::Linear> {
    lora::linear(6, 5, CFG, VarBuilder::zeros(DType::F32, &device()))
}

#[test]
fn mode_is_the_one_last_set() -> Result<()> {
    let unmerged = LoraConfig { merge_weights: false, ..CFG };
    for cfg in [CFG, unmerged, LoraConfig { r: 0, ..CFG }] {
        let mut layer = lora::linear(6, 5, cfg, VarBuilder::zeros(DType::F32, &device()))?;
        assert_eq!(layer.mode(), Mode::Train);
        for mode in [Mode::Eval, Mode::Eval, Mode::Train, Mode::Train, Mode::Eval] {
            layer.set_mode(mode)?;
            assert_eq!(layer.mode(), mode);
        }
        layer.train()?;
        assert_eq!(layer.mode(), Mode::Train);
        layer.eval()?;
        assert_eq!(layer.mode(), Mode::Eval);
    }
    Ok(())
}

#[test]
fn tuples_set_the_mode_of_every_element() -> Result<()> {
    let mut one = (layer()?,);
    let mut two = (layer()?, layer()?);
    let mut three = (layer()?, layer()?, layer()?);
    let mut four = (layer()?, layer()?, layer()?, layer()?);
    let mut five = (layer()?, layer()?, layer()?, layer()?, layer()?);
    let mut six = (layer()?, layer()?, layer()?, layer()?, layer()?, layer()?);
    for mode in [Mode::Eval, Mode::Train] {
        one.set_mode(mode)?;
        two.set_mode(mode)?;
        three.set_mode(mode)?;
        four.set_mode(mode)?;
        five.set_mode(mode)?;
        six.set_mode(mode)?;
        let (a, b, c, d, e, f) = (&one, &two, &three, &four, &five, &six);
        let all = [
            &[&a.0][..],
            &[&b.0, &b.1],
            &[&c.0, &c.1, &c.2],
            &[&d.0, &d.1, &d.2, &d.3],
            &[&e.0, &e.1, &e.2, &e.3, &e.4],
            &[&f.0, &f.1, &f.2, &f.3, &f.4, &f.5],
        ];
        assert!(all.concat().iter().all(|layer| layer.mode() == mode), "{mode:?}");
    }
    Ok(())
}

#[test]
fn collections_set_the_mode_of_every_element() -> Result<()> {
    let vb = VarBuilder::zeros(DType::F32, &device());
    let table = lora::embedding(4, 6, CFG, vb)?;
    let mut vec = vec![layer()?, layer()?];
    let mut array = [layer()?, layer()?];
    let mut some = Some(Box::new(table));
    let mut none: Option<lora::Conv1d> = None;
    for mode in [Mode::Eval, Mode::Train] {
        vec.set_mode(mode)?;
        array.as_mut_slice().set_mode(mode)?;
        some.set_mode(mode)?;
        none.set_mode(mode)?;
        assert!(vec.iter().chain(&array).all(|layer| layer.mode() == mode));
        assert_eq!(some.as_ref().map(|table| table.mode()), Some(mode));
    }
    Ok(())
}

/// A merged layer, and with DoRA any layer, computes with the values at `eval()`.
#[test]
fn later_values_count_after_the_next_eval() -> Result<()> {
    let uniform = InitLoraWeights::Uniform;
    for (merge_weights, use_dora, init_lora_weights) in [
        (true, false, uniform),
        (true, true, uniform),
        (false, true, uniform),
        #[cfg(feature = "faer")]
        (false, false, InitLoraWeights::Olora),
    ] {
        let (vars, dim) = (VarMap::new(), 8);
        let cfg = LoraConfig { merge_weights, use_dora, init_lora_weights, ..CFG };
        let base = HashMap::from([
            ("weight".to_owned(), rnd(1, &[dim, dim], DType::F32)?),
            ("bias".to_owned(), rnd(2, &[dim], DType::F32)?),
        ]);
        let base = VarBuilder::from_tensors(base, DType::F32, &device());
        let vb = lora::var_builder(base, &vars, Bias::All);
        let mut layer = lora::linear(dim, dim, cfg, vb)?;
        let x = rnd(5, &[3, dim], DType::F32)?;
        let change = || -> Result<()> {
            let data = vars.data().lock().unwrap();
            let trained = data.iter().filter(|(name, _)| !name.contains("initial"));
            trained.map(|(_, var)| var).try_for_each(|var| var.set(&(var.as_tensor() + 0.25)?))
        };
        change()?;
        layer.eval()?;
        // The first forward of DoRA keeps the norms.
        let before = bits(&layer.forward(&x)?)?;
        change()?;
        let name = format!("{cfg:?}");
        assert_eq!(bits(&layer.forward(&x)?)?, before, "{name}");
        layer.eval()?;
        let after = layer.forward(&x)?;
        assert_ne!(bits(&after)?, before, "{name}");
        layer.train()?;
        assert!(difference(&layer.forward(&x)?, &after)? < 1e-5, "{name}");
    }
    Ok(())
}
