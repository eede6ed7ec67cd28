//! Files that are not what they should be: an error that names the file, never a panic, never
//! memory beyond a small multiple of the file; and a writer that is killed at any moment.

use candle_core::{DType, Device, Tensor};
use lora::peft;
use lora::{LoraConfig, StateDict};
use loralib as lora;
use std::alloc::{GlobalAlloc, Layout, System};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Mutex;
use std::time::Duration;

const CPU: Device = Device::Cpu;

/// Remembers the largest single allocation.
struct Largest;
static LARGEST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator as it is.
unsafe impl GlobalAlloc for Largest {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LARGEST.fetch_max(layout.size(), Ordering::Relaxed);
        System.alloc(layout)
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        LARGEST.fetch_max(layout.size(), Ordering::Relaxed);
        System.alloc_zeroed(layout)
    }
    unsafe fn realloc(&self, p: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        LARGEST.fetch_max(size, Ordering::Relaxed);
        System.realloc(p, layout, size)
    }
    unsafe fn dealloc(&self, p: *mut u8, layout: Layout) {
        System.dealloc(p, layout);
    }
}

#[global_allocator]
static ALLOCATOR: Largest = Largest;

/// The tests measure what the process allocates: one at a time.
static ONE: Mutex<()> = Mutex::new(());

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 20) as usize % n.max(1)
    }
}

/// Every truncation, then random damage: bits, bytes, words of 0xff, pieces that are removed, doubled
/// or put elsewhere.
fn mutants(good: &[u8], random: usize, mut try_one: impl FnMut(&[u8])) -> usize {
    let step = good.len().div_ceil(5000);
    let mut count = 0;
    for end in (0..good.len()).step_by(step) {
        try_one(&good[..end]);
        count += 1;
    }
    let mut r = Random(0x5EED);
    for _ in 0..random {
        let mut bad = good.to_vec();
        for _ in 0..1 + r.below(3) {
            // Headers are at the ends of a file.
            let near = match r.below(3) {
                0 => r.below(64.min(bad.len())),
                1 => bad.len() - 1 - r.below(400.min(bad.len())),
                _ => r.below(bad.len()),
            };
            let n = (1 + r.below(16)).min(bad.len() - near);
            let other = r.below(bad.len() - n + 1);
            match r.below(7) {
                0 => bad[near] ^= 1 << r.below(8),
                1 => bad[near] = r.below(256) as u8,
                2 => bad[near..near + n].fill(0xff),
                3 => bad[near..near + n].fill(b'9'),
                4 => drop(bad.drain(near..near + n)),
                5 => bad.copy_within(near..near + n, other),
                _ => {
                    let piece = bad[near..near + n].to_vec();
                    bad.splice(other..other, piece);
                }
            }
            if bad.is_empty() {
                bad.push(0);
            }
        }
        try_one(&bad);
        count += 1;
    }
    count
}

/// A new file: some file systems flush one that is written over.
fn rewrite(path: &Path, bytes: &[u8]) {
    fs::remove_file(path).unwrap();
    fs::write(path, bytes).unwrap();
}

/// Reads each mutant with `read`; the error must name the file. Gives how many were errors.
fn damage(
    good: &Path,
    bad: &Path,
    random: usize,
    read: impl Fn() -> lora::Result<()>,
) -> (usize, usize) {
    let bytes = fs::read(good).unwrap();
    fs::write(bad, &bytes).unwrap();
    read().unwrap();
    let (mut errors, mut largest) = (0, 0);
    let count = mutants(&bytes, random, |mutant| {
        rewrite(bad, mutant);
        LARGEST.store(0, Ordering::Relaxed);
        if let Err(error) = read() {
            let (error, name) = (error.to_string(), bad.file_name().unwrap().to_str().unwrap());
            assert!(error.contains(name), "{error}");
            errors += 1;
        }
        largest = largest.max(LARGEST.load(Ordering::Relaxed));
    });
    println!("{}: {count} mutants, {errors} errors, {largest} bytes at once", good.display());
    // zip has a table of 64 KiB for the end of an archive.
    assert!(largest < 8 * bytes.len() + (1 << 18), "{largest} bytes for a file of {}", bytes.len());
    (count, errors)
}

