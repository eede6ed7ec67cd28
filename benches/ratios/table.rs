//! Cases as a table of medians and ratios, or this crate's own times as lines of JSON.

use crate::cases::{device, Case};
use crate::timing::{alone, alternate};
use candle_core::{bail, Result};

/// The command line `[FILTER] [--json]`.
pub fn print(cases: impl FnOnce(&str) -> Result<Vec<Case>>) -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let filter = args.iter().find(|a| !a.starts_with('-')).map_or("", String::as_str);
    let cases = cases(filter)?;
    if cases.is_empty() {
        bail!("no case begins with {filter:?}")
    }
    match args.iter().any(|a| a == "--json") {
        true => json(cases),
        false => table(cases),
    }
}

fn table(cases: Vec<Case>) -> Result<()> {
    println!("{:?}", device().location());
    println!("{:<38} {:<24} {:>9} {:>9} {:>6}", "", "beside", "ours, ms", "ms", "ratio");
    for mut case in cases {
        for (name, other) in &mut case.others {
            let (ours, theirs) = alternate(&mut case.ours, other)?;
            let ratio = ours / theirs;
            println!("{:<38} {name:<24} {ours:>9.3} {theirs:>9.3} {ratio:>6.3}", case.group);
        }
    }
    Ok(())
}

fn json(cases: Vec<Case>) -> Result<()> {
    for mut case in cases {
        println!(r#"{{"group": "{}", "ms": {}}}"#, case.group, alone(&mut case.ours)?);
    }
    Ok(())
}
