//! Hostile files, which random damage seldom produces.

use crate::{alone, measured, CPU};
use candle_core::{DType, Tensor};
use lora::merge::merge_files;
use lora::{LoraConfig, LoraWeights};
use loralib as lora;
use std::fs;

#[test]
fn hostile_files_are_errors() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("hostile.pt");
    let nested = [&b"\x80\x02)"[..], &[0x85; 200_000], b"."].concat();
    let doubled = [&b"\x80\x02)q\x00"[..], &b"h\x00h\x00\x86q\x00".repeat(500), b"."].concat();
    let calls: &[u8] = b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.";
    let endless: &[u8] = b"\x80\x02X\xff\xff\xff\xffabc";
    let few = b"\x80\x02}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n)Rs.";
    let odd: &[u8] = b"\x80\x02}(X\x01\x00\x00\x00au.";
    for pickle in
        [&nested[..], &doubled, calls, endless, few, odd, b"\x80\x02", b".", b"u.", b"s.", b"R."]
    {
        fs::write(&path, stored_zip("a/data.pkl", pickle)).unwrap();
        let (read, largest) = measured(|| lora::read_state_dict(&path, &CPU));
        let error = read.unwrap_err().to_string();
        assert!(error.contains("hostile.pt"), "{error}");
        // Each byte may be an object of its own.
        assert!(largest < 96 * pickle.len() + (1 << 18), "{largest} bytes for {}", pickle.len());
    }
    let shapes = [
        r#"{"a":{"dtype":"F32","shape":[0,9223372036854775807,8],"data_offsets":[0,0]}}"#,
        r#"{"a":{"dtype":"F32","shape":[18446744073709551615],"data_offsets":[0,0]}}"#,
        r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,18446744073709551615]}}"#,
        r#"{"a":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}"#,
        "{}",
    ];
    let factor = Tensor::zeros((1, 1), DType::F32, &CPU).unwrap();
    let tensors = ["a.lora_A", "a.lora_B"].map(|name| (name.to_owned(), factor.clone()));
    let cfg = LoraConfig { r: 1, ..Default::default() };
    let adapter = LoraWeights::new(cfg, tensors.into()).unwrap();
    for header in shapes {
        let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat();
        fs::write(&path, bytes).unwrap();
        let read = lora::read_state_dict(&path, &CPU);
        assert!(read.is_err() || header == "{}", "{header}");
        let out = dir.path().join("out");
        assert!(merge_files(&path, &adapter, &out, |_| {}).is_err());
    }
    fs::write(&path, u64::MAX.to_le_bytes()).unwrap();
    assert!(lora::read_state_dict(&path, &CPU).is_err());
}

/// A zip archive of one uncompressed file.
fn stored_zip(name: &str, data: &[u8]) -> Vec<u8> {
    let crc = !data.iter().fold(!0u32, |crc, &b| {
        (0..8).fold(
            crc ^ u32::from(b),
            |c, _| if c & 1 == 1 { (c >> 1) ^ 0xEDB8_8320 } else { c >> 1 },
        )
    });
    let size = (data.len() as u32).to_le_bytes();
    let length = (name.len() as u16).to_le_bytes();
    let common =
        [&[20, 0, 0, 0, 0, 0, 0, 0, 0, 0][..], &crc.to_le_bytes(), &size, &size, &length].concat();
    let mut zip = [&b"PK\x03\x04"[..], &common, &[0, 0], name.as_bytes(), data].concat();
    let start = (zip.len() as u32).to_le_bytes();
    let central = [&b"PK\x01\x02\x14\x00"[..], &common, &[0; 16], name.as_bytes()].concat();
    zip.extend(&central);
    let size = (central.len() as u32).to_le_bytes();
    zip.extend([&b"PK\x05\x06\0\0\0\0\x01\0\x01\0"[..], &size, &start, &[0, 0]].concat());
    zip
}
