//! How the time of a training step and its memory grow, as an SVG file.

use super::training::{Figures, Size, METHODS};
use super::{measured, usual};
use std::error::Error;
use std::fs;

/// What varies, its values, and the size for each.
type Sweep = (&'static str, &'static [usize], fn(usize) -> Size);

const SWEEPS: [Sweep; 3] = [
    ("rank", &[4, 8, 16, 32, 64, 128, 256], |rank| Size { rank, ..usual() }),
    ("layers", &[1, 2, 4, 8, 12, 16], |layers| Size { layers, ..usual() }),
    ("batch × length", &[64, 128, 256, 512, 1024], |rows| Size { rows, ..usual() }),
];

type Figure = (&'static str, fn(&Figures) -> f64);

const FIGURES: [Figure; 2] = [("step, ms", |f| f.step), ("peak memory, MiB", |f| f.peak)];

const COLORS: [&str; 3] = ["#787878", "#d95f02", "#1b77be"];

/// Measures, prints the figures and draws them: a column for what varies, a row for each figure.
pub fn growth(file: &str) -> Result<(), Box<dyn Error>> {
    let Size { layers, dim, rows, rank, .. } = usual();
    let mut svg = format!(
        "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 960 520' font-family='sans-serif' font-size='12'>\n\
         <rect width='960' height='520' fill='white'/>\n<text x='20' y='20'>A training step; where not varied, \
         {layers} layers of {dim}, r {rank}, batch × length {rows}</text>\n"
    );
    for (i, (method, color)) in METHODS.iter().zip(COLORS).enumerate() {
        let (x, name) = (560 + 130 * i, method.name());
        svg += &format!("<text x='{x}' y='20' fill='{color}'>{name}</text>\n");
    }
    for (column, (what, values, size)) in SWEEPS.iter().enumerate() {
        let mut found = vec![];
        for value in *values {
            found.push(measured(size(*value))?);
            for (method, f) in METHODS.iter().zip(&found[found.len() - 1]) {
                let name = method.name();
                println!("{what} {value}: {name}: {:.1} ms, {:.1} MiB", f.step, f.peak);
            }
        }
        for (row, (label, figure)) in FIGURES.iter().enumerate() {
            let lines = [0, 1, 2].map(|i| found.iter().map(|f| figure(&f[i])).collect());
            svg += &format!("<g transform='translate({}, {})'>\n", column * 320, 40 + row * 240);
            svg += &panel(what, values, label, lines);
            svg += "</g>\n";
        }
    }
    Ok(fs::write(file, svg + "</svg>\n")?)
}

/// A line for each method, over the logarithm of what varies.
fn panel(what: &str, values: &[usize], label: &str, lines: [Vec<f64>; 3]) -> String {
    let highest = lines.iter().flatten().fold(0., |a: f64, b| a.max(*b));
    let log = |value: usize| (value as f64 / values[0] as f64).ln();
    let x = |value| 50. + 250. * log(value) / log(values[values.len() - 1]);
    let y = |figure: f64| 190. - 170. * figure / highest;
    let mut svg = format!(
        "<path d='M50 20V190H300' fill='none' stroke='black'/>\n<text x='50' y='14'>{label}</text>\n\
         <text x='175' y='224' text-anchor='middle'>{what}</text>\n\
         <text x='44' y='194' text-anchor='end'>0</text>\n\
         <text x='44' y='24' text-anchor='end'>{highest:.0}</text>\n"
    );
    for value in values {
        let x = x(*value);
        svg += &format!("<text x='{x:.1}' y='206' text-anchor='middle'>{value}</text>\n");
    }
    for (line, color) in lines.iter().zip(COLORS) {
        let points = values.iter().zip(line).map(|(v, f)| format!("{:.1},{:.1}", x(*v), y(*f)));
        let points = points.collect::<Vec<_>>().join(" ");
        svg += &format!(
            "<polyline points='{points}' fill='none' stroke='{color}' stroke-width='2'/>\n"
        );
    }
    svg
}
