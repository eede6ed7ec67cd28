//! Each row of a batch with its own adapter.

use super::Served;
use crate::adapter::Model;
use crate::common::{difference, rnd};
use candle_core::{DType, Device, Module, Tensor, Var};
use loralib::nn::linear;
use loralib::{Adapter, Adapters, Result};

#[test]
fn each_row_computes_as_its_adapter_alone() -> Result<()> {
    let served = Served::new()?;
    let names = ["sql", "chat", "fused", "rslora"].map(Some);
    let rows = [names[0], None, names[1], names[1], names[2], names[3], names[0], names[2]];
    let ids: Vec<u32> = (0..rows.len() as u32 * 3).map(|i| i * 7 % 10).collect();
    let ids = Tensor::from_vec(ids, (rows.len(), 3), &Device::Cpu)?;
    let forward = |model: &Model, ids: &Tensor| model.forward(ids);
    let y = served.adapters.with_rows(&rows, || forward(&served.model, &ids))?;
    assert!(!y.track_op());
    for (i, name) in rows.iter().enumerate() {
        let ids = ids.narrow(0, i, 1)?;
        let alone = match name {
            Some(name) => served.adapters.with(*name, || forward(&served.model, &ids))?,
            None => served.adapters.with_none(|| forward(&served.model, &ids))?,
        };
        assert!(difference(&y.narrow(0, i, 1)?, &alone)? < 1e-6, "row {i}, {name:?}");
    }
    Ok(())
}

/// A layer over a batch of 5 rows in 3 dimensions, with adapters of ranks 1 and 2.
fn layer(dtype: DType) -> Result<(Adapters, loralib::nn::Linear)> {
    let tensors = [
        ("fc.weight".to_owned(), rnd(1, &[6, 4], dtype)?),
        ("fc.bias".to_owned(), rnd(2, &[6], dtype)?),
    ];
    let device = crate::common::device();
    let base = loralib::nn::VarBuilder::from_tensors(tensors.into(), dtype, &device);
    let adapters = Adapters::new();
    let layer = linear(4, 6, adapters.var_builder(base).pp("fc"))?;
    for (name, r) in [("a", 1), ("b", 2)] {
        let adapter = Adapter::new(super::cfg(r, 3.)).targets(["fc"]);
        adapters.add(name, &adapter)?;
        for var in adapter.vars()? {
            var.set(&rnd(r as u64, var.dims(), var.dtype())?)?;
        }
        adapter.eval()?;
    }
    Ok((adapters, layer))
}

const ROWS: [Option<&str>; 5] = [Some("b"), Some("b"), None, Some("a"), Some("b")];

/// The gradient of an input by its rows alone.
#[test]
fn the_inputs_gradient_is_that_of_each_row_alone() -> Result<()> {
    let (adapters, layer) = layer(DType::F64)?;
    let x = Var::from_tensor(&rnd(5, &[5, 3, 4], DType::F64)?)?;
    let weights = rnd(6, &[5, 3, 6], DType::F64)?;
    let loss = |y: Tensor| (y.sqr()? * &weights)?.sum_all();
    let y = adapters.with_rows(&ROWS, || layer.forward(&x))?;
    let together = loss(y)?.backward()?.remove(&x).expect("a gradient");
    let mut alone = vec![];
    for (i, name) in ROWS.into_iter().enumerate() {
        let row = x.narrow(0, i, 1)?;
        alone.push(match name {
            Some(name) => adapters.with(name, || layer.forward(&row))?,
            None => layer.forward(&row)?,
        });
    }
    let alone = loss(Tensor::cat(&alone, 0)?)?.backward()?.remove(&x).expect("a gradient");
    assert!(difference(&together, &alone)? < 1e-12);
    Ok(())
}

#[test]
fn half_precision_rounds_once() -> Result<()> {
    let (adapters, layer) = layer(DType::BF16)?;
    let x = rnd(5, &[5, 3, 4], DType::BF16)?;
    let y = adapters.with_rows(&ROWS, || layer.forward(&x))?;
    assert_eq!(y.dtype(), DType::BF16);
    for (i, name) in ROWS.into_iter().enumerate() {
        let row = x.narrow(0, i, 1)?;
        let alone = match name {
            Some(name) => adapters.with(name, || layer.forward(&row))?,
            None => layer.forward(&row)?,
        };
        assert!(difference(&y.narrow(0, i, 1)?, &alone)? < 1e-2, "row {i}");
    }
    Ok(())
}

#[test]
fn an_empty_sequence_has_an_empty_output() -> Result<()> {
    let (adapters, layer) = layer(DType::F32)?;
    let x = Tensor::zeros((5, 0, 4), DType::F32, &crate::common::device())?;
    assert_eq!(adapters.with_rows(&ROWS, || layer.forward(&x))?.dims(), [5, 0, 6]);
    Ok(())
}
