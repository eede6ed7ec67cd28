//! How the time of a training step and its memory grow, as a plot.

use super::training::{Figures, Size, METHODS};
use super::{measured, usual};
use plotters::prelude::*;
use std::error::Error;

/// What varies, its values, and the size for each.
type Sweep = (&'static str, &'static [usize], fn(usize) -> Size);

const SWEEPS: [Sweep; 3] = [
    ("rank", &[4, 8, 16, 32, 64, 128, 256], |rank| Size { rank, ..usual() }),
    ("layers", &[1, 2, 4, 8, 12, 16], |layers| Size { layers, ..usual() }),
    ("batch × length", &[64, 128, 256, 512, 1024], |rows| Size { rows, ..usual() }),
];

type Figure = (&'static str, fn(&Figures) -> f64);

const FIGURES: [Figure; 2] = [("step, ms", |f| f.step), ("peak memory, MiB", |f| f.peak)];

const COLORS: [RGBColor; 3] =
    [RGBColor(120, 120, 120), RGBColor(217, 95, 2), RGBColor(27, 120, 190)];

/// Measures, prints the figures and draws them: a column for what varies, a row for each figure.
pub fn growth(file: &str) -> Result<(), Box<dyn Error>> {
    let root = SVGBackend::new(file, (960, 520)).into_drawing_area();
    root.fill(&WHITE)?;
    let Size { layers, dim, rows, rank, .. } = usual();
    let usual = format!("{layers} layers of {dim}, r {rank}, batch × length {rows}");
    let title = format!("A training step; where not varied, {usual}");
    let areas = root.titled(&title, ("sans-serif", 15))?.split_evenly((2, SWEEPS.len()));
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
            let lines = (0..METHODS.len())
                .map(|i| values.iter().zip(&found).map(|(x, f)| (*x, figure(&f[i]))).collect());
            let area = &areas[row * SWEEPS.len() + column];
            // Where the lines leave room for it.
            draw(area, what, label, lines.collect(), *what == "layers")?;
        }
    }
    Ok(root.present()?)
}

type Line = Vec<(usize, f64)>;

fn draw(
    area: &DrawingArea<SVGBackend, plotters::coord::Shift>,
    what: &str,
    label: &str,
    lines: Vec<Line>,
    legend: bool,
) -> Result<(), Box<dyn Error>> {
    let points = || lines.iter().flatten();
    let highest = points().map(|(_, y)| *y).fold(0., f64::max);
    let from = points().map(|(x, _)| *x).min().unwrap_or(1);
    let to = points().map(|(x, _)| *x).max().unwrap_or(1);
    let mut chart = ChartBuilder::on(area)
        .margin(8)
        .x_label_area_size(34)
        .y_label_area_size(52)
        .build_cartesian_2d((from as f64..to as f64).log_scale().base(2.), 0.0..highest * 1.08)?;
    let mut mesh = chart.configure_mesh();
    mesh.x_desc(what).y_desc(label).x_labels(8).y_labels(6).light_line_style(TRANSPARENT);
    mesh.x_label_formatter(&|x| x.round().to_string());
    mesh.y_label_formatter(&|y| y.round().to_string()).draw()?;
    for ((line, method), color) in lines.into_iter().zip(METHODS).zip(COLORS) {
        let line = line.into_iter().map(|(x, y)| (x as f64, y));
        chart
            .draw_series(LineSeries::new(line, color.stroke_width(2)).point_size(3))?
            .label(method.name())
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], color.stroke_width(2)));
    }
    if legend {
        let mut labels = chart.configure_series_labels();
        labels.position(SeriesLabelPosition::UpperLeft).background_style(WHITE.mix(0.8)).draw()?;
    }
    Ok(())
}
