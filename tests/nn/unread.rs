//! A tensor of the adapter that the model does not read is an error of `Adapter::check`.

use crate::adapter::{base, vb, Model, CFG};
use crate::common::randn;
use crate::common::says;
use candle_core::{DType, Device, Tensor};
use loralib::adapter::AdapterConfig;
use loralib::layers::LayerKind;
use loralib::nn::{embedding, linear, Embedding, Linear, VarBuilder};
use loralib::utils::StateDict;
use loralib::{Adapter, Bias, LoraWeights, Result};

/// An adapter of `layers.1.down_proj` with these tensors beside its factors.
fn adapter(config: AdapterConfig, others: &[(&str, &[usize])]) -> Result<Adapter> {
    let config = config.with_layer("down_proj", LayerKind::Linear);
    let factors =
        [("layers.1.down_proj.lora_A", &[2, 8][..]), ("layers.1.down_proj.lora_B", &[8, 2])];
    let all = factors
        .iter()
        .chain(others)
        .map(|(name, shape)| Ok(((*name).to_owned(), randn(*shape, DType::F32, &Device::Cpu)?)));
    Adapter::from_weights(&LoraWeights::new(config, all.collect::<Result<StateDict>>()?)?)
}

fn with_head() -> Result<Adapter> {
    let config = AdapterConfig::from(CFG).with_trainable(Bias::None.and("head"))?;
    adapter(config, &[("head.weight", &[3, 8]), ("head.bias", &[3])])
}

#[test]
fn a_whole_head() -> Result<()> {
    let all = with_head()?;
    let _model = Model::new(all.var_builder(vb(&base())))?;
    all.check()?;
    let less = with_head()?;
    let _layer = linear(8, 8, less.var_builder(vb(&base())).pp("layers.1.down_proj"))?;
    says(less.check(), &["head.bias", "does not read it"]);
    Ok(())
}

#[test]
fn a_bias() -> Result<()> {
    let config = AdapterConfig::from(CFG).with_trainable(Bias::All)?;
    let adapter = adapter(config, &[("layers.1.down_proj.bias", &[8])])?;
    let vb = adapter.var_builder(vb(&base()));
    let _layer = Linear::new(vb.get((8, 8), "layers.1.down_proj.weight")?, None);
    says(adapter.check(), &["layers.1.down_proj.bias", "does not read it"]);
    Ok(())
}

#[test]
fn rows_of_a_table() -> Result<()> {
    let mut config = AdapterConfig::from(CFG);
    config.trainable_token_indices.insert("embed".to_owned(), vec![1]);
    let adapter = adapter(config, &[("embed.trainable_tokens", &[1, 8])])?;
    let _layer = linear(8, 8, adapter.var_builder(vb(&base())).pp("layers.1.down_proj"))?;
    says(adapter.check(), &["trainable_token_indices", "\"embed\"", "down_proj"]);
    let merged = adapter.merged(vb(&base()))?;
    let _layer = linear(8, 8, merged.pp("layers.1.down_proj"))?;
    says(adapter.check(), &["embed.weight", "`merged`"]);
    Ok(())
}

/// The head of a model that ties it to the embeddings is trained in vain.
#[test]
fn a_tied_head_s_own_table() -> Result<()> {
    let config = AdapterConfig::from(CFG).with_trainable(Bias::None.and("lm_head"))?;
    let tied = |embed: &Embedding, _: &VarBuilder| Ok(embed.embeddings().clone());
    let by_name = |_: &Embedding, vb: &VarBuilder| vb.get((10, 8), "embed.weight");
    let heads: [fn(&Embedding, &VarBuilder) -> candle_core::Result<Tensor>; 2] = [tied, by_name];
    for head in heads {
        let adapter = adapter(config.clone(), &[("lm_head.weight", &[10, 8])])?;
        let vb = adapter.var_builder(vb(&base()));
        let embed = embedding(10, 8, vb.pp("embed"))?;
        let _head = Linear::new(head(&embed, &vb)?, None);
        linear(8, 8, vb.pp("layers.1.down_proj"))?;
        says(adapter.check(), &["lm_head.weight", "[Embedding, Linear]", "\"embed\"", "tied"]);
    }
    Ok(())
}

#[test]
fn a_model_on_merged() -> Result<()> {
    let adapter = with_head()?;
    let merged = adapter.merged(vb(&base()))?;
    says(adapter.check(), &["no model was built"]);
    let layer = |path: &str, outputs| ::candle_nn::linear(8, outputs, merged.pp(path));
    layer("layers.1.down_proj", 8)?;
    says(adapter.check(), &["head.bias", "`merged`", "tie_word_embeddings"]);
    layer("head", 3)?;
    adapter.check()?;
    // The last `VarBuilder` counts.
    let other = adapter.merged(vb(&base()))?;
    let _head: Tensor = other.get((3, 8), "head.weight")?;
    says(adapter.check(), &["has not read it"]);
    Ok(())
}
