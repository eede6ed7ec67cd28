//! Losses and poolings of embeddings are sentence-transformers', and cached gradients those of the whole batch.

use crate::Result;
use candle_core::Module;
use candle_core::{DType, Device, Tensor, Var};
use loralib::train::{contrastive_loss, matryoshka_loss, Pooling};
use loralib::{nn as candle_nn, Adapter, LoraConfig};
use std::sync::Arc;

fn values(rows: usize, d: usize, seed: usize) -> Vec<Vec<f64>> {
    let value = |i: usize| ((i * 37 + seed * 11) % 23) as f64 / 10. - 1.1;
    (0..rows).map(|row| (0..d).map(|i| value(row * d + i)).collect()).collect()
}

/// By the definition, in plain numbers.
fn defined(queries: &[Vec<f64>], documents: &[Vec<f64>], temperature: f64) -> f64 {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let cosine = |a: &[f64], b: &[f64]| dot(a, b) / (dot(a, a) * dot(b, b)).sqrt();
    let loss = |(i, query): (usize, &Vec<f64>)| {
        let scores: Vec<_> =
            documents.iter().map(|document| cosine(query, document) / temperature).collect();
        scores.iter().map(|score| score.exp()).sum::<f64>().ln() - scores[i]
    };
    queries.iter().enumerate().map(loss).sum::<f64>() / queries.len() as f64
}

#[test]
fn the_contrastive_loss_is_its_definition_with_and_without_hard_negatives() -> Result<()> {
    for (batch, count, temperature) in [(4, 4, 0.05), (3, 7, 0.5), (1, 2, 1.)] {
        let (queries, documents) = (values(batch, 5, 1), values(count, 5, 2));
        let expected = defined(&queries, &documents, temperature);
        let tensors = [&queries, &documents].map(|rows| Tensor::new(rows.clone(), &Device::Cpu));
        let [queries, documents] = tensors;
        let (queries, documents) = (queries?, documents?);
        let loss = contrastive_loss(&queries, &documents, temperature)?.to_scalar::<f64>()?;
        approx::assert_relative_eq!(loss, expected, max_relative = 1e-12);
        let halves = [&queries, &documents].map(|t| t.to_dtype(DType::F32));
        let [queries, documents] = halves;
        let loss = contrastive_loss(&queries?, &documents?, temperature)?.to_scalar::<f32>()?;
        approx::assert_relative_eq!(f64::from(loss), expected, max_relative = 1e-5);
    }
    Ok(())
}

#[test]
fn its_gradients_are_those_of_differences() -> Result<()> {
    let (queries, documents) = (values(3, 4, 3), values(5, 4, 4));
    let vars = [&queries, &documents].map(|rows| Var::new(rows.clone(), &Device::Cpu));
    let [q, d] = vars;
    let (q, d) = (q?, d?);
    let grads = contrastive_loss(&q, &d, 0.3)?.backward()?;
    for (is_query, var) in [(true, &q), (false, &d)] {
        let grad = grads.get(var).ok_or("no gradient")?.to_vec2::<f64>()?;
        for (row, of_row) in grad.iter().enumerate() {
            for (column, found) in of_row.iter().enumerate() {
                let moved = |by: f64| {
                    let (mut queries, mut documents) = (queries.clone(), documents.clone());
                    let rows = if is_query { &mut queries } else { &mut documents };
                    rows[row][column] += by;
                    defined(&queries, &documents, 0.3)
                };
                let expected = (moved(1e-5) - moved(-1e-5)) / 2e-5;
                approx::assert_relative_eq!(*found, expected, epsilon = 1e-8, max_relative = 1e-6);
            }
        }
    }
    Ok(())
}

/// A row of zeros has no direction: its cosines are 0, and its gradient is finite.
#[test]
fn a_row_of_zeros_gives_no_nan() -> Result<()> {
    let queries = Var::new(&[[0f32, 0.], [1., 2.]], &Device::Cpu)?;
    let documents = Tensor::new(&[[1f32, 0.], [1., 2.]], &Device::Cpu)?;
    let loss = contrastive_loss(&queries, &documents, 0.05)?;
    assert!(loss.to_scalar::<f32>()?.is_finite());
    let grads = loss.backward()?;
    let grad = grads.get(&queries).ok_or("no gradient")?.flatten_all()?.to_vec1::<f32>()?;
    assert!(grad.iter().all(|value| value.is_finite()), "{grad:?}");
    Ok(())
}

