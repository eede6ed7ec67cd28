//! The norms of the updates as bars.

use crate::Result;
use plotters::prelude::*;
use std::path::Path;

/// The width of the longest bar in a terminal.
const WIDTH: f64 = 40.;

/// Lines with a bar each.
pub fn text(norms: &[(String, f64)]) -> String {
    let largest = norms.iter().map(|(_, norm)| *norm).fold(0., f64::max);
    let names = norms.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
    let bar = |(name, norm): &(String, f64)| {
        let eighths = (norm / largest.max(f64::MIN_POSITIVE) * WIDTH * 8.).round() as usize;
        let last = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"][eighths % 8];
        let bar = "█".repeat(eighths / 8) + last;
        format!("{name:names$}  {bar:width$}  {norm:.4}\n", width = WIDTH as usize)
    };
    norms.iter().map(bar).collect()
}

/// An SVG file with a bar for each.
pub fn svg(norms: &[(String, f64)], file: &Path) -> Result<()> {
    draw(norms, file).map_err(|e| format!("{}: {e}", file.display()).into())
}

fn draw(norms: &[(String, f64)], file: &Path) -> Result<()> {
    let height = 60 + 16 * norms.len() as u32;
    let root = SVGBackend::new(file, (640, height)).into_drawing_area();
    root.fill(&WHITE)?;
    let largest = norms.iter().map(|(_, norm)| *norm).fold(f64::MIN_POSITIVE, f64::max);
    let n = norms.len();
    let mut chart = ChartBuilder::on(&root)
        .margin(10)
        .x_label_area_size(34)
        .y_label_area_size(190)
        .build_cartesian_2d(0.0..largest * 1.05, (0..n).into_segmented())?;
    let name = |at: &SegmentValue<usize>| match at {
        SegmentValue::CenterOf(i) => {
            norms.get(n - 1 - i.min(&(n - 1))).map_or("", |(name, _)| name)
        }
        _ => "",
    };
    let label = |at: &SegmentValue<usize>| name(at).to_owned();
    let mut mesh = chart.configure_mesh();
    mesh.x_desc("norm of the update").y_labels(n).y_label_formatter(&label);
    mesh.light_line_style(TRANSPARENT).disable_y_mesh().draw()?;
    chart.draw_series(norms.iter().rev().enumerate().map(|(i, (_, norm))| {
        let (from, to) = (SegmentValue::Exact(i), SegmentValue::Exact(i + 1));
        let mut bar = Rectangle::new([(0., from), (*norm, to)], RGBColor(217, 95, 2).filled());
        bar.set_margin(2, 2, 0, 0);
        bar
    }))?;
    Ok(root.present()?)
}
