//! `lora chat`: talks to a model, with adapters or without.

mod converse;
mod prompt;
mod sample;
mod say;
mod speaker;
#[cfg(test)]
mod tests;

pub use prompt::Prompt;
pub use sample::Sampler;
pub use say::Say;
pub use speaker::Speaker;

use crate::encoder::is_encoder;
use crate::model::Base;
use crate::place::Place;
use crate::report::Report;
use crate::Result;
use serde_json::json;
use std::path::PathBuf;

/// Talks to a language model, with adapters or without
///
/// Without --prompt, about the lines of the standard input, each after those before it.
#[derive(clap::Args)]
#[command(
    after_help = "Example: lora chat Qwen2.5-1.5B-Instruct --adapter sql --adapter poems=out/run7"
)]
pub struct Args {
    /// A folder as the Hugging Face hub gives it (config.json, tokenizer.json, model.safetensors or its
    /// shards), or a GGUF file
    pub model: PathBuf,
    /// An adapter: PEFT's or MLX's folder, this crate's file, or llama.cpp's for a GGUF file. Several are switched at the
    /// prompt, by the name of the file or folder or as given here
    #[arg(long, value_name = "[NAME=]PATH")]
    pub adapter: Vec<String>,
    #[command(flatten)]
    pub say: Say,
    /// Seed of what the model says
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Where to run
    #[arg(long, value_enum, default_value_t = Place::Cpu)]
    pub device: Place,
}

pub fn run(args: &Args, report: Report) -> Result<()> {
    let Args { model, adapter, say, seed, device } = args;
    if is_encoder(model) {
        return Err(format!(
            "{}: an encoder does not answer: `lora train` takes it",
            model.display()
        )
        .into());
    }
    let base = Base::read(model, &device.device(*seed)?)?;
    let mut speaker = Speaker::new(&base, adapter)?;
    let mut sampler = say.sampler(*seed);
    match &say.prompt {
        Some(prompt) => {
            let prompt = Prompt::new(prompt, say.system.as_deref(), &base, say.raw)?;
            compare(say, &sampler, &mut speaker, &prompt, report)
        }
        None => converse::converse(say, &mut sampler, &mut speaker, report),
    }
}

/// The same prompt to the model and to each adapter. Each draws by a copy of `sampler`.
pub fn compare(
    say: &Say,
    sampler: &Sampler,
    speaker: &mut Speaker,
    prompt: &Prompt,
    report: Report,
) -> Result<()> {
    let ids = prompt.ids(speaker.base)?;
    let names = speaker.names.clone();
    let width = names.iter().map(String::len).max().unwrap_or(0).max("prompt".len());
    report.tell(
        format!("\n{:width$}  {}", "prompt", prompt.shown.trim()),
        "prompt",
        json!({
            "text": prompt.shown,
        }),
    );
    let alone = speaker.can_disable().then_some(None);
    for by in alone.into_iter().chain(names.iter().map(|name| Some(&name[..]))) {
        let reply = speaker.reply(by, &ids, say.tokens, &mut sampler.clone(), |_| {})?;
        let line = format!("{:width$}  {}", by.unwrap_or("model"), reply.text.trim());
        let values = json!({ "adapter": by, "text": reply.text,"tokens": reply.ids.len() });
        report.tell(line, "reply", values);
    }
    Ok(())
}
