//! Drawing: bars in panels, lines in charts.

use anyhow::{Error, Result};
use plotters::{
    chart::ChartContext,
    coord::{Shift, types::RangedCoordf64},
    prelude::{
        Cartesian2d, ChartBuilder, Circle, DrawingArea, DrawingBackend, IntoLogRange, LineSeries,
        PathElement, Ranged, Rectangle, SeriesLabelPosition, Text,
    },
    style::{
        Color, IntoFont, RGBAColor, RGBColor, ShapeStyle, TextStyle,
        colors::{BLACK, TRANSPARENT, WHITE},
        text_anchor::{HPos, Pos, VPos},
    },
};

use super::data::{Bar, Chart, Line, Panel};
use crate::bench::markdown::number;

const GREY: RGBColor = RGBColor(120, 120, 120);
const PER_ROW: usize = 3;
/// What the bars are, below them all.
const READING: &str = "bar: median of all rounds; whisker: worst and best round, cut at twice the highest bar; line: kernel VXLAN, as flannel uses it; green and blue: eBPF";

/// Pixels of a picture with so many parts.
pub(super) fn grid(parts: usize) -> (u32, u32) {
    let rows = parts.div_ceil(PER_ROW) as u32;
    (500 * columns(parts) as u32, 110 + 400 * rows)
}

fn columns(parts: usize) -> usize {
    // A single one would be narrower than the title.
    parts.clamp(2, PER_ROW)
}

/// Colours that the colour-blind tell apart (Okabe and Ito), one for each known
/// side; others take what is left.
fn colour(side: &str, index: usize) -> RGBColor {
    match side {
        "host" => RGBColor(170, 170, 170),
        "host-nf" => RGBColor(110, 110, 110),
        "netlink" | "etcd" => RGBColor(213, 94, 0),
        "learned" => RGBColor(0, 158, 115),
        "flows" => RGBColor(86, 180, 233),
        "direct" | "directory" => RGBColor(0, 114, 178),
        "veth" => RGBColor(204, 121, 167),
        _ => [
            RGBColor(230, 159, 0),
            RGBColor(86, 180, 233),
            RGBColor(0, 0, 0),
        ][index % 3],
    }
}

fn text(size: i32, colour: RGBColor) -> TextStyle<'static> {
    let mut style = TextStyle::from(("sans-serif", size).into_font());
    style.color = colour.to_backend_color();
    style
}

fn centred(size: i32) -> TextStyle<'static> {
    text(size, BLACK).pos(Pos::new(HPos::Center, VPos::Bottom))
}

fn io<E: std::error::Error + Send + Sync + 'static>(error: E) -> Error {
    Error::new(error)
}

/// What is left of a picture below its title, and above so many pixels at its foot.
fn headed<B: DrawingBackend>(
    area: &DrawingArea<B, Shift>,
    title: &str,
    foot: i32,
) -> Result<DrawingArea<B, Shift>>
where
    B::ErrorType: 'static,
{
    let area = area.margin(14, foot, 0, 0);
    area.titled(title, text(28, BLACK)).map_err(io)
}

/// Room for so many parts, row by row.
fn parts<B: DrawingBackend>(
    area: &DrawingArea<B, Shift>,
    count: usize,
) -> Vec<DrawingArea<B, Shift>> {
    let columns = columns(count);
    area.split_evenly((count.div_ceil(columns), columns))
}

/// A title, then one panel of bars for each measure.
pub(super) fn bars<B: DrawingBackend>(
    area: &DrawingArea<B, Shift>,
    title: &str,
    panels: &[Panel],
) -> Result<()>
where
    B::ErrorType: 'static,
{
    area.fill(&WHITE).map_err(io)?;
    let (width, height) = area.dim_in_pixel();
    let below = text(15, GREY).pos(Pos::new(HPos::Center, VPos::Bottom));
    let place = (width as i32 / 2, height as i32 - 8);
    area.draw(&Text::new(READING, place, below)).map_err(io)?;
    let area = headed(area, title, 30)?;
    for (part, panel) in parts(&area, panels.len()).iter().zip(panels) {
        bars_of(part, panel)?;
    }
    Ok(())
}

