//! Heads that are tied to a table of embeddings: the base has one tensor for both.
//!
//! An adapter may change one of the two alone. Then the head is a tensor of its own in the merged model, as it is in
//! PEFT's: its values are the base's table, with the head's own changes. It stays tied if both get the same change,
//! which PEFT's `ensure_weight_tying` writes for each (the transposed factors, or an equal tensor).

use super::{is_equal, LoraWeights};
use crate::layers::{ends_in, is_within, Part};
use candle_core::Result;

struct Tie {
    table: &'static str,
    head: &'static str,
    /// A tensor that tells such a model from others with this table.
    witness: Option<&'static str>,
}

const fn tie(table: &'static str, head: &'static str) -> Tie {
    Tie { table, head, witness: None }
}

/// The paths of tables and their heads in transformers' models, after what both paths begin with. T5's is not among
/// them: it scales the output of a tied head.
const TIES: [Tie; 13] = [
    Tie {
        witness: Some("model.encoder.conv1.weight"),
        ..tie("model.decoder.embed_tokens", "proj_out")
    },
    tie("model.decoder.embed_tokens", "lm_head"),
    tie("model.language_model.embed_tokens", "lm_head"),
    tie("model.embed_tokens", "lm_head"),
    tie("model.shared", "lm_head"),
    tie("transformer.wte", "lm_head"),
    tie("wte", "lm_head"),
    tie("transformer.word_embeddings", "lm_head"),
    tie("gpt_neox.embed_in", "embed_out"),
    tie("backbone.embeddings", "lm_head"),
    Tie {
        witness: Some("cls.predictions.bias"),
        ..tie("bert.embeddings.word_embeddings", "cls.predictions.decoder")
    },
    Tie {
        witness: Some("lm_head.dense.weight"),
        ..tie("roberta.embeddings.word_embeddings", "lm_head.decoder")
    },
    Tie {
        witness: Some("vocab_transform.weight"),
        ..tie("distilbert.embeddings.word_embeddings", "vocab_projector")
    },
];

/// Layers that a model has in place of a language model's head.
const OTHER_HEADS: [&str; 4] = ["score", "classifier", "qa_outputs", "classification_head"];

/// Whether a table is named as the input embeddings of transformers' models.
pub(crate) fn is_input_table(path: &str) -> bool {
    let last = |path: &'static str| path.rsplit('.').next().unwrap_or(path);
    TIES.iter().any(|tie| ends_in(path, last(tie.table)))
}

/// Whether a layer is named as a head that transformers' models may tie to their input embeddings.
pub(crate) fn is_output_head(path: &str) -> bool {
    TIES.iter().any(|tie| ends_in(path, tie.head))
}

fn weight(path: &str) -> String {
    Part::Base("weight").at(path)
}

/// `path` without `end`, as a prefix of other paths.
fn before<'a>(path: &'a str, end: &str) -> Option<&'a str> {
    path.strip_suffix(end).filter(|start| start.is_empty() || start.ends_with('.'))
}

/// The heads that models may tie to the table at `path`, those with a witness first, with the witness.
fn heads_of(path: &str) -> impl Iterator<Item = (String, Option<String>)> + use<'_> {
    TIES.iter().filter_map(move |Tie { table, head, witness }| {
        let start = before(path, table)?;
        Some((format!("{start}{head}"), witness.map(|name| format!("{start}{name}"))))
    })
}

/// The head that a model with these tensors ties to the table at `path`, if it has one.
pub(crate) fn head_of(path: &str, exists: impl Fn(&str) -> bool) -> Option<String> {
    let known = |witness: &Option<String>| witness.as_ref().is_none_or(|name| exists(name));
    heads_of(path).find(|(_, witness)| known(witness)).map(|(head, _)| head)
}

/// The weight of the head that such a model ties to this weight of a table: its name, for that of the table.
pub(crate) fn head_weight(table: &str, exists: impl Fn(&str) -> bool) -> Option<String> {
    match Part::parse(table) {
        (path, Part::Base("weight")) => Some(weight(&head_of(path, exists)?)),
        _ => None,
    }
}

/// The table that the head at `path` is tied to, in a model with these tensors.
pub(crate) fn table_of(path: &str, exists: impl Fn(&str) -> bool) -> Option<String> {
    TIES.iter().find_map(|Tie { table, head, .. }| {
        let table = format!("{}{table}", before(path, head)?);
        exists(&weight(&table)).then_some(table)
    })
}

