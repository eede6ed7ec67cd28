//! A model that speaks, with adapters to choose from.

use super::Sampler;
use crate::adapter;
use crate::model::{Base, Cache, Decoder};
use crate::Result;
use candle_core::Tensor;
use lora::adapter::Choice;
use lora::{Adapter, Adapters, LoraWeights};
use loralib as lora;
use std::fmt::Display;
use std::path::{Path, PathBuf};

pub struct Speaker<'a> {
    pub base: &'a Base,
    model: Decoder,
    adapters: Loaded,
    /// The names of the adapters.
    pub names: Vec<String>,
    heard: Option<Heard>,
}

enum Loaded {
    None,
    /// It may have biases and modules in place of the base's.
    One(Adapter),
    Several(Adapters),
}

/// The text that the model has read last.
struct Heard {
    by: Option<String>,
    ids: Vec<u32>,
    cache: Cache,
}

/// What was said.
pub struct Reply {
    pub text: String,
    pub ids: Vec<u32>,
}

impl<'a> Speaker<'a> {
    /// The adapters are given as PATH or NAME=PATH.
    pub fn new(base: &'a Base, adapters: &[String]) -> Result<Self> {
        let mut all: Vec<(String, LoraWeights)> = vec![];
        for given in adapters {
            let (name, path) = named(given);
            if name == "none" {
                return Err(format!("\"none\" is the model alone: give NAME={given}").into());
            }
            if all.iter().any(|(other, _)| *other == name) {
                return Err(format!("two adapters are called {name:?}: give NAME={given}").into());
            }
            let weights = adapter::read(&path, base.gguf())?;
            let mut config = weights.config();
            config.lora.merge_weights = false;
            all.push((name, LoraWeights::new(config, weights.state_dict())?));
        }
        let names = all.iter().map(|(name, _)| name.clone()).collect();
        let vb = base.var_builder()?;
        let (model, adapters) = match &all[..] {
            [] => (base.model(vb)?, Loaded::None),
            [(name, weights)] => {
                let at = |e: lora::Error| merge_it(format!("adapter {name:?}: {e}"));
                let adapter = Adapter::from_weights(weights).map_err(at)?;
                let model = base.model(adapter.var_builder(vb)).map_err(merge_it)?;
                adapter.check().and_then(|()| adapter.eval()).map_err(at)?;
                (model, Loaded::One(adapter))
            }
            several => {
                let adapters = Adapters::new();
                let model = base.model(adapters.var_builder(vb))?;
                for (name, weights) in several {
                    adapters.add(name, &Adapter::from_weights(weights)?).map_err(merge_it)?;
                }
                (model, Loaded::Several(adapters))
            }
        };
        Ok(Self { base, model, adapters, names, heard: None })
    }

    /// Whether the model can speak without its adapter, which may have parts in place of the model's.
    pub fn can_disable(&self) -> bool {
        match &self.adapters {
            Loaded::One(adapter) => adapter.choice_disabled().is_ok(),
            Loaded::None | Loaded::Several(_) => true,
        }
    }

    /// What the model says after `prompt`, with an adapter or without, in `longest` tokens at most. `told` gets the text
    /// piece by piece.
    pub fn reply(
        &mut self,
        by: Option<&str>,
        prompt: &[u32],
        longest: usize,
        sampler: &mut Sampler,
        told: impl FnMut(&str) + Send,
    ) -> Result<Reply> {
        let choice: Option<Choice> = match (&self.adapters, by) {
            (Loaded::None, _) | (Loaded::One(_), Some(_)) => None,
            (Loaded::One(adapter), None) => Some(adapter.choice_disabled()?),
            (Loaded::Several(adapters), None) => Some(adapters.choice_none()),
            (Loaded::Several(adapters), Some(name)) => Some(adapters.choice(name)?),
        };
        let speak = || self.speak(by, prompt, longest, sampler, told);
        match choice {
            Some(choice) => choice.run(speak),
            None => speak(),
        }
    }

    fn speak(
        &mut self,
        by: Option<&str>,
        prompt: &[u32],
        longest: usize,
        sampler: &mut Sampler,
        mut told: impl FnMut(&str),
    ) -> Result<Reply> {
        let base = self.base;
        let (read, takes) = (prompt.len(), base.config.longest);
        if read == 0 {
            return Err("the prompt has no tokens".into());
        }
        if read >= takes {
            return Err(format!("{read} tokens to answer to, the model takes {takes}").into());
        }
        let longest = longest.min(takes - read);
        // What it has read already, if the prompt goes on from there.
        let goes_on = |heard: &Heard| {
            heard.by.as_deref() == by && heard.ids.len() < read && prompt.starts_with(&heard.ids)
        };
        let Heard { mut ids, mut cache, .. } = match self.heard.take().filter(goes_on) {
            Some(heard) => heard,
            None => Heard { by: None, ids: vec![], cache: self.model.cache(read + longest) },
        };
        let mut unread = prompt[ids.len()..].to_vec();
        let (mut stream, mut shown, mut said) = (base.tokens.stream(), String::new(), vec![]);
        while said.len() < longest {
            if !ids.is_empty() && self.model.turns(ids.len(), ids.len() + unread.len()) {
                cache = self.model.cache(read + longest);
                unread = [std::mem::take(&mut ids), unread].concat();
            }
            let input = Tensor::new(&unread[..], &base.device)?.unsqueeze(0)?;
            let hidden = self.model.continued(&input, &mut cache)?;
            let last = hidden.narrow(1, unread.len() - 1, 1)?;
            ids.append(&mut unread);
            let next = sampler.next(&self.model.logits(&last)?.flatten_all()?)?;
            if base.tokens.ends(next) {
                break;
            }
            said.push(next);
            unread.push(next);
            if let Some(piece) = stream.step(next)? {
                told(&piece);
                shown += &piece;
            }
        }
        self.heard = Some(Heard { by: by.map(str::to_owned), ids, cache });
        let text = base.tokens.decode(&said)?;
        // Bytes at the end that are no whole character.
        if let Some(rest) = text.strip_prefix(&shown) {
            told(rest);
        }
        Ok(Reply { text, ids: said })
    }
}

/// What else there is for an adapter that cannot compute beside the model.
fn merge_it(error: impl Display) -> String {
    format!("{error}; is the adapter of this model? Then `lora merge` makes a model of both")
}

/// An adapter's name and path.
fn named(given: &str) -> (String, PathBuf) {
    if let Some((name, path)) = given.split_once('=').filter(|_| !Path::new(given).exists()) {
        return (name.to_owned(), path.into());
    }
    let path = Path::new(given);
    let name = if path.is_dir() { path.file_name() } else { path.file_stem() };
    let name = name.map_or(given.into(), |name| name.to_string_lossy().into_owned());
    (name, path.to_owned())
}
