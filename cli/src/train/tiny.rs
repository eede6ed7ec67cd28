//! A tiny Llama of its own, in a folder as the hub would give it, and conversations to adapt it to.

use super::args::Args;
use super::batch::{Batch, Packed};
use super::columns::Columns;
use super::data;
use super::examples::examples;
use super::loss::batch_loss;
use super::steps::{train, Plan};
use crate::corpus::{cafes, hotels, Line};
use crate::model::{Base, Config, Decoder};
use crate::report::Report;
use crate::Result;
use candle_core::{DType, Device};
use candle_nn::{VarBuilder, VarMap};
use lora::{utils::StateDict, LoraConfig};
use loralib as lora;
use serde_json::json;
use std::fs;
use std::path::{Path, PathBuf};
use tokenizers::decoders::byte_level::ByteLevel as ByteDecoder;
use tokenizers::models::bpe::{BpeTrainerBuilder, BPE};
use tokenizers::models::TrainerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer};

const SPECIAL: [&str; 3] = ["<|end|>", "<|user|>", "<|assistant|>"];
const TEMPLATE: &str =
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}\
                        {% if add_generation_prompt %}<|assistant|>{% endif %}";

/// Trains the model on embedded text about hotels; gives its folder and a file of other text.
pub fn tiny(args: &Args, device: &Device, report: Report) -> Result<(PathBuf, PathBuf)> {
    let folder = args.out.join("tiny");
    fs::create_dir_all(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    let lines = if args.quick { 300 } else { 4000 };
    let (known, new) = (hotels(lines)?, cafes(lines)?);
    let (base, data) = (folder.join("hotels.jsonl"), folder.join("cafes.jsonl"));
    fs::write(&base, conversations(&known))?;
    fs::write(&data, conversations(&new))?;
    write_texts(&known, &folder)?;
    pretrain(args, &folder, &base, device, report)?;
    Ok((folder, data))
}

fn conversations(lines: &[Line]) -> String {
    let conversation = |line: &Line| {
        let user = json!({"role": "user", "content": line.description});
        let assistant = json!({"role": "assistant", "content": line.sentence});
        format!("{}\n", json!({"messages": [user, assistant]}))
    };
    lines.iter().map(conversation).collect()
}

/// All files of the folder but the weights.
fn write_texts(lines: &[Line], folder: &Path) -> Result<()> {
    let mut tokenizer = Tokenizer::new(BPE::default());
    tokenizer.with_pre_tokenizer(Some(ByteLevel::default().add_prefix_space(false)));
    tokenizer.with_decoder(Some(ByteDecoder::default()));
    let trainer = BpeTrainerBuilder::new()
        .vocab_size(512)
        .show_progress(false)
        .special_tokens(SPECIAL.map(|token| AddedToken::from(token, true)).to_vec())
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build();
    let text = lines.iter().map(|line| format!("{} {}", line.description, line.sentence));
    tokenizer.train(&mut TrainerWrapper::from(trainer), text)?;
    tokenizer.save(folder.join("tokenizer.json"), true)?;
    let config = json!({
        "model_type": "llama",
        "vocab_size": tokenizer.get_vocab_size(true),
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 256,
        "tie_word_embeddings": true,
        "eos_token_id": tokenizer.token_to_id(SPECIAL[0]),
    });
    fs::write(folder.join("config.json"), format!("{config:#}\n"))?;
    let config = json!({"eos_token": SPECIAL[0], "chat_template": TEMPLATE});
    Ok(fs::write(folder.join("tokenizer_config.json"), format!("{config:#}\n"))?)
}

/// All parameters are variables: the same model code, without an adapter.
fn pretrain(
    args: &Args,
    folder: &Path,
    data: &Path,
    device: &Device,
    report: Report,
) -> Result<()> {
    let base = Base::read(folder, device)?;
    let Config { longest, .. } = base.config;
    let documents = data::read(data, &Columns::default(), base.template.as_ref())?;
    let examples = examples(&documents, &base.tokens, longest)?.all;
    let vars = VarMap::new();
    let vb = lora::base::seeded(VarBuilder::from_varmap(&vars, DType::F32, device), args.seed);
    let model = Decoder::new(&base.config, vb)?;
    let plan = Plan {
        what: "pretraining",
        steps: if args.quick { 300 } else { 1000 },
        lr: 3e-3,
        batch: 8,
        accumulate: 1,
        clip: 1.,
        seed: args.seed,
    };
    let examples = Packed { examples: &examples, length: None };
    let named = vars.data().lock().map_err(|e| e.to_string())?.clone();
    let loss = |batch: &Batch| batch_loss(&model, batch);
    let steps = train(named, Default::default(), (&plan, None), &examples, device, report, loss)?;
    if !steps.ended {
        return Err("stopped before the tiny model was trained".into());
    }
    let data = vars.data().lock().map_err(|e| e.to_string())?;
    let tensors: StateDict =
        data.iter().map(|(name, var)| (name.clone(), var.as_detached_tensor())).collect();
    lora::save_state_dict(&tensors, LoraConfig::default(), folder.join("model.safetensors"))?;
    Ok(())
}
