//! The options of what is said: the prompt, and how the reply is drawn.

use super::Sampler;
use crate::number::{not_negative, share};

#[derive(clap::Args)]
pub struct Say {
    /// What to say to the model [default for `train`: what the first example to measure on begins with]
    #[arg(long, value_name = "TEXT")]
    pub prompt: Option<String>,
    /// What the model is told before the conversation
    #[arg(long, value_name = "TEXT", conflicts_with = "raw")]
    pub system: Option<String>,
    /// The prompt is a text to continue, not a message, though the model has a chat template
    #[arg(long)]
    pub raw: bool,
    /// How many tokens the model says at most
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub tokens: usize,
    /// Draws tokens by their probabilities, sharpened below 1 and flattened above; at 0 the likeliest is said
    #[arg(long, value_name = "T", default_value_t = 0., value_parser = not_negative)]
    pub temperature: f64,
    /// Draws only from the likeliest tokens that have this probability together
    #[arg(long, value_name = "P", default_value_t = 0.95, value_parser = share)]
    pub top_p: f64,
}

impl Say {
    pub fn sampler(&self, seed: u64) -> Sampler {
        Sampler::new(self.temperature, self.top_p, seed)
    }
}
