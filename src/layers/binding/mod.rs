//! What reaches a layer although its constructor gets tensors alone.
//!
//! A model's code is candle's: it asks a `VarBuilder` for a tensor, or builds `Linear::new(weight, bias)` itself. Three
//! things have to reach the layer that it builds, and one line at the top of the model's file must do:
//!
//! 1. **The blocks of a quantised weight** ([`placeholder`]). The `VarBuilder` gives a tensor of the weight's shape,
//!    all of whose values are one NaN in memory, and the blocks are bound to its id. The layer that is built around
//!    the tensor looks them up, and so does one that is built around that layer's `weight()`, as a tied head is. A
//!    placeholder is known by its layout, so that one whose blocks are gone is an error and never computes with NaN.
//! 2. **The module that a weight belongs to** ([`target`]). The `VarBuilder` of an adapter gives each weight a
//!    tensor with an id of its own and binds the module to it. A layer of [`nn`](crate::nn) reports its kind to the
//!    module and gets the adapted weight, or `None` and stays a plain layer.
//! 3. **The adapters that are active** ([`active`]). A layer that was built by an adapter or a set of adapters knows
//!    whose it is, and its path. A closure makes adapters active on its threads, and the layers that run in it look up
//!    their updates by path.
//!
//! The first two are values bound to ids ([`registry`]). What is bound lives as long as the `VarBuilder` that gave
//! the tensor, or a layer around it.

pub(crate) mod active;
pub(crate) mod placeholder;
mod registry;
pub(crate) mod target;
mod workers;
