//! AdamW in place. Threads share the blocks of a moment, and not those of a variable: other tasks compute with it, and a
//! thread that waits for the others while it has locked the variable may run one of them.

use super::low_rank::Element;
use super::rows::vectorized;
use candle_core::backend::BackendStorage;
use candle_core::{bail, CpuStorage, InplaceOp2, InplaceOp3, Layout, Result};
use num_traits::Float;
use rayon::prelude::*;
use std::ops::Range;

/// Values that one thread works on at a time.
const BLOCK: usize = 1 << 14;

/// `m ← βm + (1-β)g`, or g² for the second moment.
pub(in crate::ops) struct AdamWMoment {
    pub beta: f64,
    pub squared: bool,
}

impl InplaceOp2 for AdamWMoment {
    fn name(&self) -> &'static str {
        "adamw-moment"
    }

    fn cpu_fwd(&self, m: &mut CpuStorage, l: &Layout, g: &CpuStorage, gl: &Layout) -> Result<()> {
        let (at, from) = (range(l)?, range(gl)?);
        match (m, g) {
            (CpuStorage::F32(m), CpuStorage::F32(g)) => {
                average(&mut m[at], &g[from], self, |x| x as f32)
            }
            (CpuStorage::F64(m), CpuStorage::F64(g)) => average(&mut m[at], &g[from], self, |x| x),
            (m, g) => {
                bail!("adamw: a moment and a gradient are {:?} and {:?}", m.dtype(), g.dtype())
            }
        }
        Ok(())
    }
}

fn average<T: Float + Send + Sync>(
    m: &mut [T],
    g: &[T],
    by: &AdamWMoment,
    number: impl Fn(f64) -> T,
) {
    // In F32, 1 - 0.999 is 1.3e-5 off.
    let (beta, rest, squared) = (number(by.beta), number(1. - by.beta), by.squared);
    m.par_chunks_mut(BLOCK).zip(g.par_chunks(BLOCK)).for_each(|(m, g)| {
        vectorized(
            #[inline(always)]
            || {
                for (m, g) in m.iter_mut().zip(g) {
                    *m = beta * *m + rest * if squared { *g * *g } else { *g };
                }
            },
        );
    });
}

/// `θ ← keep·θ - rate·m / (√(by_v·v) + eps)` of a variable of any float dtype, computed in that of its moments and
/// rounded once.
pub(in crate::ops) struct AdamWUpdate {
    pub keep: f64,
    pub rate: f64,
    pub by_v: f64,
    pub eps: f64,
}

impl InplaceOp3 for AdamWUpdate {
    fn name(&self) -> &'static str {
        "adamw-update"
    }

    fn cpu_fwd(
        &self,
        var: &mut CpuStorage,
        l: &Layout,
        m: &CpuStorage,
        ml: &Layout,
        v: &CpuStorage,
        vl: &Layout,
    ) -> Result<()> {
        let (at, m_at, v_at) = (range(l)?, range(ml)?, range(vl)?);
        match (var, m, v) {
            (CpuStorage::F64(var), CpuStorage::F64(m), CpuStorage::F64(v)) => {
                update(&mut var[at], &m[m_at], &v[v_at], self, |x| x)
            }
            (var, CpuStorage::F32(m), CpuStorage::F32(v)) => {
                let (m, v) = (&m[m_at], &v[v_at]);
                match var {
                    CpuStorage::F32(var) => update(&mut var[at], m, v, self, |x| x as f32),
                    CpuStorage::F16(var) => update(&mut var[at], m, v, self, |x| x as f32),
                    CpuStorage::BF16(var) => update(&mut var[at], m, v, self, |x| x as f32),
                    var => bail!("adamw: a variable is {:?}, expected a float", var.dtype()),
                }
            }
            (var, m, _) => {
                bail!("adamw: a variable is {:?} and its moment {:?}", var.dtype(), m.dtype())
            }
        }
    }
}

fn update<T: Element>(
    var: &mut [T],
    m: &[T::Compute],
    v: &[T::Compute],
    by: &AdamWUpdate,
    number: impl Fn(f64) -> T::Compute,
) -> Result<()>
where
    T::Compute: Float,
{
    let (keep, rate) = (number(by.keep), number(by.rate));
    let (by_v, eps) = (number(by.by_v), number(by.eps));
    let mut blocks = var.chunks_mut(BLOCK).zip(m.chunks(BLOCK)).zip(v.chunks(BLOCK));
    blocks.try_for_each(|((var, m), v)| {
        T::update(var, |var| {
            vectorized(
                #[inline(always)]
                || {
                    for ((var, m), v) in var.iter_mut().zip(m).zip(v) {
                        *var = keep * *var - rate * *m / ((by_v * *v).sqrt() + eps);
                    }
                },
            );
            Ok(())
        })
    })
}

fn range(l: &Layout) -> Result<Range<usize>> {
    match l.contiguous_offsets() {
        Some((from, to)) => Ok(from..to),
        None => bail!("adamw: a tensor is not contiguous: {l:?}"),
    }
}