/// The table whose values a head has that a model reads although the base ties it: its name, for that of the head.
pub(crate) fn untied_table(name: &str, exists: impl Fn(&str) -> bool) -> Option<String> {
    match Part::parse(name) {
        (path, Part::Base("weight")) if !exists(name) => Some(weight(&table_of(path, exists)?)),
        _ => None,
    }
}

/// Whether the adapter has a head for another task.
pub(crate) fn has_other_head(weights: &LoraWeights) -> bool {
    let mut paths = weights.others.keys().map(|name| Part::parse(name).0);
    paths.any(|path| OTHER_HEADS.iter().any(|head| before(path, head).is_some()))
}

impl LoraWeights {
    /// Whether the adapter trains the module of a tensor as a whole.
    pub(crate) fn trains_module(&self, name: &str) -> bool {
        self.options.modules_to_save.iter().any(|module| is_within(name, module))
    }

    /// A table with an update that a head may be tied to, which has none.
    pub(crate) fn tied_without_factors(&self) -> Option<&str> {
        let lacks_head = |path: &str| {
            let mut heads = heads_of(path).peekable();
            heads.peek().is_some() && !heads.any(|(head, _)| self.layers.contains_key(&head))
        };
        self.layers.keys().map(String::as_str).find(|path| lacks_head(path))
    }

    /// The weights of heads with the transposed factors of tables, and of these tables, with `ensure_weight_tying`.
    pub(crate) fn tied_updates(&self) -> Result<Vec<(String, String)>> {
        let mut tied = vec![];
        for (path, layer) in self.layers.iter().filter(|_| self.options.ensure_weight_tying) {
            for head in heads_of(path).map(|(head, _)| head) {
                let Some(own) = self.layers.get(&head) else { continue };
                if layer.magnitude.is_none()
                    && is_equal(&own.a, &layer.b.t()?)?
                    && is_equal(&own.b, &layer.a.t()?)?
                {
                    tied.push((weight(&head), weight(path)));
                }
            }
        }
        Ok(tied)
    }

    /// The weights of heads and tables that are trained as one tensor, which the adapter has for each: equal ones are not
    /// enough, since two that are trained apart are equal before the first step.
    pub(crate) fn tied_modules(&self) -> Result<Vec<(String, String)>> {
        let mut tied = vec![];
        if !self.options.ensure_weight_tying {
            return Ok(tied);
        }
        for (table, tensor) in &self.others {
            let (path, Part::Base("weight")) = Part::parse(table) else { continue };
            for head in heads_of(path).map(|(head, _)| weight(&head)) {
                let Some(own) = self.others.get(&head) else { continue };
                // PEFT names one of the two.
                if self.trains_module(table) && is_equal(own, tensor)? {
                    tied.push((head, table.clone()));
                }
            }
        }
        Ok(tied)
    }
}

/// Whether the adapter makes the change of the weight at `path` to another weight, which the base has. With DoRA it
/// does not: the outputs of the two layers, and so their magnitudes, are not the same.
pub(crate) fn is_tied(
    path: &str,
    weights: &LoraWeights,
    exists: impl Fn(&str) -> bool,
) -> Result<bool> {
    let Some(own) = weights.others.get(&weight(path)) else {
        return has_tied_factors(path, weights, exists);
    };
    let updated = |path: &str| weights.layers.contains_key(path);
    for (name, other) in &weights.others {
        let (table, Part::Base("weight")) = Part::parse(name) else { continue };
        if table == path || !exists(name) || !is_equal(own, other)? {
            continue;
        }
        // With the same tensor, the updates have to be the same too.
        return match (updated(path), updated(table)) {
            (false, false) => Ok(true),
            (true, true) => has_tied_factors(path, weights, exists),
            _ => Ok(false),
        };
    }
    Ok(false)
}

/// Whether a weight of the base has the transposed factors of the layer at `path`.
fn has_tied_factors(
    path: &str,
    weights: &LoraWeights,
    exists: impl Fn(&str) -> bool,
) -> Result<bool> {
    let Some(own) = weights.layers.get(path).filter(|own| own.magnitude.is_none()) else {
        return Ok(false);
    };
    for (other_path, other) in weights.layers() {
        if other_path != path
            && exists(&weight(other_path))
            && is_equal(&own.a, &other.b.t()?)?
            && is_equal(&own.b, &other.a.t()?)?
        {
            return Ok(true);
        }
    }
    Ok(false)
}
