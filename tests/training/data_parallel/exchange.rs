//! What one exchange gives, and what it tells.

use super::{apart, ranks, Model};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use loralib::train::{add_grads, clip_grad_norm, FlatGrads, Process};
use loralib::{Error, Result};
use std::collections::BTreeMap;

#[test]
fn a_gradient_that_is_not_finite_is_told_on_all_ranks() -> Result<()> {
    let told = |values: [f64; 3]| -> Result<String> {
        let errors = ranks(3, |rank, threads| -> Result<String> {
            let model = Model::new(0.)?;
            let flat = FlatGrads::new(model.adapter.named_vars()?, rank)?;
            let loss = (model.loss(&[0, 1])? * values[rank.index()])?;
            let mut grads = loss.backward()?;
            let before = grads.get(&model.adapter.vars()?[1]).unwrap().id();
            let sum = |part: &Tensor| threads.sum(rank, part);
            let error = flat.all_reduce(&mut grads, &loss, 2., sum).unwrap_err();
            assert_eq!(grads.get(&model.adapter.vars()?[1]).unwrap().id(), before);
            Ok(error.to_string())
        });
        let errors = errors.into_iter().collect::<Result<Vec<_>>>()?;
        assert!(errors.iter().all(|error| *error == errors[0]), "{errors:?}");
        Ok(errors[0].clone())
    };
    let error = told([1., f64::NAN, 1.])?;
    assert!(error.contains("gradients of \"down.lora_A\" and 3 more"), "{error}");
    assert!(error.ends_with("not finite: rank 1 gave such values"), "{error}");
    assert!(told([f64::INFINITY; 3])?.ends_with("rank 0 and 2 more gave such values"));
    Ok(())
}

#[test]
fn a_rank_that_fails_is_told_on_all_ranks() -> Result<()> {
    let x = Var::new(&[1f32, 2.], &Device::Cpu)?;
    let (scalar, vector) =
        (Tensor::new(1f32, &Device::Cpu)?, Tensor::new(&[1f32, 2.], &Device::Cpu)?);
    let ways = [
        (None, 1., "its forward"),
        (Some(&scalar), -1., "weight is -1"),
        (Some(&vector), 1., "loss is [2]: expected a scalar"),
    ];
    for (loss, weight, reason) in ways {
        let errors = ranks(3, |rank, threads| -> Result<String> {
            let flat = FlatGrads::new([("x".to_owned(), x.clone())].into(), rank)?;
            let (mut grads, sum) =
                (x.sqr()?.sum_all()?.backward()?, |part: &Tensor| threads.sum(rank, part));
            let result = match (rank.index(), loss) {
                (1, None) => flat.fail(sum).and(Err(Error::Invalid("its forward".to_owned()))),
                (1, Some(loss)) => flat.all_reduce(&mut grads, loss, weight, sum),
                _ => flat.all_reduce(&mut grads, &scalar, 1., sum),
            };
            Ok(result.unwrap_err().to_string())
        });
        for (i, error) in errors.into_iter().enumerate() {
            let (error, expected) = (error?, if i == 1 { reason } else { "rank 1 failed before" });
            assert!(error.contains(expected), "{error}");
        }
    }
    Ok(())
}

/// Experts, of which the samples of a rank reach some.
#[test]
fn a_gradient_that_some_ranks_lack_counts_as_zero_there() -> Result<()> {
    let vars = ["both", "first", "none"]
        .map(|name| Var::new(&[3f32], &Device::Cpu).map(|var| (name.to_owned(), var)));
    let vars: BTreeMap<_, _> = vars.into_iter().collect::<candle_core::Result<_>>()?;
    let grads = ranks(3, |rank, threads| -> Result<_> {
        let flat = FlatGrads::new(vars.clone(), rank)?;
        // The last rank's weight is 0.
        let (name, weight) = [("first", 1.), ("both", 1.), ("none", 0.)][rank.index()];
        let loss = match name {
            "both" => vars[name].sqr()?,
            _ => (vars["both"].sqr()? + vars[name].sqr()?)?,
        };
        let loss = loss.sum_all()?;
        let mut grads = loss.backward()?;
        flat.all_reduce(&mut grads, &loss, weight, |part| threads.sum(rank, part))?;
        let value = |name: &str| grads.get(&vars[name]).map(|grad| grad.to_vec1::<f32>().unwrap());
        Ok(["both", "first", "none"].map(value))
    });
    for grads in grads {
        assert_eq!(grads?, [Some(vec![6.]), Some(vec![3.]), None]);
    }
    Ok(())
}

