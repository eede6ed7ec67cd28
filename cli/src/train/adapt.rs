//! An adapter for a language model.

use super::args::{Args, OF_ENCODERS};
use super::batch::{Batch, Packed, Rows};
use super::data::{self, Document};
use super::examples::{examples, Example, Examples};
use super::fit::{check_rank, fnv, steps, to_train_and_measure, Fit};
use super::loss::{batch_loss, checkpointed_loss, mean_loss};
use super::peak;
use super::run::{self, Measured, Options};
use crate::model::Base;
use crate::report::Report;
use crate::Result;
use lora::adapter::{Adapter, AdapterConfig};
use loralib as lora;
use serde_json::json;
use std::path::Path;

/// Trains on a file, keeps the best adapter in `--out` and gives a document to talk about; `None` if the run was stopped.
pub fn adapt(args: &Args, base: &Base, file: &Path, report: Report) -> Result<Option<Document>> {
    args.refuse("a language model", &OF_ENCODERS)?;
    args.refuse("training without --loss", &["beta", "label_smoothing"])?;
    let length = begin(args, base, report)?;
    let columns = args.columns.clone().unwrap_or_default();
    let read = |file: &Path| data::read(file, &columns, base.template.as_ref());
    let (train_on, mut valid) = to_train_and_measure(args, file, 1, read)?;
    let training = examples(&train_on, &base.tokens, length)?;
    let measured = examples(&valid, &base.tokens, length)?;
    let rows = Packed { examples: &training.all, length: (!args.no_packing).then_some(length) };
    tell_examples("to train on", &training, length, rows.length, report);
    tell_examples("to measure on", &measured, length, Some(length), report);

    let adapter = adapter(args, base)?;
    let options = Options {
        lr: args.lr.unwrap_or(if args.model.is_some() { 2e-4 } else { 5e-3 }),
        steps: steps(args, (rows.rows(None).len(), args.batch as usize), report),
        length,
        data: hash(&training.all),
        valid: hash(&measured.all),
        ..Options::of(args, base.name())
    };
    if args.resume {
        run::check_options(&args.out, &options)?;
    }
    let model = base.model(adapter.var_builder(base.var_builder()?))?;
    let validate = || {
        let batch = (options.batch, length);
        let loss = mean_loss(&model, &measured.all, batch, &base.device)?;
        Ok(Measured { loss, more: vec![("perplexity".to_owned(), loss.exp())] })
    };
    let loss = |batch: &Batch| match args.checkpointing {
        true => checkpointed_loss(&model, &adapter, batch),
        false => batch_loss(&model, batch),
    };
    let fit = Fit {
        args,
        adapter: &adapter,
        device: &base.device,
        examples: &rows,
        rows: args.batch as usize,
        options: options.clone(),
        loss: &loss,
        validate: &validate,
        save: &|| base.save(&adapter, &args.out),
        also: also(base),
    };
    Ok(fit.run(report)?.then(|| valid.swap_remove(0)))
}

/// Checks the rank, and gives the most tokens of a row.
pub fn begin(args: &Args, base: &Base, report: Report) -> Result<usize> {
    check_rank(args, base.config.hidden_size)?;
    peak::reset(); // without the tiny model's training
    let length = (args.length as usize).min(base.config.longest);
    if length < args.length as usize {
        let line = format!("rows have {length} tokens, as many as the model takes");
        report.tell(line, "length", json!({ "length": length }));
    }
    Ok(length)
}

/// A new adapter for a language model.
pub fn adapter(args: &Args, base: &Base) -> Result<Adapter> {
    let id = |token: &String| match base.tokens.id(token) {
        Some(id) => Ok(id as usize),
        None => Err(format!("--train-tokens {token}: the tokenizer has no such token")),
    };
    let tokens = args.train_tokens.iter().map(id).collect::<std::result::Result<Vec<_>, _>>()?;
    if base.gguf().is_some() && !tokens.is_empty() {
        let reason =
            "llama.cpp's adapters have no embeddings of tokens: give the model as a folder";
        return Err(format!("--train-tokens: {reason}").into());
    }
    let mut config = AdapterConfig {
        base_model_name_or_path: args.base_model.clone().or(base.folder()),
        task_type: Some("CAUSAL_LM".to_owned()),
        ..args.lora().into()
    };
    if !tokens.is_empty() {
        config.trainable_token_indices.insert("embed_tokens".to_owned(), tokens);
    }
    Ok(Adapter::new(config).targets(args.targets()).seed(args.seed))
}

/// What is saved besides, for a reader.
pub fn also(base: &Base) -> &'static str {
    match base.gguf() {
        Some(_) => ", for llama.cpp in adapter.gguf",
        None => "",
    }
}

/// What the examples are: their lengths, what of them is learned, their rows, and what became of longer ones.
fn tell_examples(
    what: &str,
    examples: &Examples,
    length: usize,
    packed: Option<usize>,
    report: Report,
) {
    let Examples { all, cut, dropped } = examples;
    let mut lens: Vec<_> = all.iter().map(Example::inputs).collect();
    lens.sort_unstable();
    let (tokens, learned) =
        (lens.iter().sum::<usize>(), all.iter().map(Example::predicted).sum::<usize>());
    let rows = Packed { examples: all, length: packed }.rows(None).len();
    let (shortest, median, longest) =
        (lens.first().copied(), lens.get(lens.len() / 2).copied(), lens.last().copied());
    let [shortest, median, longest] = [shortest, median, longest].map(Option::unwrap_or_default);
    let share = 100. * learned as f64 / tokens.max(1) as f64;
    let line = format!(
        "{} examples {what}: {shortest} to {longest} tokens, median {median}, {share:.0} % learned; {rows} rows",
        all.len()
    );
    let values = json!({
        "what": what, "examples": all.len(), "tokens": tokens, "learned": learned, "shortest": shortest,
        "median": median, "longest": longest, "rows": rows, "cut": cut, "dropped": dropped.len(),
    });
    report.tell(line, "examples", values);
    if *cut > 0 {
        let line = format!("{cut} of them are cut off after {length} tokens: see --length");
        report.tell(line, "cut", json!({ "examples": cut }));
    }
    if let Some(first) = dropped.first() {
        let line = format!(
            "{} more are left out, the first is {first}: nothing to learn among the first {length} tokens",
            dropped.len()
        );
        report.tell(line, "dropped", json!({ "examples": dropped }));
    }
}

/// Of all tokens and of what is learned.
pub fn hash<'a>(examples: impl IntoIterator<Item = &'a Example>) -> u64 {
    let tokens = examples.into_iter().flat_map(|example| example.ids.iter().zip(&example.learned));
    fnv(tokens.map(|(id, learned)| u64::from(*id) << 1 | u64::from(*learned)))
}
