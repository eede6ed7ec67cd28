//! A GGUF file's configuration, tokenizer and chat template.

use super::base::Texts;
use super::template::Template;
use super::tokens::Tokens;
use crate::Result;
use loralib::gguf::File;
use serde_json::Value;

pub fn texts(file: &File) -> Result<Texts> {
    let config: Value = file.config()?;
    // In files of Llama 3 the token that ends a turn is another than the one that ends a text.
    let turn = file.metadata().get("tokenizer.ggml.eot_token_id").and_then(|id| id.to_u32().ok());
    let tokens = Tokens::new(&file.tokenizer_json()?, &[&config["eos_token_id"], &turn.into()])?;
    let special = |key: &str| tokens.text(&config[key]);
    let (bos, eos) = (special("bos_token_id"), special("eos_token_id"));
    let template = file.chat_template().map(|source| Template::new(source.to_owned(), bos, eos));
    Ok(Texts { config, template: template.transpose()?, tokens })
}
