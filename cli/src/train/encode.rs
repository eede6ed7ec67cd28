//! An adapter for an encoder: embeddings of pairs that are near, or labels.

use super::args::{Args, OF_ENCODERS};
use super::batch::{Batch, Rows};
use super::fit::{check_rank, fnv, steps, to_train_and_measure, Fit};
use super::recall::ranks;
use super::run::{self, Measured, Options, LABELS};
use super::sentences::{self, examples, has_loss, labels, Example, Examples, Sampled};
use crate::encoder::{Base, Model, Task};
use crate::model::Segment;
use crate::report::Report;
use crate::Result;
use candle_core::{Device, Tensor, D};
use candle_nn::loss::cross_entropy;
use lora::adapter::{Adapter, AdapterConfig};
use lora::train::{contrastive_loss, matryoshka_loss};
use loralib as lora;
use serde_json::json;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;

/// Trains on a file and keeps the best adapter in `--out`; `false` if the run was stopped.
pub fn encode(
    args: &Args,
    model: &Path,
    file: &Path,
    device: &Device,
    report: Report,
) -> Result<bool> {
    let base = Base::read(model, args.length as usize, device)?;
    check_rank(args, base.widest())?;
    args.refuse("an encoder", &["prompt", "system", "raw", "tokens", "temperature", "top_p"])?;
    args.refuse("an encoder", &["no_packing", "loss", "beta", "label_smoothing"])?;
    args.refuse("an encoder", &["train_tokens"])?;
    if let Some(part) = args.mini_batch.filter(|part| *part > args.batch) {
        return Err(format!("--mini-batch {part} is more than --batch {}", args.batch).into());
    }
    for (i, dim) in args.dims.iter().enumerate() {
        let widest = base.widest();
        if *dim as usize > widest {
            return Err(format!("--dims {dim}: the model's embeddings have {widest} values").into());
        }
        if args.dims[..i].contains(dim) {
            return Err(format!("--dims has {dim} twice").into());
        }
    }
    let columns = args.columns.clone().unwrap_or_default();
    let read = |file: &Path| sentences::read(file, &columns);
    // A pair alone would have nothing to be told from.
    let (train_on, measure_on) = to_train_and_measure(args, file, 2, read)?;
    let task = match train_on.first() {
        Some((_, first)) if first.is_pair() => Task::Embed(match args.pooling {
            Some(pooling) => pooling,
            None => base.pooling()?,
        }),
        _ => {
            args.refuse("training with labels", &OF_ENCODERS)?;
            // A rare one may be among those held out.
            let held_out = measure_on.iter().filter(|_| args.valid.is_none());
            base.classify(labels(train_on.iter().chain(held_out)))
        }
    };
    let training = examples(&train_on, &task, &base)?;
    let measured = examples(&measure_on, &task, &base)?;
    tell_examples("to train on", &training, base.longest(), report);
    tell_examples("to measure on", &measured, base.longest(), report);
    report.tell(describe(&task), "task", json!({ "task": task.name() }));
    let (training, measured) = (training.all, measured.all);
    let batch = args.batch as usize;
    let rows = Sampled { examples: &training, batch };
    let to_measure = Sampled { examples: &measured, batch };
    let (batches, lone) = (rows.rows(None).len(), lone(&rows));
    for (what, none) in [("train", batches == 0), ("measure", to_measure.rows(None).is_empty())] {
        if none {
            let reason = match batch {
                1 => "a pair is told from others of its batch: --batch is 1",
                _ => "no two pairs have sentences that differ",
            };
            return Err(format!("nothing to {what} on: {reason}").into());
        }
    }
    if lone > 0 {
        let line = format!(
            "{lone} pairs are left out of a pass: each is alone in its batch, where no sentence is twice"
        );
        report.tell(line, "lone", json!({ "pairs": lone }));
    }

    let config = AdapterConfig {
        base_model_name_or_path: args.base_model.clone().or(Some(base.name())),
        task_type: Some(task.name().to_owned()),
        ..args.lora().into()
    };
    let adapter = Adapter::new(config).targets(args.targets()).seed(args.seed);
    let options = Options {
        lr: args.lr.unwrap_or(2e-4),
        steps: steps(args, (batches, 1), report),
        length: base.longest(),
        scale: matches!(task, Task::Embed(_)).then_some(args.scale),
        no_packing: false,
        task: Some(describe(&task)),
        data: hash(&training),
        valid: hash(&measured),
        ..Options::of(args, base.name())
    };
    if args.resume {
        run::check_options(&args.out, &options)?;
    }
    let (model, adapter) = base.model(&task, adapter)?;
    let learner = Learner { args, task: &task, model: Arc::new(model), adapter: &adapter };
    let loss = |batch: &Batch| learner.loss(batch, &learner.outputs(batch)?);
    let save = || -> Result<()> {
        adapter.save_pretrained(&args.out)?;
        if let Task::Classify(labels) = &task {
            let names: BTreeMap<_, _> = labels.iter().enumerate().collect();
            let path = args.out.join(LABELS);
            let text = format!("{:#}\n", json!({ "id2label": names }));
            fs::write(&path, text).map_err(|e| format!("{}: {e}", path.display()))?;
        }
        Ok(())
    };
    let fit = Fit {
        args,
        adapter: &adapter,
        device: &base.device,
        examples: &rows,
        rows: 1,
        options,
        loss: &loss,
        validate: &|| learner.measure(&to_measure, &base.device),
        save: &save,
        also: match &task {
            Task::Classify(_) => ", names of the labels in labels.json",
            Task::Embed(_) => "",
        },
    };
    fit.run(report)
}

