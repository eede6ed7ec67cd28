//! Loading a folder into a model's variables compares ranks and scalings.

use crate::common::bits;
use crate::kinds::{sample, Sample};
use crate::{folder, CPU};
use candle_core::Var;
use candle_nn::VarMap;
use lora::adapter::AdapterConfig;
use lora::formats::peft;
use lora::layers::LayerKind;
use lora::utils::load_weights;
use lora::Strict;
use loralib as lora;

/// PEFT also saves the table under an adapted embedding.
#[test]
fn a_saved_table_needs_no_variable() -> lora::Result<()> {
    let weights = peft::load(folder("embed_tokens"), &CPU)?;
    let adapter = weights.state_dict();
    let table = "model.embed_tokens.weight";
    assert!(adapter.contains_key(table));
    let load = |names: &[&str]| {
        let vars = VarMap::new();
        for (name, tensor) in
            adapter.iter().filter(|(name, _)| names.iter().any(|n| name.ends_with(n)))
        {
            let zeros = Var::from_tensor(&tensor.zeros_like()?)?;
            vars.data().lock().unwrap().insert(name.clone(), zeros);
        }
        load_weights(&weights, &vars, weights.config(), Strict::Yes)
    };
    let report = load(&["lora_A", "lora_B"])?;
    assert_eq!((report.loaded.len(), report.missing.len()), (4, 0));
    assert_eq!(report.unexpected, [table]);
    let report = load(&["lora_A", "lora_B", "weight"])?;
    assert!(report.loaded.iter().any(|name| name == table) && report.unexpected.is_empty());
    assert!(load(&["lora_A", "weight"]).is_err(), "the factors need variables");
    let adapter = lora::Adapter::load(folder("embed_tokens"), &CPU)?;
    assert_eq!(adapter.restore(folder("embed_tokens"))?.unexpected, [table]);
    Ok(())
}

#[test]
fn load_weights_compares_ranks_and_scalings() -> lora::Result<()> {
    for rslora in [false, true] {
        let sample = sample(rslora)?;
        let Sample { adapter, config, .. } = &sample;
        let dir = tempfile::tempdir()?;
        peft::save(dir.path(), &sample.weights()?)?;
        let vars = VarMap::new();
        for (name, tensor) in adapter {
            let zeros = Var::from_tensor(&tensor.zeros_like()?)?;
            vars.data().lock().unwrap().insert(name.clone(), zeros);
        }
        let load = |config: &AdapterConfig| {
            let mut weights = peft::load(dir.path(), &CPU)?;
            for (module, layer) in &config.layers {
                if let Some(kind) = &layer.kind {
                    weights = weights.with_kind(module, kind.clone())?;
                }
            }
            load_weights(&weights, &vars, config, Strict::Yes).map(|report| report.loaded)
        };
        let refused = |change: &dyn Fn(&mut AdapterConfig), words: &[&str]| {
            let mut other = config.clone();
            change(&mut other);
            let error = load(&other).unwrap_err().to_string();
            assert!(words.iter().all(|word| error.contains(word)), "{error}");
        };
        refused(&|c| c.lora.r = 3, &["lora_A", "its rank is 2", "r = 3"]);
        refused(&|c| c.lora.lora_alpha = 4., &["lora_A", "its scaling is"]);
        refused(&|c| c.lora.rslora = !rslora, &["its scaling is"]);
        refused(&|c| c.layers.get_mut("c2").unwrap().lora_alpha = Some(9.), &["c2.lora_A"]);
        refused(&|c| drop(c.layers.remove("qkv")), &["h.qkv.lora_A", "its rank is 4"]);
        refused(&|c| *c = c.clone().with_layer("nowhere", LayerKind::Linear), &["nowhere"]);
        for var in vars.all_vars() {
            assert!(bits(&var)?.iter().all(|bits| *bits == 0), "an error sets nothing");
        }
        assert!(load(config)?.iter().eq(adapter.keys()));
        for (name, var) in vars.data().lock().unwrap().iter() {
            assert_eq!(bits(var)?, bits(&adapter[name])?, "{name}");
        }
    }
    Ok(())
}
