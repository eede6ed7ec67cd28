//! What training a model of embeddings takes besides the model. Names and defaults are those of sentence-transformers 6.2.

mod contrastive_loss;
mod matryoshka_loss;
mod normalize;
mod pooling;

pub use contrastive_loss::contrastive_loss;
pub use matryoshka_loss::matryoshka_loss;
pub use normalize::normalize;
pub use pooling::Pooling;
