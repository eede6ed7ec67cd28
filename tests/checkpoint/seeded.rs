//! Seeded initialisation of variables.

use crate::common::bits;
use crate::{base, names, randomize, snapshot, Model, CPU};
use candle_core::{DType, Device, Result, Shape, Tensor};
use candle_nn::init::{FanInOut, NonLinearity, NormalOrUniform};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder, VarMap};
use lora::Bias;
use loralib as lora;

fn map() -> VarBuilder<'static> {
    VarBuilder::from_varmap(&VarMap::new(), DType::F32, &CPU)
}

fn start(seed: u64, name: &str, init: Init) -> Result<Tensor> {
    lora::base::seeded(map(), seed).get_with_hints((300, 200), name, init)
}

const UNIFORM: Init = Init::Uniform { lo: -1., up: 3. };

#[test]
fn seed_and_name_determine_the_values() -> Result<()> {
    let vars = VarMap::new();
    let trainable = Bias::None.and("classifier");
    Model::new(lora::base::seeded(lora::var_builder(base(false)?, &vars, trainable.clone()), 7))?;
    let again = VarMap::new();
    Model::new(lora::base::seeded(lora::var_builder(base(false)?, &again, trainable), 7))?;
    assert_eq!(snapshot(&vars), snapshot(&again));

    let all = VarMap::new();
    let vb = lora::base::seeded(VarBuilder::from_varmap(&all, DType::F32, &CPU), 7);
    lora::linear(4, 4, crate::common::CFG, vb.pp("another"))?;
    Model::new(vb)?;
    let (all, vars) = (all.data().lock().unwrap(), vars.data().lock().unwrap());
    for name in ["q.lora_A", "classifier.weight", "classifier.bias"] {
        assert_eq!(bits(&all[name])?, bits(&vars[name])?, "{name}");
    }
    let other = bits(&all["another.lora_A"])?;
    assert_ne!(other, bits(&all["q.lora_A"])?);

    assert_eq!(bits(&start(1, "a", UNIFORM)?)?, bits(&start(1, "a", UNIFORM)?)?);
    assert_ne!(bits(&start(1, "a", UNIFORM)?)?, bits(&start(2, "a", UNIFORM)?)?);
    let below = lora::base::seeded(map().pp("x"), 1).get_with_hints((300, 200), "a", UNIFORM)?;
    assert_eq!(bits(&below)?, bits(&start(1, "x.a", UNIFORM)?)?);
    Ok(())
}

#[test]
fn values_have_the_requested_distribution() -> Result<()> {
    let kaiming = |dist| Init::Kaiming {
        dist,
        fan: FanInOut::FanIn,
        non_linearity: NonLinearity::ExplicitGain(3.),
    };
    let (fan_in, third) = (200f64, 1. / 3f64.sqrt());
    let stdev = 3. / fan_in.sqrt();
    // Mean, standard deviation, and the largest distance from the mean, if it is bounded.
    let cases = [
        (Init::Const(0.5), 0.5, 0., Some(0.)),
        (UNIFORM, 1., 2. * third, Some(2.)),
        (Init::Randn { mean: 4., stdev: 0.5 }, 4., 0.5, None),
        (kaiming(NormalOrUniform::Normal), 0., stdev, None),
        (kaiming(NormalOrUniform::Uniform), 0., stdev, Some(stdev / third)),
    ];
    for (init, mean, stdev, most) in cases {
        let away = (start(5, "a", init)?.to_dtype(DType::F64)? - mean)?.flatten_all()?;
        let off = away.mean_all()?.to_scalar::<f64>()?.abs();
        assert!(off <= 5. * stdev / 60000f64.sqrt(), "{init:?}: the mean differs by {off}");
        let measured = away.sqr()?.mean_all()?.to_scalar::<f64>()?.sqrt();
        assert!((measured - stdev).abs() <= 0.02 * stdev, "{init:?}: {measured}");
        let farthest = away.abs()?.max(0)?.to_scalar::<f64>()?;
        match most {
            Some(most) => {
                assert!(farthest <= most + 1e-6 && farthest >= 0.999 * most, "{init:?}: {farthest}")
            }
            None => assert!(farthest > 3.5 * stdev, "{init:?}: {farthest}"),
        }
    }
    Ok(())
}

