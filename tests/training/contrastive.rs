//! The contrastive loss is the mean cross-entropy of scaled cosines.

use crate::Result;
use candle_core::{DType, Device, Tensor, Var};
use loralib::train::contrastive_loss;

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
fn it_is_the_definition_with_and_without_hard_negatives() -> Result<()> {
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
