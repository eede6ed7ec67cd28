//! A base whose matrices stay in half precision, beside the same base converted to F32.

use crate::adapter::{base, ids, randomize, Model};
use crate::common::{bits, difference};
use candle_core::{DType, Device, Tensor};
use loralib::base::half_var_builder;
use loralib::{safetensors_var_builder, Adapter, LoraConfig, Result};
use std::collections::HashMap;
use std::path::Path;

const CPU: Device = Device::Cpu;
const CFG: LoraConfig = LoraConfig { r: 2, lora_alpha: 3., ..LoraConfig::DEFAULT };

fn write(path: &Path, dtype: DType) -> Result<()> {
    let stored = base().into_iter().map(|(name, t)| Ok((name, t.to_dtype(dtype)?)));
    Ok(candle_core::safetensors::save(&stored.collect::<Result<HashMap<_, _>>>()?, path)?)
}

#[test]
fn outputs_and_gradients_are_those_over_converted_weights() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("model.safetensors");
    for dtype in [DType::BF16, DType::F16] {
        write(&path, dtype)?;
        let mut models = vec![];
        for vb in [
            safetensors_var_builder(&path, DType::F32, &CPU)?,
            half_var_builder(&path, DType::F32, &CPU)?,
        ] {
            let adapter =
                Adapter::new(CFG).targets(["embed", "qkv", "down_proj", "up_proj"]).seed(3);
            let model = Model::new(adapter.var_builder(vb))?;
            adapter.check()?;
            models.push((adapter, model));
        }
        let [(whole, one), (half, other)] = &models[..] else { panic!("two models") };
        randomize(whole)?;
        for (name, var) in half.named_vars()? {
            var.set(whole.named_vars()?[&name].as_tensor())?;
        }
        let (y, y2) = (one.forward(&ids())?, other.forward(&ids())?);
        assert!(difference(&y2, &y)? < 1e-6, "{dtype:?}");
        let (grads, grads2) = (y.sqr()?.sum_all()?.backward()?, y2.sqr()?.sum_all()?.backward()?);
        for (name, var) in whole.named_vars()? {
            let (grad, grad2) = (grads.get(&var), grads2.get(&half.named_vars()?[&name]));
            let (Some(grad), Some(grad2)) = (grad, grad2) else { panic!("{name} has no gradient") };
            assert!(difference(grad2, grad)? < 2e-6, "{dtype:?} {name}");
        }
        half.eval()?;
        assert!(difference(&other.forward(&ids())?, &y)? < 1e-5, "{dtype:?} in evaluation");
        // A merged model is converted.
        let served = Model::new(half.merged(half_var_builder(&path, DType::F32, &CPU)?)?)?;
        assert!(difference(&served.forward(&ids())?, &y)? < 1e-5, "{dtype:?} merged");
    }
    Ok(())
}

#[test]
fn only_half_precision_matrices_stay() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("model.safetensors");
    // (stored, wanted, whether a matrix stays)
    for (stored, wanted, stays) in [
        (DType::BF16, DType::F32, true),
        (DType::F16, DType::F64, true),
        (DType::BF16, DType::BF16, false),
        (DType::F32, DType::F32, false),
    ] {
        write(&path, stored)?;
        let vb = half_var_builder(&path, wanted, &CPU)?;
        let converted = safetensors_var_builder(&path, wanted, &CPU)?;
        for (name, dims) in [("head.weight", [3, 8].as_slice()), ("head.bias", &[3])] {
            let (own, other) = (vb.get(dims, name)?, converted.get(dims, name)?);
            assert_eq!((own.dims(), own.dtype()), (dims, wanted));
            if stays && dims.len() == 2 {
                let is_nan = |t: &Tensor| t.ne(t)?.min_all()?.to_scalar::<u8>();
                assert_eq!(is_nan(&own)?, 1, "a placeholder");
            } else {
                assert_eq!(bits(&own)?, bits(&other)?, "{stored:?} as {wanted:?}");
            }
        }
        let error = vb.get((8, 3), "head.weight").expect_err("an error").to_string();
        assert!(error.contains("head.weight") && error.contains("model.safetensors"), "{error}");
        assert!(vb.contains_tensor("head.weight") && !vb.contains_tensor("tail.weight"));
    }
    Ok(())
}
