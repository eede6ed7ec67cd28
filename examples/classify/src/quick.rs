//! `--quick`: a tiny random BERT and a few hundred sentences, in a folder as the hub would give it.

use crate::args::Args;
use crate::rng::Rng;
use crate::Result;
use candle_core::{Device, Tensor};
use lora::{utils::StateDict, LoraConfig};
use loralib as lora;
use serde_json::json;
use std::fs;
use tokenizers::models::wordlevel::WordLevel;
use tokenizers::pre_tokenizers::whitespace::Whitespace;
use tokenizers::processors::bert::BertProcessing;
use tokenizers::Tokenizer;

/// Words around the one that tells the label.
const FRAME: [&str; 12] =
    ["the", "food", "here", "was", "we", "found", "service", "and", "again", "today", "it", "all"];
const TELLING: [(&str, [&str; 3]); 3] = [
    ("bad", ["awful", "cold", "stale"]),
    ("fair", ["plain", "usual", "decent"]),
    ("good", ["fresh", "superb", "tasty"]),
];
const SPECIAL: [&str; 4] = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"];

/// Writes the folder and points the flags to it.
pub fn write(args: &mut Args) -> Result<()> {
    let folder = args.out.join("tiny");
    fs::create_dir_all(&folder)?;
    let words = TELLING.iter().flat_map(|(_, words)| words);
    let words: Vec<&str> = SPECIAL.iter().chain(&FRAME).chain(words).copied().collect();
    tokenizer(&words)?.save(folder.join("tokenizer.json"), true)?;
    base(words.len(), &folder)?;
    let rng = &mut Rng::new(1);
    let [train, valid] = [("train.tsv", 256), ("valid.tsv", 64)].map(|(name, n)| {
        let path = folder.join(name);
        fs::write(&path, (0..n).map(|_| line(rng)).collect::<String>()).map(|()| path)
    });
    (args.train, args.valid, args.model) = (Some(train?), Some(valid?), Some(folder));
    Ok(())
}

fn line(rng: &mut Rng) -> String {
    let (label, telling) = TELLING[rng.below(TELLING.len())];
    let mut words: Vec<_> = (0..3 + rng.below(9)).map(|_| FRAME[rng.below(FRAME.len())]).collect();
    words.insert(rng.below(words.len() + 1), telling[rng.below(telling.len())]);
    format!("{label}\t{}\n", words.join(" "))
}

fn tokenizer(words: &[&str]) -> Result<Tokenizer> {
    let ids = words.iter().zip(0..).map(|(word, id)| (word.to_string(), id)).collect();
    let model = WordLevel::builder().vocab(ids).unk_token(SPECIAL[1].to_owned()).build()?;
    let mut tokenizer = Tokenizer::new(model);
    tokenizer.with_pre_tokenizer(Some(Whitespace {}));
    let around = BertProcessing::new((SPECIAL[3].to_owned(), 3), (SPECIAL[2].to_owned(), 2));
    tokenizer.with_post_processor(Some(around));
    Ok(tokenizer)
}

fn base(vocab_size: usize, folder: &std::path::Path) -> Result<()> {
    let (n, inner, layers, positions) = (32, 64, 2, 32);
    let config = json!({
        "model_type": "bert",
        "vocab_size": vocab_size,
        "hidden_size": n,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": inner,
        "max_position_embeddings": positions,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
    });
    fs::write(folder.join("config.json"), format!("{config:#}\n"))?;
    let mut tensors = StateDict::new();
    let mut put = |name: String, dims: &[usize]| -> Result<()> {
        let tensor = match name.ends_with("LayerNorm") {
            true => Tensor::ones(dims, candle_core::DType::F32, &Device::Cpu)?,
            false => Tensor::randn(0f32, 0.2, dims, &Device::Cpu)?,
        };
        tensors.insert(format!("bert.{name}.weight"), tensor);
        if !name.ends_with("embeddings") {
            let bias = Tensor::zeros(dims[0], candle_core::DType::F32, &Device::Cpu)?;
            tensors.insert(format!("bert.{name}.bias"), bias);
        }
        Ok(())
    };
    for (name, rows) in [("word", vocab_size), ("position", positions), ("token_type", 2)] {
        put(format!("embeddings.{name}_embeddings"), &[rows, n])?;
    }
    put("embeddings.LayerNorm".to_owned(), &[n])?;
    for i in 0..layers {
        for (name, dims) in [
            ("attention.self.query", &[n, n][..]),
            ("attention.self.key", &[n, n]),
            ("attention.self.value", &[n, n]),
            ("attention.output.dense", &[n, n]),
            ("attention.output.LayerNorm", &[n]),
            ("intermediate.dense", &[inner, n]),
            ("output.dense", &[n, inner]),
            ("output.LayerNorm", &[n]),
        ] {
            put(format!("encoder.layer.{i}.{name}"), dims)?;
        }
    }
    lora::save_state_dict(&tensors, LoraConfig::default(), folder.join("model.safetensors"))?;
    Ok(())
}
