//! loralib's `bias` argument.

use crate::{Error, Result};
use std::str::FromStr;

/// Which biases are trained and saved beside the adapters; loralib's `bias` argument.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Bias {
    /// No bias (`"none"`).
    #[default]
    None,
    /// Every bias of the model (`"all"`).
    All,
    /// The biases of the adapted layers (`"lora_only"`).
    LoraOnly,
}

impl FromStr for Bias {
    type Err = Error;

    fn from_str(word: &str) -> Result<Self> {
        match word {
            "none" => Ok(Self::None),
            "all" => Ok(Self::All),
            "lora_only" => Ok(Self::LoraOnly),
            _ => Err(Error::UnknownBias(word.to_owned())),
        }
    }
}

impl std::fmt::Display for Bias {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::All => "all",
            Self::LoraOnly => "lora_only",
        })
    }
}
