//! `y += u·v` with a short sum, by the widest vector instructions of the machine. Such a product is
//! bound by loads and stores: a few rows and vectors of `y` stay in registers for the whole sum.

use pulp::{Arch, Simd, WithSimd};
use std::ops::Range;

/// Rows of `y` in registers at a time, and vectors of each: with those of `u` and `v` they fill the 16
/// registers of AVX2.
pub(super) const ROWS: usize = 4;
const VECTORS: usize = 3;

/// A float that pulp has vectors of.
pub(super) trait Lanes: Copy {
    type Vector<S: Simd>: Copy;

    fn vectors<S: Simd>(x: &[Self]) -> Row<'_, S, Self>;
    fn vectors_mut<S: Simd>(x: &mut [Self]) -> RowMut<'_, S, Self>;
    fn splat<S: Simd>(simd: S, x: Self) -> Self::Vector<S>;

    /// Less than a whole vector, zeros behind it.
    fn load<S: Simd>(simd: S, x: &[Self]) -> Self::Vector<S>;
    fn store<S: Simd>(simd: S, x: &mut [Self], vector: Self::Vector<S>);

    /// `a·b + c`, rounded once where the machine can.
    fn mul_add<S: Simd>(
        simd: S,
        a: Self::Vector<S>,
        b: Self::Vector<S>,
        c: Self::Vector<S>,
    ) -> Self::Vector<S>;
}

/// A row as whole vectors, and what is left of it.
type Row<'a, S, T> = (&'a [<T as Lanes>::Vector<S>], &'a [T]);
type RowMut<'a, S, T> = (&'a mut [<T as Lanes>::Vector<S>], &'a mut [T]);

macro_rules! lanes {
    ($t:ty, $vector:ident, $vectors:ident, $vectors_mut:ident, $splat:ident, $load:ident, $store:ident,
     $mul_add:ident) => {
        impl Lanes for $t {
            type Vector<S: Simd> = S::$vector;

            #[inline(always)]
            fn vectors<S: Simd>(x: &[Self]) -> Row<'_, S, Self> {
                S::$vectors(x)
            }
            #[inline(always)]
            fn vectors_mut<S: Simd>(x: &mut [Self]) -> RowMut<'_, S, Self> {
                S::$vectors_mut(x)
            }
            #[inline(always)]
            fn splat<S: Simd>(simd: S, x: Self) -> S::$vector {
                simd.$splat(x)
            }
            #[inline(always)]
            fn load<S: Simd>(simd: S, x: &[Self]) -> S::$vector {
                simd.$load(x)
            }
            #[inline(always)]
            fn store<S: Simd>(simd: S, x: &mut [Self], vector: S::$vector) {
                simd.$store(x, vector);
            }
            #[inline(always)]
            fn mul_add<S: Simd>(
                simd: S,
                a: S::$vector,
                b: S::$vector,
                c: S::$vector,
            ) -> S::$vector {
                simd.$mul_add(a, b, c)
            }
        }
    };
}
lanes! {
    f32, f32s, as_simd_f32s, as_mut_simd_f32s, splat_f32s, partial_load_f32s, partial_store_f32s,
    mul_add_e_f32s
}
lanes! {
    f64, f64s, as_simd_f64s, as_mut_simd_f64s, splat_f64s, partial_load_f64s, partial_store_f64s,
    mul_add_e_f64s
}

/// `y[.., cols] += u·v`, with `y` in rows of `n`, `u` in rows of `rank` and `v` in rows of the columns.
pub(super) fn add<T: Lanes>(
    y: &mut [T],
    n: usize,
    cols: Range<usize>,
    u: &[T],
    v: &[T],
    rank: usize,
) {
    Arch::new().dispatch(Thin { y, n, cols, u, v, rank });
}

struct Thin<'a, T> {
    y: &'a mut [T],
    n: usize,
    cols: Range<usize>,
    u: &'a [T],
    v: &'a [T],
    rank: usize,
}

impl<T: Lanes> WithSimd for Thin<'_, T> {
    type Output = ();

    // Inlined, all of it, into the one place that is compiled for those instructions.
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { y, n, cols, u, v, rank } = self;
        if cols.is_empty() {
            return;
        }
        let v: Vec<_> = v.chunks_exact(cols.len()).map(T::vectors::<S>).collect();
        for (y, u) in y.chunks_mut(ROWS * n).zip(u.chunks(ROWS * rank)) {
            if y.len() == ROWS * n {
                add_rows::<S, T, ROWS>(simd, y, n, &cols, u, &v);
            } else {
                for (y, u) in y.chunks_exact_mut(n).zip(u.chunks_exact(rank)) {
                    add_rows::<S, T, 1>(simd, y, n, &cols, u, &v);
                }
            }
        }
    }
}

