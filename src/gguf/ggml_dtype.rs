//! ggml's dtypes: their numbers in a file, and the sizes of their blocks.

use candle_core::quantized::GgmlDType;

/// The dtypes that candle knows, by their numbers in ggml.
const KNOWN: [(u32, GgmlDType); 15] = [
    (0, GgmlDType::F32),
    (1, GgmlDType::F16),
    (2, GgmlDType::Q4_0),
    (3, GgmlDType::Q4_1),
    (6, GgmlDType::Q5_0),
    (7, GgmlDType::Q5_1),
    (8, GgmlDType::Q8_0),
    (9, GgmlDType::Q8_1),
    (10, GgmlDType::Q2K),
    (11, GgmlDType::Q3K),
    (12, GgmlDType::Q4K),
    (13, GgmlDType::Q5K),
    (14, GgmlDType::Q6K),
    (15, GgmlDType::Q8K),
    (30, GgmlDType::BF16),
];

/// The names of the others, for errors.
const UNKNOWN: [(u32, &str); 18] = [
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (39, "MXFP4"),
    (40, "NVFP4"),
];

/// The dtype of this number or, as an error, what is wrong with it.
pub(super) fn dtype(number: u32) -> Result<GgmlDType, String> {
    if let Some((_, dtype)) = KNOWN.iter().find(|(known, _)| *known == number) {
        return Ok(*dtype);
    }
    match UNKNOWN.iter().find(|(unknown, _)| *unknown == number) {
        Some((_, name)) => Err(format!("its dtype is {name}, which candle does not know")),
        None => Err(format!("its dtype has the unknown number {number}")),
    }
}

/// The number of a dtype.
pub(super) fn number(dtype: GgmlDType) -> u32 {
    // candle has no other dtypes
    KNOWN.iter().find(|(_, known)| *known == dtype).map_or(0, |(number, _)| *number)
}

/// The bytes of a row of `width` values, if blocks of the dtype divide it.
pub(super) fn row_bytes(dtype: GgmlDType, width: usize) -> Option<usize> {
    let blocks = width.is_multiple_of(dtype.block_size()).then(|| width / dtype.block_size())?;
    blocks.checked_mul(dtype.type_size())
}
