//! One method from the base to a checkpoint: train, save, measure.

use crate::args::Args;
use crate::base::Base;
use crate::data::{batches, Batch, Example};
use crate::evaluate::score;
use crate::report::Row;
use crate::task::{Method, Task};
use crate::train::{train, Plan};
use crate::Result;
use candle_core::Device;
use candle_nn::{loss::cross_entropy, VarMap};
use lora::{LoraConfig, LoraModule};
use loralib as lora;
use std::fs;

pub fn fit(
    args: &Args,
    base: &Base,
    task: &Task,
    (examples, valid): (&[Example], &[Example]),
    device: &Device,
) -> Result<Row> {
    let (vars, what, method) = (VarMap::new(), task.trainable(), task.method);
    let lora = match method {
        Method::Lora => args.lora(),
        Method::Head | Method::Full => LoraConfig::default(),
    };
    let mut model = base.model(task, lora, &vars)?;
    model.train()?;
    let summary = lora::utils::summary(&vars, what.clone())?;
    let head = summary.others.iter().filter(|(name, _)| name.starts_with("classifier."));
    let head: usize = head.map(|(_, dims)| dims.iter().product::<usize>()).sum();
    let factors: usize = summary.adapted.iter().map(|layer| layer.parameters()).sum();
    let summary = summary.with_total(base.parameters() + head + factors);
    if method == Method::Lora {
        println!("{summary}\n");
    }

    let plan = Plan {
        what: method.name(),
        epochs: args.epochs as usize,
        lr: args.lr.unwrap_or(method.lr()),
        seed: args.seed,
    };
    let loss = |batch: &Batch| {
        cross_entropy(&model.forward(&batch.ids, batch.real.as_ref())?, &batch.labels)
    };
    let mut times = train(
        &vars,
        lora::mark_only_lora_as_trainable(&vars, what.clone())?,
        &plan,
        &batches(examples, args.batch as usize, device)?,
        loss,
    )?;
    times.sort();

    let path = method.checkpoint(&args.out);
    lora::save_state_dict(&lora::lora_state_dict(&vars, what)?, lora, &path)?;
    task.save(&args.out)?;
    Ok(Row {
        method: method.name(),
        trainable: summary.trainable(),
        bytes: fs::metadata(&path)?.len(),
        score: score(base, task, lora, &vars, valid, device)?,
        step: times[times.len() / 2],
    })
}