fn bars_of<B: DrawingBackend>(area: &DrawingArea<B, Shift>, panel: &Panel) -> Result<()>
where
    B::ErrorType: 'static,
{
    let most = |of: fn(&Bar) -> f64| panel.bars.iter().map(of).fold(1.0, f64::max);
    // One bad round of the kernel path would make all bars small.
    let highest = most(|bar| bar.spread[1]).min(2.0 * most(|bar| bar.value));
    let top = highest * 1.18;
    let count = panel.bars.len() as f64;
    let mut chart = ChartBuilder::on(area)
        .caption(&panel.title, text(22, BLACK))
        .margin(12)
        .x_label_area_size(48)
        .y_label_area_size(48)
        .build_cartesian_2d(0.0..count, 0.0..top)
        .map_err(io)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .disable_x_axis()
        .y_labels(6)
        .light_line_style(WHITE)
        .bold_line_style(GREY.mix(0.25))
        .y_label_formatter(&|value| format!("{value:.1}"))
        .label_style(text(15, GREY))
        .draw()
        .map_err(io)?;
    let kernel = [(0.0, 1.0), (count, 1.0)];
    chart
        .draw_series([PathElement::new(kernel, GREY.stroke_width(2))])
        .map_err(io)?;
    for (index, bar) in panel.bars.iter().enumerate() {
        let left = index as f64;
        let middle = left + 0.5;
        let style = ShapeStyle::from(colour(&bar.side, index)).filled();
        let corners = [(left + 0.15, 0.0), (left + 0.85, bar.value)];
        chart
            .draw_series([Rectangle::new(corners, style)])
            .map_err(io)?;
        let [low, high] = bar.spread.map(|end| end.min(highest));
        let whisker = [
            vec![(middle, low), (middle, high)],
            vec![(middle - 0.08, low), (middle + 0.08, low)],
            vec![(middle - 0.08, high), (middle + 0.08, high)],
        ];
        chart
            .draw_series(whisker.map(|line| PathElement::new(line, BLACK.stroke_width(2))))
            .map_err(io)?;
        let above = (middle, high.max(bar.value) + top * 0.015);
        let value = Text::new(format!("{:.2}", bar.value), above, centred(18));
        chart.draw_series([value]).map_err(io)?;
        // Below the axis, which the plotting area itself does not reach.
        let (x, y) = chart.plotting_area().map_coordinate(&(middle, 0.0));
        let origin = area.get_base_pixel();
        for (line, size, colour, offset) in [
            (bar.side.as_str(), 16, BLACK, 8),
            (bar.kind(), 13, GREY, 27),
        ] {
            let below = (x - origin.0, y - origin.1 + offset);
            let style = text(size, colour).pos(Pos::new(HPos::Center, VPos::Top));
            area.draw(&Text::new(line.to_owned(), below, style))
                .map_err(io)?;
        }
    }
    Ok(())
}

/// A title, then all charts; a single one fills the picture.
pub(super) fn charts<B: DrawingBackend>(
    area: &DrawingArea<B, Shift>,
    title: &str,
    charts: &[Chart],
) -> Result<()>
where
    B::ErrorType: 'static,
{
    area.fill(&WHITE).map_err(io)?;
    let area = headed(area, title, 0)?;
    if let [only] = charts {
        return distribution(&area, only);
    }
    for (part, chart) in parts(&area, charts.len()).iter().zip(charts) {
        growth(part, chart)?;
    }
    Ok(())
}

