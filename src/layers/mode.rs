//! Switching a model between training and evaluation.

use candle_core::Result;

/// Whether a model trains or evaluates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// The update beside the weight, with dropout.
    Train,
    /// The update merged into a copy of the weight (unless `merge_weights` is off), no dropout and
    /// no graph.
    Eval,
}

/// A layer, or a model of such layers, that can train and evaluate. For a struct of layers,
/// [`lora_module!`](crate::lora_module) writes the implementation.
#[diagnostic::on_unimplemented(
    note = "a field without a mode belongs behind the semicolon of `lora_module!`"
)]
pub trait LoraModule {
    /// Enters a mode. Entering [`Mode::Eval`] again merges afresh: this is how newly loaded
    /// adapters take effect. In evaluation nothing gets a gradient: enter [`Mode::Train`] to train.
    ///
    /// # Errors
    /// When a merged weight would not be finite. That layer stays as it was; layers of a model that
    /// come before it have changed, and `train()` puts all of them in one mode again.
    fn set_mode(&mut self, mode: Mode) -> Result<()>;

    /// Enters [`Mode::Train`], the mode in which layers are made.
    fn train(&mut self) -> Result<()> {
        self.set_mode(Mode::Train)
    }

    /// Enters [`Mode::Eval`].
    fn eval(&mut self) -> Result<()> {
        self.set_mode(Mode::Eval)
    }
}

impl<T: LoraModule> LoraModule for [T] {
    fn set_mode(&mut self, mode: Mode) -> Result<()> {
        self.iter_mut().try_for_each(|module| module.set_mode(mode))
    }
}

impl<T: LoraModule> LoraModule for Vec<T> {
    fn set_mode(&mut self, mode: Mode) -> Result<()> {
        self.as_mut_slice().set_mode(mode)
    }
}

impl<T: LoraModule> LoraModule for Option<T> {
    fn set_mode(&mut self, mode: Mode) -> Result<()> {
        self.iter_mut().try_for_each(|module| module.set_mode(mode))
    }
}

impl<T: LoraModule + ?Sized> LoraModule for Box<T> {
    fn set_mode(&mut self, mode: Mode) -> Result<()> {
        self.as_mut().set_mode(mode)
    }
}

/// Compiles for a `T` that is no [`LoraModule`] alone: for one that is, `M` could be either.
#[doc(hidden)]
pub fn without_mode<T: WithoutMode<M> + ?Sized, M>(_: &T) {}

/// Holds of every type in one way, and of a [`LoraModule`] in two.
#[doc(hidden)]
pub trait WithoutMode<M> {}
impl<T: ?Sized> WithoutMode<()> for T {}
impl<T: LoraModule + ?Sized> WithoutMode<Mode> for T {}

/// Implements [`LoraModule`](crate::LoraModule) for a struct: first the fields that have a mode,
/// then, behind a semicolon, all others.
///
/// ```
/// use loralib as lora;
/// struct Attention { qkv: lora::MergedLinear, proj: lora::Linear, norm: candle_nn::LayerNorm }
/// lora::lora_module!(Attention { qkv, proj; norm });
/// ```
///
/// A generic struct implements the trait by hand: `set_mode` calls `set_mode` of each such field.
///
/// A field that is named on neither side does not compile, so none is forgotten:
///
/// ```compile_fail,E0063
/// use loralib as lora;
/// struct Attention { qkv: lora::MergedLinear, proj: lora::Linear, norm: candle_nn::LayerNorm }
/// lora::lora_module!(Attention { qkv; norm });
/// ```
///
/// Nor does one with a mode behind the semicolon, where no mode would reach it:
///
/// ```compile_fail,E0283
/// use loralib as lora;
/// struct Attention { qkv: lora::MergedLinear, proj: lora::Linear, norm: candle_nn::LayerNorm }
/// lora::lora_module!(Attention { qkv; proj, norm });
/// ```
#[macro_export]
macro_rules! lora_module {
    ($name:ident { $($field:ident),* $(,)? $(; $($other:ident),* $(,)?)? }) => {
        impl $crate::LoraModule for $name {
            fn set_mode(&mut self, mode: $crate::Mode) -> $crate::candle_core::Result<()> {
                // Never called: it compiles only where every field is named, and else says which is
                // missing.
                #[allow(unreachable_code, clippy::diverging_sub_expression)]
                let _every_field = || -> Self {
                    Self { $($field: unreachable!(),)* $($($other: unreachable!(),)*)? }
                };
                let _without_mode = |_this: &Self| {
                    $($($crate::layers::without_mode(&_this.$other);)*)?
                };
                $($crate::LoraModule::set_mode(&mut self.$field, mode)?;)*
                let _ = mode;
                Ok(())
            }
        }
    };
}
