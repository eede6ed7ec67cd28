//! The program `lora`: fine-tunes a language model with LoRA, talks to it, and converts and merges adapters.

mod chat;
mod convert;
mod error;
mod merge;
mod model;
mod place;
mod train;

#[path = "../../examples/common/corpus.rs"]
#[expect(dead_code, reason = "the example `finetune` also counts the slots of held-out lines")]
mod corpus;
#[path = "../../examples/common/rng.rs"]
mod rng;

use clap::Parser;
use error::Result;
use std::process::ExitCode;

/// LoRA for language models
#[derive(Parser)]
#[command(name = "lora", version)]
enum Command {
    Train(Box<train::Args>),
    Chat(chat::Args),
    Convert(convert::Args),
    Merge(merge::Args),
}

fn main() -> ExitCode {
    let command = Command::parse();
    error::reported(|| match &command {
        Command::Train(args) => train::run(args),
        Command::Chat(args) => chat::run(args),
        Command::Convert(args) => convert::run(args),
        Command::Merge(args) => merge::run(args),
    })
}
