//! A sentence classifier: BERT, a vector for each sentence, and a new head.

use crate::bert::{Adapt, Bert};
use crate::config::Config;
use candle_core::{Module, Result, Tensor};
use candle_nn::VarBuilder;
use lora::train::Pooling;
use lora::LoraConfig;
use loralib as lora;

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
        match real {
            Some(real) => self.pooling.pool(&hidden, real),
            None => self.pooling.pool(&hidden, &ids.ones_like()?),
        }
    }
}