#[test]
fn a_damaged_file_is_an_error_and_no_panic() {
    let _one = ONE.lock();
    let dir = tempfile::tempdir().unwrap();
    let bad = dir.path().join("bad.file");
    let read = || lora::read_state_dict(&bad, &CPU).map(drop);
    let (mut count, mut errors) = (0, 0);
    for (good, random) in [
        ("torch/loralib_all.pt", 1500),
        ("torch/good.pt", 1500),
        ("torch/loralib_all.safetensors", 1500),
    ] {
        let (all, wrong) = damage(&fixture(good), &bad, random, read);
        (count, errors) = (count + all, errors + wrong);
    }
    for case in ["pattern", "modules", "conv"] {
        for file in ["adapter_config.json", "adapter_model.safetensors"] {
            let dir = tempfile::tempdir().unwrap();
            for file in ["adapter_config.json", "adapter_model.safetensors"] {
                fs::copy(fixture(&format!("peft/{case}/{file}")), dir.path().join(file)).unwrap();
            }
            let read = || peft::load_pretrained(dir.path(), &CPU).map(drop);
            let good = fixture(&format!("peft/{case}/{file}"));
            let json = dir.path().join("adapter_config.json");
            let bytes = fs::read(&good).unwrap();
            let bad = dir.path().join(file);
            let mut wrong = 0;
            let all = mutants(&bytes, 400, |mutant| {
                rewrite(&bad, mutant);
                LARGEST.store(0, Ordering::Relaxed);
                if let Err(error) = read() {
                    assert!(error.to_string().contains("adapter_"), "{error}");
                    wrong += 1;
                }
                let largest = LARGEST.load(Ordering::Relaxed);
                assert!(largest < (8 * bytes.len()) + (1 << 18), "{largest} bytes");
            });
            assert!(json.exists());
            (count, errors) = (count + all, errors + wrong);
        }
    }
    println!("{count} mutants, {errors} errors");
    assert!(count >= 10_000 && errors > count / 2, "{count} {errors}");
}