#[inline(always)]
fn add_rows<S: Simd, T: Lanes, const R: usize>(
    simd: S,
    y: &mut [T],
    n: usize,
    cols: &Range<usize>,
    u: &[T],
    v: &[Row<S, T>],
) {
    let mut rows = y.chunks_exact_mut(n).map(|y| T::vectors_mut::<S>(&mut y[cols.clone()]));
    let mut y: [_; R] = std::array::from_fn(|_| rows.next().unwrap_or_default());
    let u: [_; R] = std::array::from_fn(|r| &u[r * v.len()..][..v.len()]);
    let count = y.iter().map(|(y, _)| y.len()).min().unwrap_or(0);
    let mut at = 0;
    while at + VECTORS <= count {
        add_tile::<S, T, R, VECTORS>(simd, &mut y, at, &u, v);
        at += VECTORS;
    }
    while at < count {
        add_tile::<S, T, R, 1>(simd, &mut y, at, &u, v);
        at += 1;
    }
    for ((_, y), u) in y.iter_mut().zip(u) {
        if y.is_empty() {
            return;
        }
        let mut sum = T::load(simd, y);
        for (u, (_, v)) in u.iter().zip(v) {
            sum = T::mul_add(simd, T::splat(simd, *u), T::load(simd, v), sum);
        }
        T::store(simd, y, sum);
    }
}

#[inline(always)]
fn add_tile<S: Simd, T: Lanes, const R: usize, const C: usize>(
    simd: S,
    y: &mut [RowMut<S, T>; R],
    at: usize,
    u: &[&[T]; R],
    v: &[Row<S, T>],
) {
    let mut sums: [[_; C]; R] = std::array::from_fn(|r| std::array::from_fn(|c| y[r].0[at + c]));
    for (k, (v, _)) in v.iter().enumerate() {
        let v = &v[at..at + C];
        for r in 0..R {
            let u = T::splat(simd, u[r][k]);
            for c in 0..C {
                sums[r][c] = T::mul_add(simd, u, v[c], sums[r][c]);
            }
        }
    }
    for r in 0..R {
        y[r].0[at..at + C].copy_from_slice(&sums[r]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ops::{AddAssign, Mul};

    /// Whole numbers, whose sums are exact in any order.
    fn whole<T: From<i8>>(len: usize) -> Vec<T> {
        (0..len).map(|i| T::from((i * 7 % 11) as i8 - 5)).collect()
    }

    #[derive(Debug, Clone, Copy)]
    enum Instructions {
        Plain,
        #[cfg(target_arch = "x86_64")]
        Avx2,
        Widest,
    }

    impl Instructions {
        const ALL: &[Self] = &[
            Self::Plain,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2,
            Self::Widest,
        ];

        fn run<T: Lanes>(self, thin: Thin<T>) {
            match self {
                Self::Plain => thin.with_simd(pulp::Scalar),
                #[cfg(target_arch = "x86_64")]
                Self::Avx2 => match pulp::x86::V3::try_new() {
                    Some(simd) => Simd::vectorize(simd, thin),
                    None => thin.with_simd(pulp::Scalar),
                },
                Self::Widest => Arch::new().dispatch(thin),
            }
        }
    }

    fn columns_beside_the_range_stay_and_others_get_the_product<T>()
    where
        T: Lanes + From<i8> + PartialEq + std::fmt::Debug + Mul<Output = T> + AddAssign,
    {
        // Every count of columns, so that any width of vectors meets whole tiles, single vectors and
        // what is left; rows of whole tiles, of a part of one, and of both.
        for (m, width) in [1, 4, 7].into_iter().flat_map(|m| (0..=100).map(move |width| (m, width)))
        {
            let (n, cols, rank) = (width + 5, 3..3 + width, 1 + width % 4);
            let (y, u, v) = (whole::<T>(m * n), whole(m * rank), whole(rank * cols.len()));
            let mut expected = y.clone();
            for (i, k) in (0..m).flat_map(|i| (0..rank).map(move |k| (i, k))) {
                for (j, at) in cols.clone().enumerate() {
                    expected[i * n + at] += u[i * rank + k] * v[k * cols.len() + j];
                }
            }
            for instructions in Instructions::ALL {
                let (mut sum, cols) = (y.clone(), cols.clone());
                instructions.run(Thin { y: &mut sum, n, cols, u: &u, v: &v, rank });
                assert_eq!(sum, expected, "{m} x {width}, rank {rank}, {instructions:?}");
            }
        }
    }

    #[test]
    fn every_size_of_both_floats() {
        columns_beside_the_range_stay_and_others_get_the_product::<f32>();
        columns_beside_the_range_stay_and_others_get_the_product::<f64>();
    }
}