#[test]
fn what_it_cannot_compare_is_refused_with_the_values() -> Result<()> {
    let zeros = |rows, d| Tensor::zeros((rows, d), DType::F32, &Device::Cpu);
    for (queries, documents, temperature, expected) in [
        (zeros(2, 3)?, zeros(2, 4)?, 0.1, "queries are 3 wide, documents 4"),
        (zeros(3, 3)?, zeros(2, 3)?, 0.1, "3 queries and 2 documents"),
        (zeros(1, 3)?, zeros(1, 3)?, 0.1, "1 queries and 1 documents"),
        (zeros(2, 3)?, zeros(2, 3)?, 0., "temperature is 0"),
        (zeros(2, 3)?, zeros(2, 3)?, f64::NAN, "temperature is NaN"),
    ] {
        let error = contrastive_loss(&queries, &documents, temperature).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    Ok(())
}

fn fixture(name: &str) -> Result<Tensor> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/embeddings.safetensors");
    let mut all = candle_core::safetensors::load(path, &Device::Cpu)?;
    Ok(all.remove(name).ok_or_else(|| format!("no {name}"))?)
}

fn apart(a: &Tensor, b: &Tensor) -> Result<f64> {
    let difference = (a.to_dtype(DType::F64)? - b.to_dtype(DType::F64)?)?;
    Ok(difference.abs()?.flatten_all()?.max(0)?.to_scalar()?)
}

#[test]
fn losses_and_gradients_are_sentence_transformers() -> Result<()> {
    for (dtype, tolerance) in [(DType::F64, 1e-12), (DType::F32, 1e-5)] {
        let var =
            |name: &str| Ok::<_, crate::Error>(Var::from_tensor(&fixture(name)?.to_dtype(dtype)?)?);
        for name in ["plain", "scale", "matryoshka"] {
            let (queries, documents) = (var("queries")?, var("documents")?);
            let loss = match name {
                "plain" => contrastive_loss(&queries, &documents, 0.05)?,
                "scale" => contrastive_loss(&queries, &documents, 0.02)?,
                _ => matryoshka_loss(&queries, &documents, &[3, 12, 8], |queries, documents| {
                    contrastive_loss(queries, documents, 0.05)
                })?,
            };
            assert!(apart(&loss, &fixture(&format!("loss.{name}"))?)? < tolerance, "{name}");
            let grads = loss.backward()?;
            for (of, var) in [("queries", &queries), ("documents", &documents)] {
                let expected = fixture(&format!("grad.{name}.{of}"))?;
                let grad = grads.get(var).ok_or("no gradient")?;
                assert!(apart(grad, &expected)? < tolerance, "{name} {of}");
            }
        }
    }
    Ok(())
}

