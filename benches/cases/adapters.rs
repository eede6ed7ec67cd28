//! Several adapters over one base of 12 layers: the choice of one, and a batch whose rows have each their own.

use super::{case, config, device, rand, Case, Run};
use candle_core::{DType, Module, Result, Tensor};
use candle_nn::{VarBuilder, VarMap};
use loralib::nn::{linear_no_bias, Linear};
use loralib::{Adapter, Adapters};

const LAYERS: usize = 12;
const ROWS: usize = 8;

/// Pairs of linear layers.
#[derive(Clone)]
struct Model(Vec<(Linear, Linear)>);

impl Model {
    fn new(dim: usize, vb: VarBuilder) -> Result<Self> {
        let layer = |i: usize| {
            let vb = vb.pp(i);
            let up = linear_no_bias(dim, 4 * dim, vb.pp("up"))?;
            Ok((up, linear_no_bias(4 * dim, dim, vb.pp("down"))?))
        };
        Ok(Self((0..LAYERS).map(layer).collect::<Result<_>>()?))
    }
}

impl Module for Model {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let layer = |x: Tensor, (up, down): &(Linear, Linear)| {
            &x + down.forward(&up.forward(&x)?.relu()?)?
        };
        self.0.iter().try_fold(x.clone(), layer)
    }
}

pub fn adapters() -> Result<Vec<Case>> {
    let (dim, r) = (768, 8);
    let vars = VarMap::new();
    let adapters = Adapters::new();
    let base = VarBuilder::from_varmap(&vars, DType::F32, device());
    Model::new(dim, base.clone())?;
    let model = Model::new(dim, adapters.var_builder(base))?;
    let names: Vec<_> = (0..ROWS).map(|i| i.to_string()).collect();
    for name in &names {
        let adapter = Adapter::new(config(r)).targets("all-linear");
        adapters.add(name, &adapter)?;
        for var in adapter.vars()? {
            var.set(&rand(var.dims(), DType::F32)?)?;
        }
        adapter.eval()?;
    }
    let run = |rows: Option<usize>, x: &Tensor| -> Run {
        let (adapters, model, names, x) =
            (adapters.clone(), model.clone(), names.clone(), x.clone());
        Box::new(move || {
            let forward = || model.forward(&x);
            let y = match rows {
                None => adapters.with(&names[0], forward)?,
                Some(n) => {
                    let rows: Vec<_> = (0..ROWS).map(|i| Some(names[i % n].as_str())).collect();
                    adapters.with_rows(&rows, forward)?
                }
            };
            std::hint::black_box(y);
            device().synchronize()
        })
    };
    let mut cases = vec![];
    for tokens in [1, 16, 64] {
        let x = rand(&[ROWS, tokens, dim], DType::F32)?;
        for n in [8, 2] {
            let group = format!("Adapters {ROWS}x{tokens} tokens, {n} adapters");
            cases.push(case(group, run(Some(n), &x), vec![("one adapter", run(None, &x))]));
        }
    }
    let mut next = 0;
    let x = rand(&[ROWS, 1, dim], DType::F32)?;
    let forward = run(None, &x);
    let switch = move || {
        next = (next + 1) % ROWS;
        adapters.with(&names[next], || Ok(()))
    };
    cases.push(case("Adapters switch".to_owned(), Box::new(switch), vec![("a forward", forward)]));
    Ok(cases)
}
