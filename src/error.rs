//! The crate's error.

use std::path::{Path, PathBuf};

/// What can go wrong in [`utils`](crate::utils) and [`peft`](crate::peft). It converts into
/// [`candle_core::Error`], so that `?` works in functions of either result.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An error of candle's.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
    /// The file system refused.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// The file at hand, and what is wrong with it.
    #[error("{}: {error}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        error: Box<Error>,
    },
    /// The file is not in the format it should be in.
    #[error("not a {format} file: {reason}")]
    Format {
        /// The format.
        format: &'static str,
        /// What does not fit.
        reason: String,
    },
    /// A tensor that cannot be used.
    #[error("tensor {name:?}: {reason}")]
    Tensor {
        /// The tensor's name.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The names of a checkpoint and of the model differ.
    #[error(
        "the checkpoint does not fit the model: missing {missing:?}, unexpected {unexpected:?}"
    )]
    Names {
        /// What the model has and the checkpoint lacks.
        missing: Vec<String>,
        /// What the checkpoint has and the model lacks.
        unexpected: Vec<String>,
    },
    /// The checkpoint was trained with another configuration.
    #[error("the checkpoint was saved with {option} = {saved}, the model has {model}")]
    Config {
        /// The option that differs.
        option: &'static str,
        /// Its value in the checkpoint.
        saved: String,
        /// Its value in the model.
        model: String,
    },
    /// A selection of variables that holds none.
    #[error(
        "nothing to train or save: {held} variables are there, and none matches {wanted}; a layer \
         with r = 0 makes none, and `var_builder` only those that it was told to train"
    )]
    Empty {
        /// What was selected.
        wanted: String,
        /// How many variables there are to choose from.
        held: usize,
    },
    /// A word that is none of loralib's three.
    #[error("{0:?} is not a bias selection: expected \"none\", \"all\" or \"lora_only\"")]
    UnknownBias(String),
}

/// The crate's result.
pub type Result<T> = std::result::Result<T, Error>;

impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Candle(error) => error,
            error => Self::wrap(error),
        }
    }
}

impl Error {
    pub(crate) fn tensor(name: impl Into<String>, reason: impl ToString) -> Self {
        Self::Tensor { name: name.into(), reason: reason.to_string() }
    }

    pub(crate) fn at(self, path: &Path) -> Self {
        Self::File { path: path.to_owned(), error: Box::new(self) }
    }
}
