//! Cases as a table of medians and ratios, or as lines of JSON.

use crate::cases::{device, Case};
use crate::timing::alternate;
use candle_core::Result;

/// The command line `[FILTER] [--json]`.
pub fn print(cases: impl FnOnce(&str) -> Result<Vec<Case>>) -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let filter = args.iter().find(|a| !a.starts_with('-')).map_or("", String::as_str);
    let json = args.iter().any(|a| a == "--json");
    if !json {
        println!("{:?}", device().location());
        println!("{:<38} {:<24} {:>9} {:>9} {:>6}", "", "beside", "ours, ms", "ms", "ratio");
    }
    for mut case in cases(filter)? {
        for (name, other) in &mut case.others {
            let (ours, theirs) = alternate(&mut case.ours, other)?;
            let (group, ratio) = (&case.group, ours / theirs);
            match json {
                true => println!(
                    r#"{{"group": "{group}", "beside": "{name}", "ours": {ours}, "theirs": {theirs}}}"#
                ),
                false => println!("{group:<38} {name:<24} {ours:>9.3} {theirs:>9.3} {ratio:>6.3}"),
            }
        }
    }
    Ok(())
}
