//! Threads choose for themselves, while adapters come and go.

use super::{cfg, Served};
use crate::adapter::{randomize, Model};
use crate::common::bits;
use loralib::{Adapter, Result};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

#[test]
fn threads_use_other_adapters_at_the_same_time() -> Result<()> {
    let served = Served::new()?;
    let (served, stop) = (&served, &AtomicBool::new(false));
    thread::scope(|scope| {
        let runs = ["sql", "chat", "fused", "rslora"].map(|name| {
            scope.spawn(move || -> Result<()> {
                let forward = || bits(&served.adapters.with(name, || served.forward())?);
                let expected = forward()?;
                for _ in 0..100 {
                    assert_eq!(forward()?, expected, "{name}");
                }
                Ok(())
            })
        });
        let changes = scope.spawn(move || -> Result<usize> {
            let mut changes = 0;
            while !stop.load(Ordering::Relaxed) {
                let adapter = Adapter::new(cfg(2, 3.)).targets(["up_proj"]);
                served.adapters.add("passing", &adapter)?;
                served.adapters.with("passing", || served.forward())?;
                served.adapters.remove("passing")?;
                changes += 1;
            }
            Ok(changes)
        });
        let runs = runs.map(|run| run.join().unwrap());
        stop.store(true, Ordering::Relaxed);
        assert!(changes.join().unwrap()? > 0);
        runs.into_iter().collect()
    })
}

#[test]
fn a_forward_keeps_an_adapter_that_is_removed_meanwhile() -> Result<()> {
    let served = Served::new()?;
    let expected = bits(&served.adapters.with("sql", || served.forward())?)?;
    let y = served.adapters.with("sql", || {
        let removed = served.adapters.remove("sql")?;
        let other = Adapter::new(cfg(2, 3.)).targets(["qkv"]);
        served.adapters.add("sql", &other)?;
        randomize(&other)?;
        drop(removed);
        Result::Ok(served.forward()?)
    })?;
    assert_eq!(bits(&y)?, expected);
    assert_ne!(bits(&served.adapters.with("sql", || served.forward())?)?, expected);
    Ok(())
}

/// Documented: a choice is not inherited.
#[test]
fn threads_that_a_closure_starts_compute_with_the_base() -> Result<()> {
    let served = Served::new()?;
    let base = bits(&served.forward()?)?;
    let inside = || thread::scope(|scope| scope.spawn(|| served.forward()).join().unwrap());
    assert_eq!(bits(&served.adapters.with("sql", inside)?)?, base);
    Ok(())
}

#[test]
fn the_set_and_its_model_are_shared_by_threads() {
    fn shared<T: Send + Sync>() {}
    shared::<loralib::Adapters>();
    shared::<Model>();
}
