//! The crate's error.

use std::path::{Path, PathBuf};

/// An error of [`utils`](crate::utils), [`merge`](crate::merge), [`formats`](crate::formats) and [`gguf`](crate::gguf). It converts into [`candle_core::Error`], so that `?` works
/// in functions of either result.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An error of candle's.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
    /// An error of the file system.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// An error about a file or folder.
    #[error("{}: {error}", path.display())]
    File {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong with it.
        error: Box<Error>,
    },
    /// A file is malformed.
    #[error("not a {format} file: {reason}")]
    Format {
        /// The expected format.
        format: &'static str,
        /// What is malformed.
        reason: String,
    },
    /// A file or option is valid, but this crate does not support it.
    #[error("{what} is not supported: {reason}")]
    Unsupported {
        /// What is not supported.
        what: String,
        /// Why, and what to do instead.
        reason: String,
    },
    /// An argument is invalid.
    #[error("{0}")]
    Invalid(String),
    /// A tensor cannot be used.
    #[error("tensor {name:?}: {reason}")]
    Tensor {
        /// The tensor's name.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The names in a checkpoint and in the model differ.
    #[error(
        "the checkpoint does not fit the model: missing {}, unexpected {}",
        first(missing),
        first(unexpected)
    )]
    Names {
        /// Names that only the model has.
        missing: Vec<String>,
        /// Names that only the checkpoint has.
        unexpected: Vec<String>,
    },
    /// A checkpoint was saved with another configuration.
    #[error(
        "the checkpoint was saved with {option} = {saved}, the model has {model}{}",
        layer.as_ref().map(|layer| format!(" (layer {layer:?})")).unwrap_or_default()
    )]
    Config {
        /// The layer, or `None` for an option of the whole adapter.
        layer: Option<String>,
        /// The option that differs.
        option: &'static str,
        /// Its value in the checkpoint.
        saved: String,
        /// Its value in the model.
        model: String,
    },
    /// A parameter selection selects nothing.
    #[error(
        "nothing to train or save: none of {held} variables matches {wanted}; a layer with r = 0 \
         has no adapter, and `var_builder` creates only the variables of its selection"
    )]
    Empty {
        /// What was selected.
        wanted: String,
        /// The number of variables to select from.
        held: usize,
    },
    /// A word is not one of loralib's bias selections.
    #[error("{0:?} is not a bias selection: expected \"none\", \"all\" or \"lora_only\"")]
    UnknownBias(String),
}

/// The names that a message has of a list.
const NAMED: usize = 6;

fn first(names: &[String]) -> String {
    match names.len().saturating_sub(NAMED) {
        0 => format!("{names:?}"),
        more => format!("{:?} and {more} more", &names[..NAMED]),
    }
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

    pub(crate) fn unsupported(what: impl Into<String>, reason: impl ToString) -> Self {
        Self::Unsupported { what: what.into(), reason: reason.to_string() }
    }

    pub(crate) fn at(self, path: &Path) -> Self {
        Self::File { path: path.to_owned(), error: Box::new(self) }
    }
}
