//! Causal language models; candle returns the logits of the last position.

use crate::{case, check, ids, Case, Forward};
use candle::{DType, Device};

#[test]
fn llama_like() {
    macro_rules! llama {
        ($name:literal) => {
            case!($name, |vb, config, x| {
                use models::llama::{Cache, Llama, LlamaConfig};
                let config = config.get::<LlamaConfig>()?.into_config(false);
                let mut cache = Cache::new(false, DType::F32, &config, &Device::Cpu)?;
                Llama::load(vb, &config)?.forward(&ids(x, "input_ids")?, 0, &mut cache)
            })
        };
    }
    /// Models that differ in their module and in the arguments before config and VarBuilder.
    macro_rules! causal {
        ($name:ident :: $model:ident ($($arg:expr),*)) => {
            case!(stringify!($name), |vb, config, x| {
                let mut model = models::$name::$model::new($($arg,)* &config.get()?, vb)?;
                model.forward(&ids(x, "input_ids")?, 0)
            })
        };
    }
    check(&[
        llama!("llama"),
        llama!("llama_tied"),
        llama!("llama_all"),
        causal!(mistral::Model()),
        causal!(qwen2::ModelForCausalLM()),
        causal!(qwen3::ModelForCausalLM()),
        causal!(phi3::Model()),
        causal!(gemma::Model(false)),
        causal!(gemma2::Model(false)),
        causal!(gemma3::Model(false)),
    ]);
}
