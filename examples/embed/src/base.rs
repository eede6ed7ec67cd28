//! The base: a folder from the hub, or a tiny one, and pairs of texts.

use crate::bert::Bert;
use crate::{corpus, Pair, Result};
use candle_core::{DType, Device};
use candle_nn::{VarBuilder, VarMap};
use serde_json::{json, Value};
use std::collections::HashSet;
use std::{fs, path::Path};
use tokenizers::models::wordlevel::WordLevel;
use tokenizers::pre_tokenizers::whitespace::Whitespace;
use tokenizers::Tokenizer;

/// What the hub has in a folder.
pub struct Base {
    pub config: Value,
    pub tokenizer: Tokenizer,
    pub weights: VarBuilder<'static>,
    pub name: String,
}

pub fn read(folder: &Path) -> Result<Base> {
    Ok(Base {
        config: serde_json::from_str(&text(&folder.join("config.json"))?)?,
        tokenizer: text(&folder.join("tokenizer.json"))?.parse()?,
        weights: loralib::safetensors_var_builder(folder, DType::F32, &Device::Cpu)?,
        name: folder.display().to_string(),
    })
}

fn text(path: &Path) -> Result<String> {
    Ok(fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?)
}

/// Descriptions of cafes and sentences for them: to train on, and of other cafes.
pub fn cafes() -> Result<(Vec<Pair>, Vec<Pair>)> {
    let pairs = |lines: Vec<corpus::Line>| {
        lines.into_iter().map(|line| [line.description, line.sentence]).collect()
    };
    Ok((pairs(corpus::cafes(2000)?), pairs(corpus::other_cafes(200)?)))
}

/// A tiny BERT with random weights, and a token for each word.
pub fn tiny(pairs: &[Pair]) -> Result<Base> {
    let words: HashSet<_> =
        pairs.iter().flatten().flat_map(|text| text.split_whitespace()).collect();
    let mut words: Vec<_> = words.into_iter().map(str::to_owned).collect();
    words.sort(); // the same ids in each run
    let ids = (1..).zip(words).map(|(id, word)| (word, id)).chain([("[PAD]".to_owned(), 0)]);
    let model = WordLevel::builder().vocab(ids.collect()).unk_token("[PAD]".into()).build()?;
    let mut tokenizer = Tokenizer::new(model);
    tokenizer.with_pre_tokenizer(Some(Whitespace {}));
    let config = json!({
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
        "vocab_size": tokenizer.get_vocab_size(true), "max_position_embeddings": 128, "type_vocab_size": 2,
    });
    let map = VarMap::new();
    let weights = VarBuilder::from_varmap(&map, DType::F32, &Device::Cpu);
    Bert::new(&config, loralib::base::seeded(weights.clone(), 0))?; // "pretrained"
    Ok(Base { config, tokenizer, weights, name: "tiny".into() })
}

/// Lines of {"anchor": .., "positive": ..}.
pub fn pairs(path: &str) -> Result<Vec<Pair>> {
    let pair = |line: &str| -> Result<Pair> {
        let json: Value = serde_json::from_str(line)?;
        let of = |name| json[name].as_str().map(str::to_owned).ok_or(format!("{path}: no {name}"));
        Ok([of("anchor")?, of("positive")?])
    };
    text(Path::new(path))?.lines().map(pair).collect()
}
