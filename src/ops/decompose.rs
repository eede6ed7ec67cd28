//! Decompositions of a matrix (m, n), computed in F64 on the CPU.

use candle_core::{DType, Device, Result, Tensor};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};

/// Columns of the subspace beyond the wanted ones, which make these converge faster.
const OVERSAMPLING: usize = 8;

/// The largest singular values (r) with their vectors, U (m, r) and V (n, r).
pub(crate) struct Svd {
    pub u: Tensor,
    pub s: Tensor,
    pub v: Tensor,
}

/// The exact decomposition, or by `iterations` of a subspace ([Halko et al.
/// 2009](https://arxiv.org/abs/0909.4061)), from a fixed seed, so that equal matrices have equal ones.
pub(crate) fn svd(w: &Tensor, r: usize, iterations: Option<usize>) -> Result<Svd> {
    let w = in_f64(w)?;
    let (m, n) = w.dims2()?;
    let Some(iterations) = iterations else {
        let (u, s, v) = by_library::svd(&w, r)?;
        return Ok(Svd { u, s, v });
    };
    let columns = (r + OVERSAMPLING).min(m).min(n);
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let start: Vec<f64> = StandardNormal.sample_iter(&mut rng).take(n * columns).collect();
    let start = Tensor::from_vec(start, (n, columns), &Device::Cpu)?;
    let mut q = by_library::qr(&w.matmul(&start)?)?.0;
    let transposed = w.t()?.contiguous()?;
    for _ in 0..iterations {
        let p = by_library::qr(&transposed.matmul(&q)?)?.0;
        q = by_library::qr(&w.matmul(&p)?)?.0;
    }
    // Tall, so that the decomposition's cost is that of the few columns.
    let (v, s, u) = by_library::svd(&transposed.matmul(&q)?, r)?;
    Ok(Svd { u: q.matmul(&u)?, s, v })
}

/// All singular values and vectors of `a·b`, without this product: a (m, k), b (k, n), with a small k.
pub(crate) fn svd_of_product(a: &Tensor, b: &Tensor) -> Result<Svd> {
    let ((qa, ra), (qb, rb)) = (qr(a)?, qr(&b.t()?)?);
    let core = ra.matmul(&rb.t()?.contiguous()?)?;
    let (m, n) = core.dims2()?;
    let Svd { u, s, v } = svd(&core, m.min(n), None)?;
    Ok(Svd { u: qa.matmul(&u)?, s, v: qb.matmul(&v)? })
}

/// Q (m, k), with orthonormal columns, and the upper triangular R (k, n), for k = min(m, n).
pub(crate) fn qr(w: &Tensor) -> Result<(Tensor, Tensor)> {
    by_library::qr(&in_f64(w)?)
}

fn in_f64(w: &Tensor) -> Result<Tensor> {
    w.detach().to_device(&Device::Cpu)?.to_dtype(DType::F64)?.contiguous()
}

#[cfg(feature = "faer")]
mod by_library {
    use candle_core::{bail, Device, Result, Tensor};
    use faer::{Mat, MatRef};

    pub fn svd(w: &Tensor, r: usize) -> Result<(Tensor, Tensor, Tensor)> {
        let svd = match to_faer(w)?.thin_svd() {
            Ok(svd) => svd,
            Err(e) => bail!("the singular values of a matrix {:?}: {e:?}", w.dims()),
        };
        let s = svd.S().column_vector();
        let s = (0..r).map(|i| s[i]).collect();
        let s = Tensor::from_vec::<_, f64>(s, r, &Device::Cpu)?;
        Ok((from_faer(svd.U(), r)?, s, from_faer(svd.V(), r)?))
    }

    pub fn qr(w: &Tensor) -> Result<(Tensor, Tensor)> {
        let qr = to_faer(w)?.qr();
        let q = qr.compute_thin_Q();
        let r = qr.thin_R();
        Ok((from_faer(q.as_ref(), q.ncols())?, from_faer(r, r.ncols())?))
    }

    fn to_faer(w: &Tensor) -> Result<Mat<f64>> {
        let (m, n) = w.dims2()?;
        let values: Vec<f64> = w.flatten_all()?.to_vec1()?;
        Ok(MatRef::from_column_major_slice(&values, n, m).transpose().to_owned())
    }

    /// The first `columns`.
    fn from_faer(m: MatRef<'_, f64>, columns: usize) -> Result<Tensor> {
        let rows = (0..m.nrows()).flat_map(|i| (0..columns).map(move |j| m[(i, j)]));
        Tensor::from_vec(rows.collect::<Vec<_>>(), (m.nrows(), columns), &Device::Cpu)
    }
}

