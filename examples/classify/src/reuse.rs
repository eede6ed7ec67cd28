//! A saved checkpoint in a fresh process: the same accuracy, and the label of a sentence.

use crate::args::Args;
use crate::base::Base;
use crate::data::{encode, padded, read};
use crate::evaluate::score;
use crate::task::Task;
use crate::Result;
use candle_core::Device;
use candle_nn::{ops::softmax, VarMap};
use lora::{LoraConfig, LoraModule, Strict};
use loralib as lora;

/// What `--method` left in `--out`, on the base that it was trained on.
struct Saved {
    base: Base,
    task: Task,
    lora: LoraConfig,
    vars: VarMap,
}

impl Saved {
    fn read(args: &Args, device: &Device) -> Result<Self> {
        let task = Task::read(args.method.one()?, &args.out)?;
        let base = Base::read(args.model()?, task.max_length, args.seed, device)?;
        let path = task.method.checkpoint(&args.out);
        let lora = lora::read_state_dict(&path, device)?.config.unwrap_or_default().lora;
        let vars = VarMap::new();
        // Building the model is what makes the variables.
        base.model(&task, lora, &vars)?;
        // Strict: what is missing or left over is an error.
        let _ = lora::load_checkpoint(&path, &vars, lora, Strict::Yes)?;
        Ok(Self { base, task, lora, vars })
    }
}

/// `--evaluate`: how often it is right.
pub fn evaluate(args: &Args, device: &Device) -> Result<()> {
    let Saved { base, task, lora, vars } = Saved::read(args, device)?;
    let examples = encode(&read(args.valid()?)?, &task.labels, &base)?;
    println!("{}", score(&base, &task, lora, &vars, &examples, device)?);
    Ok(())
}

/// `--predict`: each label's probability, the likeliest first.
pub fn predict(args: &Args, sentence: &str, device: &Device) -> Result<()> {
    let Saved { base, task, lora, vars } = Saved::read(args, device)?;
    let mut model = base.model(&task, lora, &vars)?;
    model.eval()?;
    let (ids, real) = padded(&[&base.encode(sentence)?], device)?;
    let probabilities = softmax(&model.forward(&ids, real.as_ref())?, 1)?.squeeze(0)?;
    let mut labels: Vec<_> =
        probabilities.to_vec1::<f32>()?.into_iter().zip(&task.labels).collect();
    labels.sort_by(|a, b| b.0.total_cmp(&a.0));
    for (probability, label) in labels {
        println!("{:>6.2} %  {label}", 100. * probability);
    }
    Ok(())
}