#[test]
fn poolings_are_sentence_transformers_with_padding_on_either_side() -> Result<()> {
    let (hidden, mask) = (fixture("hidden")?, fixture("mask")?);
    for (pooling, name) in
        [(Pooling::Mean, "mean"), (Pooling::Cls, "cls"), (Pooling::LastToken, "lasttoken")]
    {
        let mut expected = fixture(&format!("pooled.{name}"))?;
        if pooling == Pooling::Cls {
            // The first token after padding on the left, where sentence-transformers takes the padding itself.
            let first = hidden.get(2)?.narrow(0, 2, 1)?;
            expected = Tensor::cat(&[expected.narrow(0, 0, 2)?, first], 0)?;
        }
        for dtype in [DType::U8, DType::U32, DType::I64, DType::F32] {
            let pooled = pooling.pool(&hidden, &mask.to_dtype(dtype)?)?;
            assert!(apart(&pooled, &expected)? < 1e-12, "{name}");
        }
        assert_eq!(name.parse::<Pooling>()?.to_string(), pooling.to_string());
        let half = pooling.pool(&hidden.to_dtype(DType::BF16)?, &mask)?;
        assert!(half.dtype() == DType::F32 && apart(&half, &expected)? < 2e-2, "{name}");
        let var = Var::from_tensor(&hidden)?;
        let grads = pooling.pool(&var, &mask)?.sum_all()?.backward()?;
        let of_padding = grads.get(&var).ok_or("no gradient")?.get(1)?.narrow(0, 2, 2)?;
        assert_eq!(of_padding.abs()?.sum_all()?.to_scalar::<f64>()?, 0., "{name}");
    }
    let empty = Pooling::Mean.pool(&hidden, &mask.zeros_like()?).unwrap_err().to_string();
    assert!(empty.contains("text 0 has no tokens"), "{empty}");
    let packed = hidden.get(0)?;
    for (lens, expected) in
        [(&[2, 3][..], "4 hidden states, the texts have 5"), (&[4, 0], "text 1")]
    {
        let error = Pooling::Mean.pool_packed(&packed, lens).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    let shape = Pooling::Cls.pool(&hidden, &mask.t()?).unwrap_err().to_string();
    assert!(shape.contains("[4, 3]"), "{shape}");
    Ok(())
}

#[test]
fn dims_that_are_none_are_refused() -> Result<()> {
    let x = fixture("queries")?;
    for (dims, expected) in [
        (&[][..], "dims is empty"),
        (&[0], "dims[0] is 0"),
        (&[12, 13], "dims[1] is 13, expected 1 to 12"),
        (&[3, 3], "3 twice"),
    ] {
        let loss = matryoshka_loss(&x, &x, dims, |q, d| contrastive_loss(q, d, 0.05));
        let error = loss.unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    Ok(())
}

#[test]
fn cached_gradients_are_those_of_the_whole_batch() -> Result<()> {
    let cfg = LoraConfig { r: 2, lora_dropout: 0.2, ..Default::default() };
    let texts = Tensor::from_vec(values(1, 96 * 6, 5).remove(0), (96, 6), &Device::Cpu)?;
    let weights =
        [("one.weight", (8, 6), 1), ("two.weight", (4, 8), 2)].map(|(name, shape, seed)| {
            let values = values(1, shape.0 * shape.1, seed).remove(0);
            Ok::<_, candle_core::Error>((
                name.to_owned(),
                Tensor::from_vec(values, shape, &Device::Cpu)?,
            ))
        });
    let weights = weights.into_iter().collect::<std::result::Result<_, _>>()?;
    let base = candle_nn::VarBuilder::from_tensors(weights, DType::F64, &Device::Cpu);
    let adapter = Adapter::new(cfg).targets("all-linear").seed(0);
    let vb = adapter.var_builder(base);
    let (one, two) = (
        candle_nn::linear_no_bias(6, 8, vb.pp("one"))?,
        candle_nn::linear_no_bias(8, 4, vb.pp("two"))?,
    );
    let model = Arc::new(move |x: &Tensor| two.forward(&one.forward(x)?.tanh()?));
    for (i, var) in adapter.named_vars()?.values().enumerate() {
        let values = values(1, var.elem_count(), i).remove(0);
        var.set(&Tensor::from_vec(values, var.shape(), &Device::Cpu)?.to_dtype(var.dtype())?)?;
    }
    let loss = |embedded: Vec<Tensor>| {
        let all = Tensor::cat(&embedded, 0)?;
        contrastive_loss(&all.narrow(0, 0, 48)?, &all.narrow(0, 48, 48)?, 0.05)
    };
    let parts = texts.chunk(12, 0)?;
    let start = adapter.dropout_position();
    let whole = loss(parts.iter().map(|part| model(part)).collect::<std::result::Result<_, _>>()?)?;
    adapter.set_dropout_position(start)?; // the same masks
    let cached = parts.iter().map(|part| {
        let model = model.clone();
        adapter.checkpoint("", part, move |part| model(part))
    });
    let cached = loss(cached.collect::<std::result::Result<_, _>>()?)?;
    assert_eq!(apart(&whole, &cached)?, 0.);
    let (whole, cached) = (whole.backward()?, cached.backward()?);
    for (name, var) in adapter.named_vars()? {
        let (whole, cached) =
            (whole.get(&var).ok_or("no gradient")?, cached.get(&var).ok_or("no gradient")?);
        assert!(apart(whole, cached)? < 1e-6, "{name}: {whole} {cached}");
    }
    Ok(())
}
