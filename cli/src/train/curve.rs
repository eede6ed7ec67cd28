//! The losses of a run, over its steps.

use crate::Result;
use plotters::prelude::*;
use serde::{Deserialize, Serialize};
use std::path::Path;

#[derive(Default, Serialize, Deserialize)]
pub struct Curve {
    /// Steps done, and the loss of the last one's batches before it.
    pub training: Vec<(usize, f64)>,
    /// Steps done, and the loss on the examples to measure on.
    pub validation: Vec<(usize, f64)>,
}

impl Curve {
    /// The trained step with the lowest validation loss.
    pub fn best(&self) -> Option<(usize, f64)> {
        let trained = self.validation.iter().filter(|(step, _)| *step > 0);
        trained.min_by(|(_, a), (_, b)| a.total_cmp(b)).copied()
    }

    /// Draws both as an SVG file.
    pub fn draw(&self, file: &Path) -> Result<()> {
        self.draw_svg(file).map_err(|e| format!("{}: {e}", file.display()).into())
    }

    fn draw_svg(&self, file: &Path) -> Result<()> {
        let root = SVGBackend::new(file, (640, 400)).into_drawing_area();
        root.fill(&WHITE)?;
        let points = || self.training.iter().chain(&self.validation);
        let last = points().map(|(step, _)| *step).max().unwrap_or(1);
        let highest = points().map(|(_, loss)| *loss).fold(0., f64::max);
        let mut chart = ChartBuilder::on(&root)
            .margin(10)
            .x_label_area_size(34)
            .y_label_area_size(48)
            .build_cartesian_2d(0..last, 0.0..highest * 1.05)?;
        let mut mesh = chart.configure_mesh();
        mesh.x_desc("step").y_desc("loss").light_line_style(TRANSPARENT).draw()?;
        let lines = [
            ("training, a step's batches", &self.training, RGBColor(170, 190, 210), 0),
            ("validation", &self.validation, RGBColor(217, 95, 2), 3),
        ];
        for (label, line, color, points) in lines {
            let series = LineSeries::new(line.iter().copied(), color.stroke_width(2));
            chart.draw_series(series.point_size(points))?.label(label).legend(move |(x, y)| {
                PathElement::new([(x, y), (x + 16, y)], color.stroke_width(2))
            });
        }
        let mut labels = chart.configure_series_labels();
        labels.position(SeriesLabelPosition::UpperRight).background_style(WHITE.mix(0.8)).draw()?;
        Ok(root.present()?)
    }
}
