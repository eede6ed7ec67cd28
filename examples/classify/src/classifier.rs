//! A sentence classifier: BERT, a vector for each sentence, and a new head.

use crate::bert::{Adapt, Bert};
use crate::config::Config;
use candle_core::{Module, Result, Tensor};
use candle_nn::VarBuilder;
use lora::LoraConfig;
use loralib as lora;
use std::fmt;
use std::str::FromStr;

/// How a sentence's tokens become one vector: `mean` or `cls`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pooling {
    Mean,
    /// The first token, [CLS] or <s>.
    Cls,
}

impl fmt::Display for Pooling {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Self::Mean => "mean",
            Self::Cls => "cls",
        })
    }
}

impl FromStr for Pooling {
    type Err = String;

    fn from_str(name: &str) -> std::result::Result<Self, String> {
        match name {
            "mean" => Ok(Self::Mean),
            "cls" => Ok(Self::Cls),
            _ => Err(format!("{name:?} is neither mean nor cls")),
        }
    }
}

pub struct Classifier {
    bert: Bert,
    classifier: lora::Linear,
    pooling: Pooling,
}

lora::lora_module!(Classifier { bert, classifier; pooling });

impl Classifier {
    pub fn new(
        cfg: &Config,
        adapt: &Adapt,
        labels: usize,
        pooling: Pooling,
        vb: VarBuilder,
    ) -> Result<Self> {
        let (n, plain) = (cfg.hidden_size, LoraConfig::default());
        Ok(Self {
            bert: Bert::new(cfg, adapt, vb.clone())?,
            classifier: lora::linear(n, labels, plain, vb.pp("classifier"))?,
            pooling,
        })
    }

    /// Logits (batch, labels); arguments as of [`Bert::forward`].
    pub fn forward(&self, ids: &Tensor, real: Option<&Tensor>) -> Result<Tensor> {
        self.classifier.forward(&self.pooled(ids, real)?)
    }

    /// The sentences' vectors (batch, hidden_size).
    pub fn pooled(&self, ids: &Tensor, real: Option<&Tensor>) -> Result<Tensor> {
        let hidden = self.bert.forward(ids, real)?;
        match (self.pooling, real) {
            (Pooling::Cls, _) => hidden.narrow(1, 0, 1)?.squeeze(1),
            (Pooling::Mean, None) => hidden.mean(1),
            (Pooling::Mean, Some(real)) => {
                let weights = real.broadcast_div(&real.sum_keepdim(1)?)?.unsqueeze(1)?;
                weights.matmul(&hidden)?.squeeze(1)
            }
        }
    }
}
