//! What comes behind an encoder: a vector for each sentence, or a score for each label.

use super::config::{Config, Family};
use super::layers::Encoder;
use crate::model::Segment;
use candle_core::{bail, Module, Result, Tensor};
use candle_nn::{linear, Linear, VarBuilder};
use lora::train::Pooling;
use lora::utils::Trainable;
use lora::Bias;
use loralib as lora;
use loralib::nn as candle_nn;

pub enum Task {
    /// Vectors that are near for sentences of a pair.
    Embed(Pooling),
    /// One of these labels, with the head that transformers' model for it has.
    Classify(Vec<String>),
}

impl Task {
    /// PEFT's name.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Embed(_) => "FEATURE_EXTRACTION",
            Self::Classify(_) => "SEQ_CLS",
        }
    }

    /// What is trained as a whole: the head, and what it needs and the model does not have.
    pub fn trainable(&self, cfg: &Config, has_pooler: bool) -> Trainable {
        match (self, cfg.family) {
            (Self::Embed(_), _) => Bias::None.into(),
            (Self::Classify(_), Family::DistilBert) => {
                Bias::None.and("pre_classifier").and(CLASSIFIER)
            }
            (Self::Classify(_), Family::Bert) if !has_pooler => {
                Bias::None.and("pooler").and(CLASSIFIER)
            }
            (Self::Classify(_), _) => Bias::None.and(CLASSIFIER),
        }
    }
}

/// The module of the scores.
pub const CLASSIFIER: &str = "classifier";

/// An encoder for a task.
pub struct Model {
    encoder: Encoder,
    head: Head,
}

enum Head {
    Embed(Pooling),
    Classify(Box<Classifier>),
}

/// Scores of the first token's hidden state.
struct Classifier {
    dense: Linear,
    activation: fn(&Tensor) -> Result<Tensor>,
    scores: Linear,
}

impl Model {
    pub fn new(cfg: &Config, task: &Task, vb: VarBuilder) -> Result<Self> {
        let labels = match task {
            // transformers' model without a head has no prefix.
            Task::Embed(pooling) => {
                let head = Head::Embed(*pooling);
                return Ok(Self { encoder: Encoder::new(cfg, vb)?, head });
            }
            Task::Classify(labels) if labels.len() < 2 => bail!("one label, expected two or more"),
            Task::Classify(labels) => labels.len(),
        };
        let (n, prefix, head) = (cfg.hidden_size, cfg.family.prefix(), vb.pp(CLASSIFIER));
        let (dense, scores, activation) = match cfg.family {
            Family::Bert => (vb.pp(prefix).pp("pooler.dense"), head, Tensor::tanh as _),
            Family::Roberta => (head.pp("dense"), head.pp("out_proj"), Tensor::tanh as _),
            Family::DistilBert => (vb.pp("pre_classifier"), head, Tensor::relu as _),
        };
        let (dense, scores) = (linear(n, n, dense)?, linear(n, labels, scores)?);
        let head = Head::Classify(Box::new(Classifier { dense, activation, scores }));
        Ok(Self { encoder: Encoder::new(cfg, vb.pp(prefix))?, head })
    }

    /// Vectors (texts, hidden_size) or scores (texts, labels) of ids (1, tokens) that are texts of these lengths.
    pub fn forward(
        &self,
        ids: &Tensor,
        lens: &[usize],
        run: impl Fn(&str, &Tensor, Segment) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let hidden = self.encoder.packed(ids, lens, run)?;
        match &self.head {
            Head::Embed(pooling) => pooling.pool_packed(&hidden, lens),
            Head::Classify(head) => {
                let first = Pooling::Cls.pool_packed(&hidden, lens)?;
                head.scores.forward(&(head.activation)(&head.dense.forward(&first)?)?)
            }
        }
    }
}
