//! Whether an adapter and a model fit: every target is an adapted layer, and the model reads all that the adapter has.

use super::options::Options;
use super::record::Record;
use super::state::Adapted;
use super::tied::check_tied;
use super::Adapter;
use crate::layers::{ends_in, Part};
use crate::utils::{variable, variables, Trainable};
use crate::weights::{is_equal, parameter_of, Bias};
use crate::{Error, Result};
use candle_core::Tensor;
use candle_nn::VarMap;
use std::sync::Arc;

impl Adapter {
    /// An error unless every target is an adapted layer, the model reads all that the adapter has, and there is
    /// something to train. Call it after the model is built.
    ///
    /// # Errors
    /// If no model was built on `var_builder`, or the options were changed after it; if nothing is selected to be
    /// trained, as with `r = 0`, the default; if a target matches no layer; if the model reads a
    /// target's weight without building a layer of [`nn`](crate::nn) around it, for instance transposed; if a
    /// layer could not be adapted; and if the adapter has factors for a layer that the model lacks, or another tensor,
    /// such as a head, that it does not read. The error has the names.
    ///
    /// For a model on [`merged`](Self::merged): if it has not read a tensor that the adapter changes.
    pub fn check(&self) -> Result<()> {
        self.check_models()?;
        self.named_vars().map(drop)
    }

    pub(crate) fn check_models(&self) -> Result<()> {
        let invalid = |reason: &str| Err(Error::Invalid(reason.to_owned()));
        let state = self.state();
        let merged = state.merged.as_ref().filter(|merged| !merged.record.is_empty());
        if let Some(merged) = merged {
            check_merged(&merged.changed, &merged.record)?;
        }
        match &state.options {
            None if merged.is_some() => Ok(()),
            None => invalid("no model was built on the adapter's `var_builder` yet"),
            Some(built) if !Arc::ptr_eq(built, &self.options) => invalid(
                "the options of the adapter were changed after `var_builder`: set them before",
            ),
            Some(_) => check(&self.options, &self.vars, &state.adapted, &self.record),
        }
    }
}

/// An error unless the adapter with these options and variables fits the models of the record, whose layers it has
/// `adapted`.
pub(crate) fn check(
    options: &Options,
    vars: &VarMap,
    adapted: &Adapted,
    record: &Record,
) -> Result<()> {
    if let Some((path, reason)) = adapted.failures.iter().next() {
        return Err(Error::tensor(Part::Base("weight").at(path), reason));
    }
    let all_linear = options.targets.is_all_linear();
    if all_linear && options.config.bias == Bias::LoraOnly {
        let reason =
            "which biases belong to adapted layers is not known in advance: name the targets";
        return Err(Error::unsupported("`Bias::LoraOnly` with all linear layers", reason));
    }
    let mut without_layer = record.without_layer();
    without_layer.retain(|(path, _)| options.selects(path));
    // A weight without a layer is reported below, with another reason.
    let read = without_layer.iter().filter(|_| !all_linear).map(|(path, _)| path.as_str());
    options.valid().map_err(Error::Invalid)?;
    let hinted = |reason: String| {
        let (hint, names) = (options.layers.hint(), record.names());
        let mut whole = record.paths();
        whole.retain(|path| {
            let weight = Part::Base("weight").at(path);
            options.targets.matches(path) && variable(vars, &weight).is_some()
        });
        let trained = match whole.first() {
            Some(first) => format!("; {first:?} is trained as a whole, so it has no factors"),
            None => String::new(),
        };
        Error::Invalid(format!("{reason}{trained}{hint}; its layers are named {names}"))
    };
    let known = adapted.layers.keys().map(String::as_str).chain(read);
    options.targets.check(known, &excluded(options, record)).map_err(hinted)?;
    // All-linear also reads the weights of norms and other layers.
    let may_be_linear =
        |(path, rank): &&(String, usize)| !all_linear || (*rank == 2 && !is_table(path));
    if let Some((path, _)) = without_layer.iter().find(may_be_linear) {
        let reason = match adapted.layers.is_empty() {
            true => "no layer of `lora::nn` was built around it: does the model's file have `use loralib::nn as \
                     candle_nn;` at its top?",
            false => "it is a target, but the model builds no layer of `lora::nn` around it: its file may lack \
                      `use loralib::nn as candle_nn;`, or it transposes, casts or splits the tensor; `exclude` it",
        };
        return Err(Error::tensor(Part::Base("weight").at(path), reason));
    }
    let unmatched = options.parameters.iter().find(|end| {
        let mut trained = adapted.layers.keys().filter_map(|path| parameter_of(path));
        !trained.any(|parameter| ends_in(&parameter, end))
    });
    if let Some(end) = unmatched.filter(|_| !options.loaded) {
        return Err(Error::Invalid(format!(
            "target_parameters has {end:?}, and the model has no layers of such experts: trained are `gate_up_proj` and \
             `down_proj` of modules `experts`"
        )));
    }
    let tables = options.config.trainable_token_indices.iter();
    let mut unmatched = tables.filter(|(key, _)| {
        let is_own = |path: &String| options.token_rows(path).is_some_and(|(own, _)| own == *key);
        !adapted.tokens.keys().any(is_own)
    });
    if let Some((key, _)) = unmatched.next() {
        return Err(Error::Invalid(format!(
            "trainable_token_indices has {key:?}, and the model builds no embedding or head of this name; its layers are \
             named {}",
            record.names()
        )));
    }
    check_tied(options, vars, adapted, record)?;
    unread(options, vars, adapted, record)
}