fn distribution<B: DrawingBackend>(area: &DrawingArea<B, Shift>, data: &Chart) -> Result<()>
where
    B::ErrorType: 'static,
{
    let (_, right) = data.width();
    let mut chart = ChartBuilder::on(area)
        .margin(20)
        .x_label_area_size(60)
        .y_label_area_size(70)
        .build_cartesian_2d(0.0..right * 1.05, 0.0..100.0)
        .map_err(io)?;
    chart
        .configure_mesh()
        .light_line_style(WHITE)
        .bold_line_style(GREY.mix(0.25))
        .x_desc(&data.x)
        .y_desc(&data.y)
        .x_label_formatter(&|value| format!("{value:.0}"))
        .y_label_formatter(&|value| format!("{value:.0}"))
        .label_style(text(18, BLACK))
        .axis_desc_style(text(20, BLACK))
        .draw()
        .map_err(io)?;
    let look = Look {
        stroke: 4,
        dots: None,
        sample: 30,
        place: SeriesLabelPosition::LowerRight,
        area: 40,
        ground: 0.9,
        border: GREY.into(),
        text: 20,
    };
    lines(&mut chart, &data.lines, look)
}

fn growth<B: DrawingBackend>(area: &DrawingArea<B, Shift>, data: &Chart) -> Result<()>
where
    B::ErrorType: 'static,
{
    let (left, right) = data.width();
    let mut chart = ChartBuilder::on(area)
        .caption(format!("{}, {}", data.title, data.y), text(20, BLACK))
        .margin(14)
        .x_label_area_size(46)
        .y_label_area_size(64)
        .build_cartesian_2d((left..right * 1.3).log_scale(), 0.0..data.top() * 1.45)
        .map_err(io)?;
    chart
        .configure_mesh()
        .light_line_style(WHITE)
        .bold_line_style(GREY.mix(0.25))
        .x_desc(&data.x)
        .x_label_formatter(&|value| number(*value).replace(".00", "").replace(".0", ""))
        .y_label_formatter(&|value| number(*value))
        .y_labels(6)
        .label_style(text(15, BLACK))
        .axis_desc_style(text(16, BLACK))
        .draw()
        .map_err(io)?;
    let look = Look {
        stroke: 3,
        dots: Some(5),
        sample: 20,
        place: SeriesLabelPosition::UpperRight,
        area: 26,
        ground: 0.8,
        border: TRANSPARENT,
        text: 15,
    };
    lines(&mut chart, &data.lines, look)
}

/// How lines and their legend look.
struct Look {
    stroke: u32,
    /// Radius of the dots where something was measured.
    dots: Option<u32>,
    /// Length of a line in the legend, and the width that it has there.
    sample: i32,
    area: i32,
    place: SeriesLabelPosition,
    /// How much of the lines the legend hides.
    ground: f64,
    border: RGBAColor,
    /// Size of the names.
    text: i32,
}

/// The lines of a chart, and whose they are.
fn lines<'a, B: DrawingBackend + 'a, X: Ranged<ValueType = f64>>(
    chart: &mut ChartContext<'a, B, Cartesian2d<X, RangedCoordf64>>,
    lines: &[Line],
    look: Look,
) -> Result<()>
where
    B::ErrorType: 'static,
{
    for (index, line) in lines.iter().enumerate() {
        let colour = colour(&line.side, index);
        let style = colour.stroke_width(look.stroke);
        chart
            .draw_series(LineSeries::new(line.points.iter().copied(), style))
            .map_err(io)?
            .label(&line.name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + look.sample, y)], style));
        if let Some(radius) = look.dots {
            let dots = line.points.iter();
            chart
                .draw_series(dots.map(|point| Circle::new(*point, radius, colour.filled())))
                .map_err(io)?;
        }
    }
    chart
        .configure_series_labels()
        .position(look.place)
        .legend_area_size(look.area)
        .background_style(WHITE.mix(look.ground))
        .border_style(look.border)
        .label_font(text(look.text, BLACK))
        .draw()
        .map_err(io)
}
