//! An adapter by which a language model prefers chosen answers to rejected ones.

use super::adapt::{adapter, also, begin, hash};
use super::args::{Args, OF_ENCODERS};
use super::batch::Rows;
use super::data::Document;
use super::fit::{steps, to_train_and_measure, Fit};
use super::pairs::{self, Compared, Pair, Pairs, Sampled};
use super::run::{self, Measured, Options};
use crate::model::{Base, Decoder, Segment};
use crate::report::Report;
use crate::Result;
use candle_core::Tensor;
use clap::ValueEnum;
use lora::train::{dpo_loss, linear_log_probs_with, orpo_loss};
use lora::train::{DpoConfig, DpoLossType, PairLogProbs, PreferenceLoss};
use lora::Adapter;
use loralib as lora;
use serde_json::json;
use std::path::Path;

/// The losses of `--loss`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Loss {
    Dpo,
    Ipo,
    Hinge,
    Robust,
    Orpo,
}

impl Loss {
    /// Whether an answer's log-probability is the mean over its tokens, not the sum.
    fn is_mean(self) -> bool {
        matches!(self, Self::Ipo | Self::Orpo)
    }

    fn needs_reference(self) -> bool {
        self != Self::Orpo
    }

    fn has_label_smoothing(self) -> bool {
        matches!(self, Self::Dpo | Self::Robust)
    }
}

/// Trains on a file, keeps the best adapter in `--out` and gives a document to talk about; `None` if the run was stopped.
pub fn prefer(
    args: &Args,
    loss: Loss,
    base: &Base,
    file: &Path,
    report: Report,
) -> Result<Option<Document>> {
    let name = format!("{loss:?}").to_lowercase();
    args.refuse("a language model", &OF_ENCODERS)?;
    args.refuse("training with --loss", &["no_packing"])?;
    if !loss.has_label_smoothing() {
        args.refuse(&format!("--loss {name}"), &["label_smoothing"])?;
    }
    let length = begin(args, base, report)?;
    let columns = args.columns.clone().unwrap_or_default();
    let read = |file: &Path| pairs::read(file, &columns, base.template.as_ref());
    let (train_on, mut valid) = to_train_and_measure(args, file, 1, read)?;
    let training = pairs::pairs(&train_on, &base.tokens, length)?;
    let measured = pairs::pairs(&valid, &base.tokens, length)?;
    tell_pairs("to train on", &training, length, report);
    tell_pairs("to measure on", &measured, length, report);
    let (training, measured) = (training.all, measured.all);
    let prompts = loss == Loss::Orpo;
    let rows = Sampled { pairs: &training, prompts };
    let to_measure = Sampled { pairs: &measured, prompts };

    let adapter = adapter(args, base)?;
    let of_pairs = |pairs: &[Pair]| hash(pairs.iter().flat_map(Pair::examples));
    let smoothing = match loss.has_label_smoothing() {
        true => format!(" --label-smoothing {}", args.label_smoothing),
        false => String::new(),
    };
    let options = Options {
        lr: args.lr.unwrap_or(5e-5),
        steps: steps(args, (training.len(), args.batch as usize), report),
        length,
        loss: Some(format!("{name} --beta {}{smoothing}", args.beta)),
        data: of_pairs(&training),
        valid: of_pairs(&measured),
        ..Options::of(args, base.name())
    };
    if args.resume {
        run::check_options(&args.out, &options)?;
    }
    let model = base.model(adapter.var_builder(base.var_builder()?))?;
    let policy = Policy { model: &model, adapter: &adapter, args, loss };
    let fit = Fit {
        args,
        adapter: &adapter,
        device: &base.device,
        examples: &rows,
        rows: args.batch as usize,
        options,
        loss: &|batch| Ok(policy.loss(batch)?.loss),
        validate: &|| policy.measure(&to_measure, args.batch as usize, base),
        save: &|| base.save(&adapter, &args.out),
        also: also(base),
    };
    Ok(fit.run(report)?.then(|| valid.swap_remove(0).chosen))
}

/// A model with the adapter that is trained.
struct Policy<'a> {
    model: &'a Decoder,
    adapter: &'a Adapter,
    args: &'a Args,
    loss: Loss,
}

/// What a model says of some pairs.
struct Said {
    answers: PairLogProbs,
    /// The cross-entropy of prompts and chosen answers, if both have labels.
    nll: Tensor,
}