/// The paths of the modules that are targets and excluded.
pub(super) fn excluded(options: &Options, record: &Record) -> Vec<String> {
    let mut paths = record.paths();
    paths.retain(|path| options.targets.matches(path) && options.exclude.matches(path));
    paths
}

/// Whether a module is a table by its name, as of positions, which some models read without a layer.
fn is_table(path: &str) -> bool {
    let last = path.rsplit('.').next().unwrap_or(path);
    ["embed", "position", "wpe", "wte"].iter().any(|name| last.contains(name))
}

/// An error for a tensor of the adapter that no model has read.
fn unread(options: &Options, vars: &VarMap, adapted: &Adapted, record: &Record) -> Result<()> {
    let (vars, trainable) = (variables(vars), Trainable::from(&options.config));
    let saved = vars.keys().filter(|name| trainable.selects(name, |n| vars.contains_key(n)));
    let is_read = |name: &str| {
        // The factors are read by the layer, and the table under them is the base's.
        let (path, part) = Part::parse(name);
        let of_layer = part.is_lora() || options.frozen.contains_key(name);
        match part {
            Part::TokenRows => adapted.tokens.contains_key(path),
            Part::BiasOfB => adapted.layers.contains_key(path),
            _ => record.has(name) || (of_layer && adapted.layers.contains_key(path)),
        }
    };
    let mut unread = saved.filter(|name| !is_read(name)).collect::<Vec<_>>();
    for (name, own) in options.frozen.iter().filter(|(name, _)| !is_read(name)) {
        // PEFT saves the table of a tied head a second time.
        let all = vars.iter().map(|(name, var)| (name, var.as_tensor())).chain(&options.frozen);
        let mut tables = all.filter(|(other, _)| own.rank() == 2 && is_read(other));
        let equal =
            |any, (_, other): (&String, &Tensor)| Ok::<_, Error>(any || is_equal(own, other)?);
        if !tables.try_fold(false, equal)? {
            unread.push(name);
        }
    }
    let Some(name) = unread.first() else { return Ok(()) };
    let reason = match Part::parse(name).1.is_lora() {
        true => "the model has no such layer",
        false => "the model does not read it",
    };
    let tied = record.tied();
    let hint = tied.first().map_or_else(String::new, |(path, kinds)| {
        format!(
            "; layers of the kinds {kinds:?} share the weight of {path:?}: a head that is tied to the embeddings has \
             no tensor of its own"
        )
    });
    Err(Error::tensor(*name, format!("the adapter has it, but {reason}{hint}")))
}

/// An error for a tensor that the adapter changes and that the model on [`merged`](Adapter::merged) has not read.
fn check_merged(changed: &[String], record: &Record) -> Result<()> {
    match changed.iter().find(|name| !record.has(name)) {
        None => Ok(()),
        Some(name) => {
            let reason = "the adapter changes it, but the model on `merged` has not read it: a head that the model \
                          ties to the embeddings has no tensor of its own, though its values differ from theirs with \
                          this adapter: build the model with `tie_word_embeddings: false`";
            Err(Error::tensor(name, reason))
        }
    }
}