/// Built by hand: what a random change seldom makes.
#[test]
fn a_hostile_file_is_an_error() {
    let _one = ONE.lock();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("hostile.pt");
    let nested = [&b"\x80\x02)"[..], &[0x85; 200_000], b"."].concat();
    let doubled = [&b"\x80\x02)q\x00"[..], &b"h\x00h\x00\x86q\x00".repeat(500), b"."].concat();
    let calls: &[u8] = b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.";
    let endless: &[u8] = b"\x80\x02X\xff\xff\xff\xffabc";
    let few = b"\x80\x02}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n)Rs.";
    for pickle in
        [&nested[..], &doubled, calls, endless, few, b"\x80\x02", b".", b"u.", b"s.", b"R."]
    {
        fs::write(&path, stored_zip("a/data.pkl", pickle)).unwrap();
        LARGEST.store(0, Ordering::Relaxed);
        let error = lora::read_state_dict(&path, &CPU).unwrap_err().to_string();
        assert!(error.contains("hostile.pt"), "{error}");
        let largest = LARGEST.load(Ordering::Relaxed);
        assert!(largest < 64 * pickle.len() + (1 << 18), "{largest} bytes for {}", pickle.len());
    }
    let shapes = [
        r#"{"a":{"dtype":"F32","shape":[0,9223372036854775807,8],"data_offsets":[0,0]}}"#,
        r#"{"a":{"dtype":"F32","shape":[18446744073709551615],"data_offsets":[0,0]}}"#,
        r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,18446744073709551615]}}"#,
        r#"{"a":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}"#,
        "{}",
    ];
    for header in shapes {
        let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat();
        fs::write(&path, bytes).unwrap();
        let read = lora::read_state_dict(&path, &CPU);
        assert!(read.is_err() || header == "{}", "{header}");
        let adapter =
            StateDict::from([("a.lora_A".into(), Tensor::zeros(1, DType::F32, &CPU).unwrap())]);
        let out = dir.path().join("out");
        assert!(lora::merge_files(&path, &adapter, LoraConfig::default(), &out, |_| {}).is_err());
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

const FOLDER: &str = "LORALIB_TEST_WRITER_FOLDER";
const ROUND: &str = "LORALIB_TEST_WRITER_ROUND";

fn adapter(value: f32) -> StateDict {
    let full = |dims: [usize; 2]| Tensor::full(value, &dims[..], &CPU).unwrap();
    [("q.lora_A".to_owned(), full([2, 20_000])), ("q.lora_B".to_owned(), full([20_000, 2]))].into()
}

/// Not a test of its own: what the next one starts, and kills.
#[test]
fn writer() {
    let Some(folder) = std::env::var_os(FOLDER).map(PathBuf::from) else { return };
    let round: usize = std::env::var(ROUND).unwrap().parse().unwrap();
    for i in round * 1000 + 1.. {
        // Some saves change the configuration, others only the tensors.
        let cfg = LoraConfig { r: 2, lora_alpha: i as f64, ..Default::default() };
        let adapter = adapter(i as f32);
        match round % 3 {
            0 => lora::save_state_dict(&adapter, &cfg, folder.join("adapter.safetensors")).unwrap(),
            1 => peft::save_pretrained(folder.join("peft"), &adapter, cfg).unwrap(),
            _ => {
                let cfg = LoraConfig { lora_alpha: 0., ..cfg };
                peft::save_pretrained(folder.join("same"), &adapter, cfg).unwrap();
            }
        }
    }
}

#[test]
fn a_kill_at_any_moment_leaves_the_old_file_or_the_new_one() {
    let _one = ONE.lock();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("adapter.safetensors");
    let cfg = LoraConfig { r: 2, lora_alpha: 0., ..Default::default() };
    lora::save_state_dict(&adapter(0.), &cfg, &file).unwrap();
    for folder in ["peft", "same"] {
        peft::save_pretrained(dir.path().join(folder), &adapter(0.), cfg).unwrap();
    }
    let (mut r, mut saved_by, mut unfinished) = (Random(7), BTreeSet::new(), 0);
    let mut complete = true;
    let same = |tensors: &StateDict, alpha: f64| {
        for t in tensors.values() {
            let t = t.flatten_all().unwrap();
            let (low, high) = (t.min(0).unwrap(), t.max(0).unwrap());
            let ends = [low, high].map(|v| f64::from(v.to_scalar::<f32>().unwrap()));
            assert_eq!(ends, [alpha; 2]);
        }
    };
    for round in 0..300 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["writer", "--exact", "--test-threads=1"])
            .env(FOLDER, dir.path())
            .env(ROUND, round.to_string())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_micros(2_000 + r.below(40_000) as u64));
        child.kill().unwrap();
        child.wait().unwrap();
        let saved = lora::read_state_dict(&file, &CPU).unwrap();
        let alpha = saved.config.unwrap().lora_alpha;
        same(&saved.tensors, alpha);
        saved_by.insert(alpha as usize / 1000);
        let (_, tensors) = peft::load_pretrained(dir.path().join("same"), &CPU).unwrap();
        let value = tensors["q.lora_A"].flatten_all().unwrap().get(0).unwrap();
        let value = f64::from(value.to_scalar::<f32>().unwrap());
        same(&tensors, value);
        saved_by.insert(value as usize / 1000);
        match peft::load_pretrained(dir.path().join("peft"), &CPU) {
            Ok((config, tensors)) => {
                same(&tensors, config.lora.lora_alpha);
                saved_by.insert(config.lora.lora_alpha as usize / 1000);
                complete = true;
            }
            // Between two configurations there is none, and nothing to load.
            Err(error) => {
                assert!(!dir.path().join("peft/adapter_config.json").exists(), "{error}");
                unfinished += usize::from(complete);
                complete = false;
            }
        }
    }
    let left = fs::read_dir(dir.path()).unwrap().count() - 3;
    println!(
        "300 kills: {} writers got to the end of a save, {left} temporary files left by the others, \
         {unfinished} folders without a configuration",
        saved_by.len()
    );
    assert!(saved_by.len() > 30, "{}", saved_by.len());
}
