//! Causal language models; candle returns the logits of the last position.

use crate::{case, check, ids, Case, Forward};
use candle::{DType, Device};

#[test]
fn llama_like() {
    macro_rules! llama {
        ($name:literal) => {
            case!($name, true, |vb, config, x, flash| {
                use models::llama::{Cache, Llama, LlamaConfig};
                let config = config.get::<LlamaConfig>()?.into_config(flash);
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
    macro_rules! gemma {
        ($name:ident, $has:expr) => {
            case!(stringify!($name), $has, |vb, config, x, flash| {
                let mut model = models::$name::Model::new(flash, &config.get()?, vb)?;
                model.forward(&ids(x, "input_ids")?, 0)
            })
        };
    }
    check(&[
        llama!("llama"),
        llama!("llama_tied"),
        llama!("llama_all"),
        case!("mistral", true, |vb, config, x, flash| {
            let config = models::mistral::Config { use_flash_attn: flash, ..config.get()? };
            models::mistral::Model::new(&config, vb)?.forward(&ids(x, "input_ids")?, 0)
        }),
        causal!(qwen2::ModelForCausalLM()),
        causal!(qwen3::ModelForCausalLM()),
        causal!(phi3::Model()),
        gemma!(gemma, true),
        // gemma2's branch leaves out the softcap, and gemma3's the window.
        gemma!(gemma2, false),
        gemma!(gemma3, false),
    ]);
}
