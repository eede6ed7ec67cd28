//! Every operand's layout and dtype against candle's product.

use super::*;
use candle_core::{DType, Device, Result, Storage, Tensor};

fn gemm_of(a: &Tensor, b: &Tensor) -> Option<CpuStorage> {
    let ((a, al), (b, bl)) = (a.storage_and_layout(), b.storage_and_layout());
    match (&*a, &*b) {
        (Storage::Cpu(a), Storage::Cpu(b)) => gemm((a, al), (b, bl)),
        _ => None,
    }
}

/// Whole numbers, whose sums are exact in any order.
pub(super) fn whole(rows: usize, cols: usize) -> Result<Tensor> {
    let values = (0..rows * cols).map(|i| ((i * 7919 + rows) % 1009 % 9) as f32 - 4.);
    Tensor::from_iter(values, &Device::Cpu)?.reshape((rows, cols))
}

/// The same matrix with its rows contiguous, its columns, and either with gaps between.
fn layouts(m: &Tensor) -> Result<Vec<Tensor>> {
    let (rows, cols) = m.dims2()?;
    let gaps = m.pad_with_zeros(0, 2, 3)?.pad_with_zeros(1, 1, 5)?;
    let by_columns = |m: &Tensor| m.t()?.contiguous()?.t();
    let part = |m: Tensor| m.narrow(0, 2, rows)?.narrow(1, 1, cols);
    // The last line of these ends where the storage does.
    let last = m.pad_with_zeros(0, 2, 0)?.pad_with_zeros(1, 1, 0)?;
    Ok(vec![
        m.clone(),
        by_columns(m)?,
        part(by_columns(&gaps)?)?,
        part(gaps)?,
        part(by_columns(&last)?)?,
        part(last)?,
    ])
}

#[test]
fn every_layout_and_dtype_gives_candle_s_product() -> Result<()> {
    // One row, one column, low rank, few rows, and a weight that is upcast in several parts.
    let sizes = [(1, 7, 5), (9, 3, 1), (40, 200, 8), (9, 70, 150), (150, 90, 130), (90, 130, 150)];
    for (m, k, n) in sizes {
        let (a, b) = (whole(m, k)?, whole(k, n)?);
        let expected = a.to_dtype(DType::F64)?.matmul(&b.to_dtype(DType::F64)?)?;
        for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16] {
            for a in layouts(&a.to_dtype(dtype)?)? {
                for b in layouts(&b.to_dtype(dtype)?)? {
                    let y = match gemm_of(&a, &b) {
                        Some(CpuStorage::F64(y)) => Tensor::new(y, &Device::Cpu)?,
                        Some(CpuStorage::F32(y)) => Tensor::new(y, &Device::Cpu)?,
                        Some(CpuStorage::BF16(y)) => Tensor::new(y, &Device::Cpu)?,
                        y => panic!("{y:?}"),
                    };
                    let expected = expected.to_dtype(y.dtype())?.to_dtype(DType::F64)?;
                    let apart = (y.to_dtype(DType::F64)?.reshape((m, n))? - expected)?;
                    let apart = apart.abs()?.max_all()?.to_scalar::<f64>()?;
                    assert_eq!(apart, 0., "{dtype:?} {:?} {:?}", a.layout(), b.layout());
                }
            }
        }
    }
    Ok(())
}

#[test]
fn into_a_slice_replaces_or_adds() -> Result<()> {
    for k in [70, 0] {
        let (a, b) = (whole(9, k)?, whole(k, 4)?);
        let ((sa, al), (sb, bl)) = (a.storage_and_layout(), b.storage_and_layout());
        let (Storage::Cpu(sa), Storage::Cpu(sb)) = (&*sa, &*sb) else { panic!() };
        let once = match k {
            0 => vec![0.; 36],
            _ => a.matmul(&b)?.flatten_all()?.to_vec1::<f32>()?,
        };
        let mut y = vec![f32::NAN; 36];
        for (add, times) in [(false, 1.), (true, 2.), (true, 3.), (false, 1.)] {
            assert!(gemm_into(&mut y, add, (sa, al), (sb, bl)));
            let expected: Vec<f32> = once.iter().map(|once| times * once).collect();
            assert_eq!(y, expected);
        }
        // `y` has another dtype or size.
        assert!(!gemm_into(&mut [0f64; 36], true, (sa, al), (sb, bl)));
        assert!(!gemm_into(&mut y[1..], false, (sa, al), (sb, bl)));
        assert_eq!(y, once);
    }
    Ok(())
}

#[test]
fn other_layouts_and_dtypes_are_left_to_candle() -> Result<()> {
    let (a, b) = (whole(4, 6)?, whole(6, 8)?);
    assert!(gemm_of(&a, &b.narrow(0, 0, 1)?.broadcast_as((6, 8))?).is_none());
    assert!(gemm_of(&a.to_dtype(DType::U8)?, &b.to_dtype(DType::U8)?).is_none());
    assert!(gemm_of(&a, &b.to_dtype(DType::F64)?).is_none());
    Ok(())
}