#[test]
fn what_cannot_be_averaged_is_refused() -> Result<()> {
    type Sum = fn(&Tensor) -> candle_core::Result<Tensor>;
    let x = Var::new(&[1f32, 2.], &Device::Cpu)?;
    let named = |vars: &[(&str, &Var)]| {
        let vars = vars.iter().map(|(name, var)| (name.to_string(), (*var).clone())).collect();
        FlatGrads::new(vars, Process::new(0, 1)?)
    };
    let flat = named(&[("x", &x)])?;
    assert_eq!(flat.bytes(), 4 * (2 + 1) + 8);
    let refused = |weight: f64, sum: Sum, reason: &str| -> Result<()> {
        let loss = x.sqr()?.sum_all()?;
        let result = flat.all_reduce(&mut loss.backward()?, &loss, weight, sum);
        let error = result.unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
        Ok(())
    };
    refused(0., |part| Ok(part.clone()), "weight of all ranks is 0")?;
    refused(1., |part| (part * 1e38)? * 1e38, "and their sum overflows")?;
    refused(1., |part| part.narrow(0, 0, 1), "[1] of F32, expected [5] of F32")?;
    assert!(named(&[]).is_err());
    assert!(named(&[("ids", &Var::new(&[1u32], &Device::Cpu)?)]).is_err());
    Ok(())
}

/// Rank 0 has three samples in two batches, rank 1 has two in one.
#[test]
fn accumulated_gradients_are_those_of_the_whole_batch() -> Result<()> {
    let model = Model::new(0.)?;
    let vars = model.adapter.vars()?;
    let values = |vars: &[Var], grads: &GradStore| -> Result<Vec<f32>> {
        let grads = vars.iter().map(|var| Ok(grads.get(var).unwrap().flatten_all()?.to_vec1()?));
        Ok(grads.collect::<Result<Vec<_>>>()?.concat())
    };
    let loss = model.loss(&[0, 1, 2, 3, 4])?;
    let mut whole = loss.backward()?;
    let norm = clip_grad_norm(&vars, &mut whole, 1e-2)?;
    let (whole, expected) = (values(&vars, &whole)?, f64::from(loss.to_scalar::<f32>()?));
    let batches: [&[&[usize]]; 2] = [&[&[0, 1], &[2]], &[&[3, 4]]];
    let results = ranks(2, |rank, threads| -> Result<()> {
        let model = Model::new(0.)?;
        let vars = model.adapter.vars()?;
        let flat = FlatGrads::new(model.adapter.named_vars()?, rank)?;
        let batches = batches[rank.index()];
        let weight = batches.concat().len() as f64;
        let mut sum: Option<(Tensor, GradStore)> = None;
        for batch in batches {
            let loss = (model.loss(batch)? * (batch.len() as f64 / weight))?;
            let grads = loss.backward()?;
            sum = Some(match sum {
                None => (loss.detach(), grads),
                Some((losses, mut all)) => {
                    add_grads(&vars, &mut all, grads)?;
                    ((losses + loss.detach())?, all)
                }
            });
        }
        let (loss, mut grads) = sum.unwrap();
        let mean = flat.all_reduce(&mut grads, &loss, weight, |part| threads.sum(rank, part))?;
        assert!((mean / expected - 1.).abs() < 1e-6, "{mean}, expected {expected}");
        let clipped = clip_grad_norm(&vars, &mut grads, 1e-2)?;
        assert!((clipped / norm - 1.).abs() < 1e-6, "{clipped}, expected {norm}");
        let apart = apart(&values(&vars, &grads)?, &whole);
        assert!(apart < 1e-6, "{apart:e}");
        Ok(())
    });
    results.into_iter().collect()
}

#[test]
fn gradients_keep_their_dtype() -> Result<()> {
    for dtype in [DType::BF16, DType::F16, DType::F64] {
        let x = Var::from_tensor(&Tensor::new(&[3f32, 4.], &Device::Cpu)?.to_dtype(dtype)?)?;
        let grads = ranks(2, |rank, threads| -> Result<_> {
            let flat = FlatGrads::new([("x".to_owned(), x.clone())].into(), rank)?;
            let loss = (x.sqr()?.sum_all()? * (rank.index() + 1) as f64)?;
            let mut grads = loss.backward()?;
            let mean = flat.all_reduce(&mut grads, &loss, [3., 1.][rank.index()], |part| {
                threads.sum(rank, part)
            })?;
            assert_eq!(mean, 31.25);
            Ok(grads.get(&x).unwrap().clone())
        });
        for grad in grads.into_iter().collect::<Result<Vec<_>>>()? {
            assert_eq!(grad.dtype(), dtype);
            assert_eq!(grad.to_dtype(DType::F32)?.to_vec1::<f32>()?, [7.5, 10.]);
        }
    }
    Ok(())
}
