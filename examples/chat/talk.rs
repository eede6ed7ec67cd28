//! The same prompt to the base and to the adapted model.

use crate::args::Args;
use crate::base::Base;
use crate::data::{Document, Kind};
use crate::generate::generate;
use crate::llama::Llama;
use crate::Result;
use lora::{peft, Adapter};
use loralib as lora;
use serde_json::json;
use std::path::Path;

/// With the adapter in `folder`, as it lies on disk.
pub fn talk(args: &Args, base: &Base, prompt: &Prompt, folder: &Path) -> Result<()> {
    let ids = base.tokens.encode(&prompt.text, !prompt.templated)?;
    println!("\nprompt   {}", prompt.shown.trim());
    let say = |model: &Llama| generate(model, base, &ids, args.tokens, &mut args.sampler());
    // One model after the other: each has all the weights.
    println!("base     {}", say(&base.model(base.var_builder()?)?)?.trim());
    println!("adapted  {}", say(&adapted(args, base, folder)?)?.trim());
    Ok(())
}

/// The model with an adapter that computes without a graph.
pub fn adapted(args: &Args, base: &Base, folder: &Path) -> Result<Llama> {
    if base.merges() && !args.unmerged {
        let adapter = Adapter::load(folder, &base.device)?;
        return base.model(adapter.merged(base.to_merge()?)?);
    }
    let (mut config, tensors) = peft::load_pretrained(folder, &base.device)?;
    config.lora.merge_weights = false;
    let layers = tensors.keys().filter_map(|name| name.strip_suffix(".lora_A"));
    let adapter = Adapter::new(config).targets(layers.collect::<Vec<_>>());
    let model = base.model(adapter.var_builder(base.var_builder()?))?;
    adapter.check()?;
    let _ = adapter.restore(folder)?;
    adapter.eval()?;
    Ok(model)
}

pub struct Prompt {
    shown: String,
    text: String,
    /// Whether the text has its special tokens.
    templated: bool,
}

impl Prompt {
    /// A message, or with `raw`, or for a model without a chat template, a text to continue.
    pub fn new(said: &str, base: &Base, raw: bool) -> Result<Self> {
        let template = base.template.as_ref().filter(|_| !raw);
        let message = [json!({"role": "user", "content": said})];
        let text = template.map(|template| template.render(&message, true)).transpose()?;
        let (templated, shown) = (text.is_some(), said.to_owned());
        Ok(Self { text: text.unwrap_or(shown.clone()), shown, templated })
    }

    /// What the replies of the training data follow.
    pub fn of(document: &Document) -> Self {
        let text = document.prompt();
        Self { shown: text.clone(), text, templated: document.kind == Kind::Chat }
    }
}
