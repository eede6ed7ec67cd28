//! The peak of this process's resident memory, where the system tells (Linux).

use std::fs;

/// In MiB, since the start or since [`reset`].
pub fn peak() -> Option<f64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: f64 = line.trim().trim_end_matches("kB").trim().parse().ok()?;
    Some(kib / 1024.)
}

/// Makes the present the peak. Without the right to do so, the old one stays.
pub fn reset() {
    let _ = fs::write("/proc/self/clear_refs", "5");
}
