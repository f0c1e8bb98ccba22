//! The results as pictures, each as SVG and as PNG.

pub mod data;
mod draw;

use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow};
use plotters::{
    coord::Shift,
    prelude::{BitMapBackend, DrawingArea, DrawingBackend, IntoDrawingArea, SVGBackend},
    style::{FontStyle, register_font},
};

use super::{measure::Target, results::Report};

/// One picture.
enum Picture {
    Bars(String, Vec<data::Panel>),
    Charts(String, Vec<data::Chart>),
}

impl Picture {
    /// Pixels.
    fn size(&self) -> (u32, u32) {
        match self {
            Self::Bars(_, panels) => draw::grid(panels.len()),
            Self::Charts(_, charts) if charts.len() == 1 => (1200, 700),
            Self::Charts(_, charts) => draw::grid(charts.len()),
        }
    }

    fn draw<B: DrawingBackend>(&self, area: &DrawingArea<B, Shift>) -> Result<()>
    where
        B::ErrorType: 'static,
    {
        match self {
            Self::Bars(title, panels) => draw::bars(area, title, panels),
            Self::Charts(title, charts) => draw::charts(area, title, charts),
        }
    }
}

/// Draws everything that the report has figures for; tells what it wrote.
///
/// # Errors
/// When a file cannot be written.
pub fn all(directory: &Path, report: &Report) -> Result<Vec<PathBuf>> {
    // From the program itself: a machine without fonts draws the same.
    register_font("sans-serif", FontStyle::Normal, dejavu::sans::regular())
        .map_err(|_| anyhow!("the font cannot be read"))?;
    let mut pictures = Vec::new();
    for (name, target, title) in [
        (
            "ratios",
            Target::Pod,
            "Speed, × kernel VXLAN (more is better)",
        ),
        (
            "ratios-service",
            Target::Service,
            "Speed through a ClusterIP, × kernel VXLAN",
        ),
    ] {
        let panels = data::ratios(report, target.name());
        if !panels.is_empty() {
            pictures.push((name, Picture::Bars(title.to_owned(), panels)));
        }
    }
    if let Some(chart) = data::distribution(report, "tcp_rr") {
        let title = chart.title.clone();
        pictures.push(("latency", Picture::Charts(title, vec![chart])));
    }
    let growth = data::growth(&report.growth);
    if !growth.is_empty() {
        let title = "What grows with the cluster".to_owned();
        pictures.push(("growth", Picture::Charts(title, growth)));
    }
    let mut written = Vec::new();
    for (name, picture) in pictures {
        let svg = directory.join(format!("{name}.svg"));
        let area = SVGBackend::new(&svg, picture.size()).into_drawing_area();
        picture.draw(&area)?;
        area.present()?;
        drop(area);
        let png = directory.join(format!("{name}.png"));
        let area = BitMapBackend::new(&png, picture.size()).into_drawing_area();
        picture.draw(&area)?;
        area.present()?;
        drop(area);
        written.extend([svg, png]);
    }
    Ok(written)
}