impl Policy<'_> {
    fn loss(&self, batch: &Compared) -> candle_core::Result<PreferenceLoss> {
        let reference = match self.loss.needs_reference() {
            true => Some(self.reference(batch)?),
            false => None,
        };
        let Said { answers, nll } = match self.args.checkpointing {
            true => self.said(batch, |path, x, layer| self.adapter.checkpoint(path, x, layer))?,
            false => self.said(batch, |_, x, layer| layer(x))?,
        };
        let loss_type = match self.loss {
            Loss::Dpo => DpoLossType::Sigmoid,
            Loss::Ipo => DpoLossType::Ipo,
            Loss::Hinge => DpoLossType::Hinge,
            Loss::Robust => DpoLossType::Robust,
            Loss::Orpo => return orpo_loss(&answers, &nll, self.args.beta),
        };
        let Args { beta, label_smoothing, .. } = *self.args;
        let cfg = DpoConfig { beta, loss_type, label_smoothing };
        match reference {
            Some(reference) => dpo_loss(&answers, &reference, &cfg),
            None => candle_core::bail!("{loss_type:?} needs a reference"),
        }
    }

    /// What the model says without the adapter; computed when a pair is first seen.
    fn reference(&self, batch: &Compared) -> candle_core::Result<PairLogProbs> {
        if batch.pairs.iter().any(|pair| pair.reference.get().is_none()) {
            let run = || self.said(batch, |_, x, layer| layer(x)).map_err(lora::Error::from);
            let answers = self.adapter.disabled(run)?.answers;
            let both = answers.chosen.to_vec1()?.into_iter().zip(answers.rejected.to_vec1()?);
            for (pair, (chosen, rejected)) in batch.pairs.iter().zip(both) {
                pair.reference.get_or_init(|| [chosen, rejected]);
            }
        }
        let of = |i: usize| {
            let known = batch.pairs.iter().filter_map(|pair| Some(pair.reference.get()?[i]));
            Tensor::from_iter(known, batch.text.device())
        };
        Ok(PairLogProbs { chosen: of(0)?, rejected: of(1)? })
    }

    fn said(
        &self,
        batch: &Compared,
        run: impl Fn(&str, &Tensor, Segment) -> candle_core::Result<Tensor>,
    ) -> candle_core::Result<Said> {
        let Compared { pairs, texts, text, learned } = batch;
        let hidden = self.model.packed(&texts.ids, &texts.lens, run)?;
        let (head, capped) = (&self.model.lm_head, self.model.capped());
        let log_probs = linear_log_probs_with(&hidden, head, &texts.labels, capped)?.squeeze(0)?;
        let of_texts = |values: &Tensor| {
            let zeros = Tensor::zeros(texts.lens.len(), values.dtype(), values.device())?;
            zeros.index_add(text, values, 0)
        };
        let answers = of_texts(&(&log_probs * learned)?)?;
        let answers = match self.loss.is_mean() {
            true => (answers / of_texts(learned)?)?,
            false => answers,
        };
        let chosen: usize = texts.lens[..pairs.len()].iter().sum();
        let nll = (log_probs.narrow(0, 0, chosen)?.sum_all()? / -(chosen as f64))?;
        Ok(Said { answers: PairLogProbs::split(&answers)?, nll })
    }

    /// The mean loss, the share of the pairs whose chosen answer has the greater reward, and the mean rewards.
    fn measure(&self, measured: &Sampled, batch: usize, base: &Base) -> Result<Measured> {
        let (mut loss, mut right, mut sums) = (0., 0, [0.; 2]);
        let rows = measured.rows(None);
        for rows in rows.chunks(batch) {
            let of = self.loss(&measured.batch(rows, &base.device)?)?;
            loss += f64::from(of.loss.to_scalar::<f32>()?) * rows.len() as f64;
            let chosen = of.chosen_rewards.to_vec1::<f32>()?;
            let rejected = of.rejected_rewards.to_vec1::<f32>()?;
            right += chosen.iter().zip(&rejected).filter(|(a, b)| a > b).count();
            for (sum, rewards) in sums.iter_mut().zip([chosen, rejected]) {
                *sum += rewards.into_iter().map(f64::from).sum::<f64>();
            }
        }
        let count = rows.len() as f64;
        let [chosen, rejected] = sums.map(|sum| sum / count);
        let more = [
            ("accuracy", right as f64 / count),
            ("margin", chosen - rejected),
            ("chosen reward", chosen),
            ("rejected reward", rejected),
        ];
        let more = more.map(|(name, value)| (name.to_owned(), value)).to_vec();
        Ok(Measured { loss: loss / count, more })
    }
}

fn tell_pairs(what: &str, pairs: &Pairs, length: usize, report: Report) {
    let Pairs { all, cut, dropped } = pairs;
    let examples: Vec<_> = all.iter().flat_map(Pair::examples).collect();
    let mut lens: Vec<_> = examples.iter().map(|example| example.inputs()).collect();
    lens.sort_unstable();
    let (tokens, learned) =
        (lens.iter().sum::<usize>(), examples.iter().map(|e| e.predicted()).sum::<usize>());
    let (shortest, median, longest) =
        (lens.first().copied(), lens.get(lens.len() / 2).copied(), lens.last().copied());
    let [shortest, median, longest] = [shortest, median, longest].map(Option::unwrap_or_default);
    let line = format!(
        "{} pairs {what}: texts of {shortest} to {longest} tokens, median {median}, {:.0} % of them answers",
        all.len(),
        100. * learned as f64 / tokens.max(1) as f64
    );
    let values = json!({
        "what": what, "pairs": all.len(), "tokens": tokens, "learned": learned, "shortest": shortest,
        "median": median, "longest": longest, "cut": cut, "dropped": dropped.len(),
    });
    report.tell(line, "examples", values);
    if *cut > 0 {
        let line = format!(
            "{cut} pairs have an answer that is cut off after {length} tokens: see --length"
        );
        report.tell(line, "cut", json!({ "pairs": cut }));
    }
    if let Some(first) = dropped.first() {
        let line = format!(
            "{} more are left out, the first is {first}: their answers do not differ among the first {length} tokens",
            dropped.len()
        );
        report.tell(line, "dropped", json!({ "pairs": dropped }));
    }
}
