//! Checkpoint files: their tensors and metadata, read and written whole or one tensor at a time.
//!
//! Nothing here knows of adapters. A reader detects the format from the content, executes nothing in a file, and maps
//! none: truncating a mapped file kills the process. A writer replaces a file atomically.

pub(crate) mod atomic_file;
pub(crate) mod folder;
pub(crate) mod fp8;
mod read;
mod safetensors;
pub(crate) mod safetensors_file;
pub(crate) mod shards;
mod state_dict;
mod torch;
mod wrappers;

pub(crate) use self::safetensors::{header, serialize, Metadata};
pub(crate) use read::{read, read_shards, without_byte_order_mark};
pub(crate) use state_dict::check_finite;
pub use state_dict::StateDict;
pub(crate) use torch::is_torch;
pub use torch::read_torch_entry;
pub(crate) use wrappers::refuse_wrapped_names;
pub use wrappers::strip_wrappers;
