//! [`candle_nn::conv`], adapted by name.

use crate::layers::binding::target::target_of;
use crate::layers::{self, ConvConfig, Placement, Weight};
use candle_core::{Module, Result, Tensor};
use candle_nn::{BatchNorm, VarBuilder};
use std::ops::Deref;

pub use candle_nn::conv::*;

fn weight<C: ConvConfig>(weight: Tensor, bias: Option<Tensor>, config: C) -> Weight {
    let adapted = target_of(&weight)
        .and_then(|module| module.adapt(&weight, bias.as_ref(), config.layer_kind()));
    adapted.unwrap_or_else(|| Weight::plain(weight, bias, Placement::Reshaped))
}

macro_rules! conv {
    ($($name:ident, $config:ident, $with_bias:ident, $without:ident;)*) => {$(
        #[doc = concat!("[`candle_nn::", stringify!($name), "`], adapted by name.")]
        ///
        /// It has an adapter if its kernel is a target of an [`Adapter`](crate::Adapter), and dereferences to
        /// the layer of [`layers`].
        #[derive(Debug, Clone)]
        pub struct $name {
            layer: layers::$name,
            config: $config,
        }

        impl $name {
            /// A layer with a kernel and a bias. An adaptation that fails is reported by
            /// [`Adapter::check`](crate::Adapter::check).
            pub fn new(kernel: Tensor, bias: Option<Tensor>, config: $config) -> Self {
                let layer = layers::$name::from_parts(config, weight(kernel, bias, config));
                Self { layer, config }
            }

            /// The options.
            pub fn config(&self) -> &$config {
                &self.config
            }

            /// The base kernel.
            pub fn weight(&self) -> &Tensor {
                self.layer.weight()
            }

            /// The bias.
            pub fn bias(&self) -> Option<&Tensor> {
                self.layer.bias()
            }
        }

        impl Deref for $name {
            type Target = layers::$name;

            fn deref(&self) -> &Self::Target {
                &self.layer
            }
        }

        impl Module for $name {
            fn forward(&self, x: &Tensor) -> Result<Tensor> {
                self.layer.forward(x)
            }
        }

        #[doc = concat!("[`candle_nn::", stringify!($with_bias), "`].")]
        ///
        /// # Errors
        /// If `vb` lacks a tensor or has it in another shape.
        pub fn $with_bias(
            in_channels: usize,
            out_channels: usize,
            kernel_size: usize,
            cfg: $config,
            vb: VarBuilder,
        ) -> Result<$name> {
            // The module is bound to the kernel as long as the last `VarBuilder` lives.
            let base = candle_nn::$with_bias(in_channels, out_channels, kernel_size, cfg, vb.clone())?;
            Ok($name::new(base.weight().clone(), base.bias().cloned(), cfg))
        }

        #[doc = concat!("[`candle_nn::", stringify!($without), "`].")]
        ///
        /// # Errors
        /// If `vb` lacks the kernel or has it in another shape.
        pub fn $without(
            in_channels: usize,
            out_channels: usize,
            kernel_size: usize,
            cfg: $config,
            vb: VarBuilder,
        ) -> Result<$name> {
            let base = candle_nn::$without(in_channels, out_channels, kernel_size, cfg, vb.clone())?;
            Ok($name::new(base.weight().clone(), None, cfg))
        }
    )*};
}
conv! {
    Conv1d, Conv1dConfig, conv1d, conv1d_no_bias;
    Conv2d, Conv2dConfig, conv2d, conv2d_no_bias;
}

impl Conv2d {
    /// The layer with a batch norm merged into its base kernel and bias.
    ///
    /// # Errors
    /// As [`candle_nn::Conv2d::absorb_bn`].
    pub fn absorb_bn(&self, bn: &BatchNorm) -> Result<Self> {
        let base = candle_nn::Conv2d::new(self.weight().clone(), self.bias().cloned(), self.config);
        let absorbed = base.absorb_bn(bn)?;
        Ok(Self::new(absorbed.weight().clone(), absorbed.bias().cloned(), self.config))
    }
}
