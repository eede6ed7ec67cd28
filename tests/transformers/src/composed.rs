//! `lora::nn` with candle_nn's composed operations, to compare with: what a differentiable copy of a model
//! uses without `lora::nn`. The layers are the same.

pub use loralib::nn::*;

pub mod ops {
    pub use candle_nn::ops::*;

    pub fn softmax_last_dim(xs: &candle::Tensor) -> candle::Result<candle::Tensor> {
        candle_nn::ops::softmax(xs, candle::D::Minus1)
    }
}

pub mod rotary_emb {
    pub use candle_nn::rotary_emb::{rope_i_slow as rope_i, rope_slow as rope};
}

pub mod with_tracing {
    use candle::{Module, Result, Tensor};
    pub use loralib::nn::with_tracing::{linear_no_bias, Linear};

    #[derive(Debug, Clone)]
    pub struct RmsNorm(candle_nn::RmsNorm);

    impl RmsNorm {
        pub fn new(size: usize, eps: f64, vb: candle_nn::VarBuilder) -> Result<Self> {
            Ok(Self(candle_nn::rms_norm(size, eps, vb)?))
        }
    }

    impl Module for RmsNorm {
        fn forward(&self, x: &Tensor) -> Result<Tensor> {
            self.0.forward_diff(x)
        }
    }
}
