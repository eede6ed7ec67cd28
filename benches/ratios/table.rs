//! Cases as a table of medians and ratios, or one at a time as another program asks.

use crate::cases::{device, Case};
use crate::timing::{alternate, burst};
use candle_core::{bail, Result};

/// The command line `[FILTER] [--ask]`.
pub fn print(cases: impl FnOnce(&str) -> Result<Vec<Case>>) -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let filter = args.iter().find(|a| !a.starts_with('-')).map_or("", String::as_str);
    let cases = cases(filter)?;
    if cases.is_empty() {
        bail!("no case begins with {filter:?}")
    }
    match args.iter().any(|a| a == "--ask") {
        true => answer(cases),
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

/// For each line of the input, a case's name, a line with this crate's milliseconds.
fn answer(mut cases: Vec<Case>) -> Result<()> {
    for name in std::io::stdin().lines() {
        let name = name?;
        let Some(case) = cases.iter_mut().find(|case| case.group == name) else {
            bail!("no case {name:?}")
        };
        println!("{}", burst(&mut case.ours)?);
    }
    Ok(())
}