#[test]
fn seeded_values_never_change() -> Result<()> {
    let first = |init| start(42, "q.lora_A", init)?.get(0)?.narrow(0, 0, 4)?.to_vec1::<f32>();
    let normal = Init::Randn { mean: 0., stdev: 1. };
    assert_eq!(first(normal)?, [-0.14876336f32, -0.79017204, 0.09825951, 1.4261299]);
    assert_eq!(first(UNIFORM)?, [0.8470391f32, 0.32406044, 1.1622577, 2.1188748]);
    Ok(())
}

#[test]
fn existing_tensors_keep_their_values() -> Result<()> {
    let vars = VarMap::new();
    let vb = |seed| -> Result<_> {
        Ok(lora::base::seeded(
            lora::var_builder(base(true)?, &vars, Bias::All.and("classifier")),
            seed,
        ))
    };
    Model::new(vb(1)?)?;
    for name in ["k.bias", "classifier.weight"] {
        let own = base(true)?.get(vars.data().lock().unwrap()[name].dims(), name)?;
        assert_eq!(bits(&vars.data().lock().unwrap()[name])?, bits(&own)?, "{name}");
    }
    let lora_a = || bits(&vars.data().lock().unwrap()["q.lora_A"]);
    let first = lora_a()?;
    randomize(&vars, 3)?;
    let trained = snapshot(&vars);
    Model::new(vb(2)?)?;
    assert_eq!(snapshot(&vars), trained);
    vars.data().lock().unwrap().remove("q.lora_A");
    Model::new(vb(2)?)?;
    assert_ne!(lora_a()?, first);

    let own = vb(1)?;
    assert!(own.contains_tensor("q.lora_A") && own.contains_tensor("q.weight"));
    assert!(!own.contains_tensor("q.lora_C"));
    assert_eq!(bits(&own.get_unchecked("q.lora_A")?)?, lora_a()?);
    let before = names(&vars);
    let error = vb(1)?.get(4, "nowhere").unwrap_err().to_string();
    assert!(error.contains("\"nowhere\""), "{error}");
    assert_eq!(names(&vars), before);
    Ok(())
}

#[test]
fn half_precision_values_are_rounded() -> Result<()> {
    let vb = VarBuilder::from_varmap(&VarMap::new(), DType::BF16, &CPU);
    let half = lora::base::seeded(vb, 1).get_with_hints((300, 200), "a", UNIFORM)?;
    assert_eq!(half.dtype(), DType::BF16);
    let apart = (half.to_dtype(DType::F32)? - start(1, "a", UNIFORM)?)?.abs()?;
    let apart = apart.flatten_all()?.max(0)?.to_scalar::<f32>()?;
    assert!(apart > 0. && apart <= 3. / 256., "{apart}");
    Ok(())
}

/// A backend that creates plain tensors instead of variables.
struct Plain;

impl SimpleBackend for Plain {
    fn get(&self, s: Shape, _: &str, init: Init, dtype: DType, dev: &Device) -> Result<Tensor> {
        Ok(init.var(s, dtype, dev)?.as_detached_tensor())
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> Result<Tensor> {
        candle_core::bail!("no {name}")
    }

    fn contains_tensor(&self, _: &str) -> bool {
        false
    }
}

#[test]
fn backends_without_variables_get_the_same_values() -> Result<()> {
    let plain = VarBuilder::from_backend(Box::new(Plain), DType::F32, CPU);
    let plain = lora::base::seeded(plain, 1).get_with_hints((300, 200), "a", UNIFORM)?;
    assert_eq!(bits(&plain)?, bits(&start(1, "a", UNIFORM)?)?);
    // candle has no random integers.
    assert!(lora::base::seeded(map(), 1)
        .get_with_hints_dtype(4, "a", UNIFORM, DType::U32)
        .is_err());
    Ok(())
}
