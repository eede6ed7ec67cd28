//! Several turns: a line from the standard input is a message, or for a model without a chat template a text to
//! continue. Lines that begin with `/` are commands.

use super::prompt::{first, user, Prompt};
use super::speaker::{Reply, Speaker};
use super::{Sampler, Say};
use crate::report::Report;
use crate::Result;
use serde_json::{json, Value};
use std::io::{self, BufRead, IsTerminal};

const HELP: &str = "\
/adapter NAME  lets an adapter speak; \"none\" is the model alone
/adapters      lists them
/reset         forgets the conversation
/help          shows this
/exit          leaves, as Ctrl-D does
A message that begins with / is written with two: //";

enum Command<'a> {
    Say(&'a str),
    Adapter(Option<&'a str>),
    Adapters,
    Reset,
    Help,
    Exit,
    Unknown(&'a str),
}

impl<'a> Command<'a> {
    fn parse(line: &'a str) -> Self {
        let Some(command) = line.strip_prefix('/') else { return Self::Say(line) };
        match command.split_once(' ').map_or((command, ""), |(name, rest)| (name, rest.trim())) {
            ("adapter", "") | ("adapters", "") => Self::Adapters,
            ("adapter", "none") => Self::Adapter(None),
            ("adapter", name) => Self::Adapter(Some(name)),
            ("reset", "") => Self::Reset,
            ("help", "") | ("?", "") => Self::Help,
            ("exit" | "quit" | "bye", "") => Self::Exit,
            _ if command.starts_with('/') => Self::Say(command),
            _ => Self::Unknown(line),
        }
    }
}

/// Until the input ends.
pub fn converse(
    say: &Say,
    sampler: &mut Sampler,
    speaker: &mut Speaker,
    report: Report,
) -> Result<()> {
    let people = report.is_read() && io::stdin().is_terminal();
    let mut by = speaker.names.first().cloned();
    if people {
        report.piece(&format!("{}{}\n", speaker.base.describe(), speaks(&by)));
        report.piece("/help shows the commands, /exit or Ctrl-D leaves\n");
    }
    let chats = speaker.base.template.is_some() && !say.raw;
    let system = say.system.as_deref();
    let (mut messages, mut text) = (first(system), String::new());
    loop {
        if people {
            report.piece("> ");
        }
        let mut line = String::new();
        if io::stdin().lock().read_line(&mut line)? == 0 {
            if people {
                report.piece("\n");
            }
            return Ok(());
        }
        let said = match Command::parse(line.trim()) {
            Command::Say("") => continue,
            Command::Say(said) => said,
            Command::Exit => return Ok(()),
            Command::Help => {
                report.tell(HELP, "help", json!({ "text": HELP }));
                continue;
            }
            Command::Adapters => {
                let names = speaker.names.join(", ");
                let line = format!("adapters: {names}{}", speaks(&by));
                report.tell(line, "adapters", json!({ "names": speaker.names, "speaks": by }));
                continue;
            }
            Command::Adapter(name) => {
                match name.filter(|name| !speaker.names.iter().any(|known| known == name)) {
                    None => {
                        by = name.map(str::to_owned);
                        let line = speaks(&by).trim_start_matches("; ").to_owned();
                        report.tell(line, "adapter", json!({ "speaks": by }));
                    }
                    Some(name) => {
                        let names = speaker.names.join(", ");
                        let line = format!("no adapter {name:?}, there are: {names}");
                        report.tell(line, "unknown", json!({ "adapter": name }));
                    }
                }
                continue;
            }
            Command::Reset => {
                (messages, text) = (first(system), String::new());
                report.tell("the conversation is forgotten", "reset", json!({}));
                continue;
            }
            Command::Unknown(command) => {
                let line = format!("{command}: no such command, /help shows them");
                report.tell(line, "unknown", json!({ "command": command }));
                continue;
            }
        };
        let prompt = match chats {
            true => {
                messages.push(user(said));
                Prompt::of_messages(&messages, speaker.base, said)?
            }
            false => {
                text.push_str(said);
                Prompt::new(&text, None, speaker.base, true)?
            }
        };
        let reply = told(say, sampler, speaker, by.as_deref(), &prompt, report)?;
        match chats {
            true => messages.push(assistant(&reply)),
            false => text.push_str(&reply.text),
        }
    }
}

fn assistant(reply: &Reply) -> Value {
    json!({"role": "assistant", "content": reply.text})
}

fn speaks(by: &Option<String>) -> String {
    match by {
        Some(name) => format!("; {name} speaks"),
        None => "; the model speaks without an adapter".to_owned(),
    }
}

/// The reply, shown as it is said.
fn told(
    say: &Say,
    sampler: &mut Sampler,
    speaker: &mut Speaker,
    by: Option<&str>,
    prompt: &Prompt,
    report: Report,
) -> Result<Reply> {
    let ids = prompt.ids(speaker.base)?;
    let reply = speaker.reply(by, &ids, say.tokens, sampler, |piece| report.piece(piece))?;
    report.tell("", "reply", json!({ "adapter": by, "text": reply.text, "tokens": reply.tokens }));
    Ok(reply)
}
