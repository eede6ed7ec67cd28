//! The program `lora`: fine-tunes a language model with LoRA, talks to it, and converts and merges adapters.

mod adapter;
mod chat;
mod convert;
mod encoder;
mod error;
mod format;
mod info;
mod interrupt;
mod merge;
mod model;
mod number;
mod place;
mod report;
mod train;

#[path = "../../examples/common/corpus.rs"]
#[expect(dead_code, reason = "the example `finetune` also counts the slots of held-out lines")]
mod corpus;
#[path = "../../examples/common/rng.rs"]
mod rng;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use clap_complete::Shell;
use error::Result;
use report::Report;
use std::process::ExitCode;

/// LoRA for language models
#[derive(Parser)]
#[command(name = "lora", version)]
struct Args {
    #[command(subcommand)]
    command: Command,
    /// Tells what happens in JSON, an object a line
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Subcommand)]
enum Command {
    #[command(allow_negative_numbers = true)]
    Train(Box<train::Args>),
    #[command(allow_negative_numbers = true)]
    Chat(chat::Args),
    Merge(merge::Args),
    Convert(convert::Args),
    Info(info::Args),
    /// Writes a shell's completions to the standard output
    Completions {
        shell: Shell,
    },
}

fn main() -> ExitCode {
    let matches = Args::command().get_matches();
    let parsed = Args::from_arg_matches(&matches);
    let Args { mut command, json } =
        parsed.unwrap_or_else(|e| e.format(&mut Args::command()).exit());
    if let (Command::Train(args), Some((_, matches))) = (&mut command, matches.subcommand()) {
        args.set_given(matches);
    }
    let report = Report::new(json);
    error::reported(|| match &command {
        Command::Train(args) => train::run(args, report),
        Command::Chat(args) => chat::run(args, report),
        Command::Merge(args) => merge::run(args, report),
        Command::Convert(args) => convert::run(args, report),
        Command::Info(args) => info::run(args, report),
        Command::Completions { shell } => {
            let mut script = vec![];
            clap_complete::generate(*shell, &mut Args::command(), "lora", &mut script);
            report::show(&String::from_utf8(script)?);
            Ok(())
        }
    })
}