fn describe(task: &Task) -> String {
    match task {
        Task::Embed(pooling) => format!("embeddings by {pooling} pooling"),
        Task::Classify(labels) => format!("{} labels: {}", labels.len(), labels.join(", ")),
    }
}

/// How many pairs are alone in their batches.
fn lone(rows: &Sampled) -> usize {
    rows.batches(None).iter().filter(|batch| !has_loss(batch)).map(Vec::len).sum()
}

/// An encoder and what it learns.
struct Learner<'a> {
    args: &'a Args,
    task: &'a Task,
    model: Arc<Model>,
    adapter: &'a Adapter,
}

impl Learner<'_> {
    /// The embeddings or scores of a batch's sentences, in as much memory as the options say.
    fn outputs(&self, batch: &Batch) -> candle_core::Result<Tensor> {
        if self.args.mini_batch.is_some() {
            let outputs = self.parts(batch)?.into_iter().map(|(ids, lens)| {
                let model = self.model.clone();
                self.adapter.checkpoint("", &ids, move |ids| model.forward(ids, &lens, plain))
            });
            return Tensor::cat(&outputs.collect::<candle_core::Result<Vec<_>>>()?, 0);
        }
        match self.args.checkpointing {
            true => self.model.forward(&batch.ids, &batch.lens, |path, x, layer| {
                self.adapter.checkpoint(path, x, layer)
            }),
            false => self.model.forward(&batch.ids, &batch.lens, plain),
        }
    }

    /// A batch's ids and lengths, of as many sentences at a time as --mini-batch says.
    fn parts(&self, batch: &Batch) -> candle_core::Result<Vec<(Tensor, Vec<usize>)>> {
        let most = self.args.mini_batch.map_or(batch.lens.len(), |part| part as usize);
        let mut start = 0;
        let part = |lens: &[usize]| {
            let tokens = lens.iter().sum();
            let ids = batch.ids.narrow(1, start, tokens)?;
            start += tokens;
            Ok((ids, lens.to_vec()))
        };
        batch.lens.chunks(most).map(part).collect()
    }

    fn loss(&self, batch: &Batch, outputs: &Tensor) -> candle_core::Result<Tensor> {
        if let Task::Classify(_) = self.task {
            return cross_entropy(outputs, &batch.labels);
        }
        let queries = outputs.narrow(0, 0, batch.counted)?;
        let sentences = outputs.narrow(0, batch.counted, outputs.dim(0)? - batch.counted)?;
        let loss = |queries: &Tensor, sentences: &Tensor| {
            contrastive_loss(queries, sentences, 1. / self.args.scale)
        };
        match self.args.dims.is_empty() {
            true => loss(&queries, &sentences),
            false => matryoshka_loss(&queries, &sentences, &self.dims(), loss),
        }
    }

    fn dims(&self) -> Vec<usize> {
        self.args.dims.iter().map(|dim| *dim as usize).collect()
    }

    /// The mean loss in batches, and the share of the right labels, or of queries whose own sentence is the nearest or among
    /// the nearest ten, by all values of their embeddings and by the first.
    fn measure(&self, measured: &Sampled, device: &Device) -> Result<Measured> {
        let (mut sum, mut counted, mut right) = (0., 0, 0);
        let (mut pairs, mut queries, mut sentences) = (vec![], vec![], vec![]);
        for rows in measured.batches(None) {
            let (batch, has_loss) =
                (measured.batch(std::slice::from_ref(&rows), device)?, has_loss(&rows));
            let outputs = self.parts(&batch)?.into_iter().map(|(ids, lens)| {
                Ok(self.model.forward(&ids, &lens, plain)?.detach()) // without a graph
            });
            let outputs = Tensor::cat(&outputs.collect::<candle_core::Result<Vec<_>>>()?, 0)?;
            let (count, texts) = (rows.len(), batch.lens.len());
            if has_loss {
                let loss = self.loss(&batch, &outputs)?.to_scalar::<f32>()?;
                sum += f64::from(loss) * count as f64;
                counted += count;
            }
            if texts > count {
                queries.push(outputs.narrow(0, 0, count)?);
                sentences.push(outputs.narrow(0, count, count)?);
                pairs.extend(rows);
            } else {
                let same = outputs.argmax(D::Minus1)?.eq(&batch.labels)?;
                right += same.to_vec1::<u8>()?.into_iter().map(usize::from).sum::<usize>();
            }
        }
        let loss = sum / counted as f64;
        if pairs.is_empty() {
            let accuracy = right as f64 / counted as f64;
            return Ok(Measured { loss, more: vec![("accuracy".to_owned(), accuracy)] });
        }
        let (queries, sentences) = (Tensor::cat(&queries, 0)?, Tensor::cat(&sentences, 0)?);
        let width = queries.dim(1)?;
        let mut more = vec![];
        let firsts = self.dims().into_iter().filter(|dim| *dim < width);
        for dim in [width].into_iter().chain(firsts) {
            let first = |x: &Tensor| x.narrow(1, 0, dim);
            let ranks = ranks(&first(&queries)?, &first(&sentences)?, &pairs)?;
            let of = if dim < width { format!(" of {dim} values") } else { String::new() };
            for within in [1, 10] {
                let found = ranks.iter().filter(|rank| **rank < within).count();
                more.push((format!("recall@{within}{of}"), found as f64 / ranks.len() as f64));
            }
        }
        Ok(Measured { loss, more })
    }
}

