//! `cargo bench --bench ratios [-- FILTER] [--json]`: this crate's layers beside what a user would
//! have without it, each pair run in turn, as medians in milliseconds and their ratio.

mod cases;
use candle_core::Result;
use cases::Run;
use std::time::Instant;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let filter = args.iter().find(|a| !a.starts_with('-')).map_or("", String::as_str);
    let json = args.iter().any(|a| a == "--json");
    if !json {
        println!("{:<38} {:<24} {:>9} {:>9} {:>6}", "", "beside", "ours, ms", "ms", "ratio");
    }
    for mut case in cases::cases(filter)? {
        for (name, other) in &mut case.others {
            let (ours, theirs) = alternate(&mut case.ours, other)?;
            match json {
                true => println!(
                    r#"{{"group": "{}", "beside": "{name}", "ours": {ours}, "theirs": {theirs}}}"#,
                    case.group
                ),
                false => println!(
                    "{:<38} {name:<24} {ours:>9.3} {theirs:>9.3} {:>6.3}",
                    case.group,
                    ours / theirs
                ),
            }
        }
    }
    Ok(())
}

fn time(run: &mut Run) -> Result<f64> {
    let start = Instant::now();
    run()?;
    Ok(start.elapsed().as_secs_f64() * 1e3)
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// Runs two things in turn for about four seconds; the median of each.
fn alternate(a: &mut Run, b: &mut Run) -> Result<(f64, f64)> {
    let warm_up = time(a)? + time(b)?;
    let runs = ((4000. / warm_up) as usize).clamp(7, 301);
    let (mut of_a, mut of_b) = (vec![], vec![]);
    for _ in 0..runs {
        of_a.push(time(a)?);
        of_b.push(time(b)?);
    }
    Ok((median(of_a), median(of_b)))
}