#[cfg(not(feature = "faer"))]
mod by_library {
    use candle_core::{bail, Result, Tensor};

    const MISSING: &str = "decompositions of a weight need this crate's feature `faer`";

    pub fn svd(_: &Tensor, _: usize) -> Result<(Tensor, Tensor, Tensor)> {
        bail!("{MISSING}")
    }

    pub fn qr(_: &Tensor) -> Result<(Tensor, Tensor)> {
        bail!("{MISSING}")
    }
}

#[cfg(all(test, feature = "faer"))]
mod tests {
    use super::*;

    fn distance(a: &Tensor, b: &Tensor) -> Result<f64> {
        (a - b)?.abs()?.max_all()?.to_scalar()
    }

    /// u·diag(s)·vᵀ with singular values 4, 2, 1.
    fn matrix(m: usize, n: usize) -> Result<Tensor> {
        let random = |seed: u64, shape| {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            let values = StandardNormal.sample_iter(&mut rng).take(shape * 3).collect::<Vec<f64>>();
            qr(&Tensor::from_vec(values, (shape, 3), &Device::Cpu)?)
        };
        let s = Tensor::new(&[4f64, 2., 1.], &Device::Cpu)?;
        random(1, m)?.0.broadcast_mul(&s)?.matmul(&random(2, n)?.0.t()?)
    }

    #[test]
    fn largest_singular_values_are_found_exactly_and_by_iterations() -> Result<()> {
        for (m, n) in [(9, 5), (5, 9), (6, 6)] {
            let w = matrix(m, n)?;
            for iterations in [None, Some(4)] {
                let Svd { u, s, v } = svd(&w, 2, iterations)?;
                assert!(distance(&s, &Tensor::new(&[4f64, 2.], &Device::Cpu)?)? < 1e-9);
                assert!(distance(&w.matmul(&v)?, &u.broadcast_mul(&s)?)? < 1e-9);
                assert_eq!((u.dims(), v.dims()), ([m, 2].as_slice(), [n, 2].as_slice()));
            }
        }
        Ok(())
    }

    #[test]
    fn q_is_orthonormal_and_its_product_with_r_the_matrix() -> Result<()> {
        for (m, n) in [(7, 4), (4, 7)] {
            let w = matrix(m, n)?;
            let (q, r) = qr(&w)?;
            assert!(distance(&q.matmul(&r)?, &w)? < 1e-12);
            let k = q.dim(1)?;
            assert!(
                distance(&q.t()?.matmul(&q)?, &Tensor::eye(k, DType::F64, &Device::Cpu)?)? < 1e-12
            );
            assert_eq!((k, r.to_vec2::<f64>()?[1][0]), (m.min(n), 0.));
        }
        Ok(())
    }

    #[test]
    fn a_product_has_the_decomposition_of_its_matrix() -> Result<()> {
        for (m, k, n) in [(9, 3, 5), (4, 6, 7), (5, 2, 1)] {
            let (a, b) = (crate::random::normal((m, k))?, crate::random::normal((k, n))?);
            let product = a.matmul(&b)?;
            let Svd { u, s, v } = svd_of_product(&a, &b)?;
            let expected = svd(&product, s.dim(0)?, None)?;
            assert!(distance(&s, &expected.s)? < 1e-12);
            assert!(distance(&u.broadcast_mul(&s)?.matmul(&v.t()?)?, &product)? < 1e-12);
        }
        Ok(())
    }

    /// `cargo test --release --lib decompose -- --ignored --nocapture` prints how long a decomposition takes.
    #[test]
    #[ignore = "a measurement"]
    fn time_to_decompose() -> Result<()> {
        for n in [576, 1024, 2048] {
            let w = crate::random::normal((n, n))?;
            let time = |f: &dyn Fn() -> Result<()>| {
                let start = std::time::Instant::now();
                f().map(|()| start.elapsed())
            };
            let exact = time(&|| svd(&w, 16, None).map(drop))?;
            let iterated = time(&|| svd(&w, 16, Some(4)).map(drop))?;
            println!(
                "({n}, {n}): svd {exact:?}, 4 iterations {iterated:?}, qr {:?}",
                time(&|| qr(&w).map(drop))?
            );
        }
        Ok(())
    }
}

#[cfg(all(test, not(feature = "faer")))]
mod tests {
    use super::*;

    #[test]
    fn the_missing_feature_is_named() -> Result<()> {
        let w = Tensor::eye(3, DType::F32, &Device::Cpu)?;
        for error in [svd(&w, 1, None).map(drop), svd(&w, 1, Some(2)).map(drop), qr(&w).map(drop)] {
            assert!(error.is_err_and(|error| error.to_string().contains("feature `faer`")));
        }
        Ok(())
    }
}