fn plain(_: &str, x: &Tensor, layer: Segment) -> candle_core::Result<Tensor> {
    layer(x)
}

fn tell_examples(what: &str, examples: &Examples, longest: usize, report: Report) {
    let Examples { all, cut, same } = examples;
    let mut lens: Vec<_> = all.iter().flat_map(|e| e.texts.iter().map(Vec::len)).collect();
    lens.sort_unstable();
    let (shortest, median, most) =
        (lens.first().copied(), lens.get(lens.len() / 2).copied(), lens.last().copied());
    let [shortest, median, most] = [shortest, median, most].map(Option::unwrap_or_default);
    let line = format!(
        "{} examples {what}: sentences of {shortest} to {most} tokens, median {median}",
        all.len()
    );
    let values = json!({
        "what": what, "examples": all.len(), "tokens": lens.iter().sum::<usize>(), "shortest": shortest,
        "median": median, "longest": most, "cut": cut,
    });
    report.tell(line, "examples", values);
    if *cut > 0 {
        let line = format!("{cut} sentences are cut off after {longest} tokens: see --length");
        report.tell(line, "cut", json!({ "sentences": cut }));
    }
    if let Some(first) = same.first() {
        let line = format!(
            "{} more are left out, the first is {first}: the model reads a sentence of the pair twice",
            same.len()
        );
        report.tell(line, "same", json!({ "pairs": same }));
    }
}

/// Of all tokens and labels.
fn hash(examples: &[Example]) -> u64 {
    fnv(examples.iter().flat_map(|example| {
        let texts = example
            .texts
            .iter()
            .flat_map(|ids| ids.iter().map(|id| u64::from(*id)).chain([u64::MAX]));
        texts.chain([u64::from(example.label)])
    }))
}
