//! Switches a model between training and evaluation.

use candle_core::Result;

/// The mode of a layer or a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// The update is computed beside the base weight, with dropout.
    Train,
    /// The update is merged into a copy of the weight (unless `merge_weights` is off). No dropout, no
    /// graph.
    Eval,
}

/// A layer, or a model of such layers, that can train and evaluate. For a struct of layers,
/// [`lora_module!`](crate::lora_module) writes the implementation.
#[diagnostic::on_unimplemented(
    note = "a field without a mode belongs after the semicolon of `lora_module!`"
)]
pub trait LoraModule {
    /// Sets the mode. Setting [`Mode::Eval`] again merges again: this is how newly loaded adapters take
    /// effect. In evaluation nothing gets a gradient.
    ///
    /// # Errors
    /// If a merged weight is not finite. That layer keeps its mode; layers of a model that come before it
    /// have changed theirs, and `train()` sets all of them to one mode again.
    fn set_mode(&mut self, mode: Mode) -> Result<()>;

    /// Sets [`Mode::Train`], the mode of a new layer.
    fn train(&mut self) -> Result<()> {
        self.set_mode(Mode::Train)
    }

    /// Sets [`Mode::Eval`].
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

macro_rules! tuples {
    ($(($($name:ident)*))*) => {$(
        impl<$($name: LoraModule),*> LoraModule for ($($name,)*) {
            fn set_mode(&mut self, mode: Mode) -> Result<()> {
                #[allow(non_snake_case)] // the type parameters name the elements too
                let ($($name,)*) = self;
                $($name.set_mode(mode)?;)*
                Ok(())
            }
        }
    )*};
}
tuples! { (A) (A B) (A B C) (A B C D) (A B C D E) (A B C D E F) }

/// Compiles only for a `T` that is not a [`LoraModule`]: for one that is, `M` is ambiguous.
#[doc(hidden)]
pub fn without_mode<T: WithoutMode<M> + ?Sized, M>(_: &T) {}

/// Implemented once for every type, and twice for a [`LoraModule`].
#[doc(hidden)]
pub trait WithoutMode<M> {}
impl<T: ?Sized> WithoutMode<()> for T {}
impl<T: LoraModule + ?Sized> WithoutMode<Mode> for T {}

/// Implements [`LoraModule`](crate::LoraModule) for a struct: the fields that have a mode, then, after a
/// semicolon, all others.
///
/// ```
/// use loralib as lora;
/// struct Attention { qkv: lora::MergedLinear, proj: lora::Linear, norm: candle_nn::LayerNorm }
/// lora::lora_module!(Attention { qkv, proj; norm });
/// ```
///
/// For a generic struct, implement the trait by hand: `set_mode` calls `set_mode` of each such field.
///
/// A field that is not listed is a compile error:
///
/// ```compile_fail,E0063
/// use loralib as lora;
/// struct Attention { qkv: lora::MergedLinear, proj: lora::Linear, norm: candle_nn::LayerNorm }
/// lora::lora_module!(Attention { qkv; norm });
/// ```
///
/// So is a field with a mode after the semicolon:
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
                // Never called. It compiles only if every field is listed; the error names the missing one.
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
