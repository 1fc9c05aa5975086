//! One chart as SVG: two axes, linear or logarithmic, with points, lines and a legend. Colours are CSS variables, so that
//! the page's theme decides; every mark tells its numbers in a `<title>`.

use maud::{Markup, html};

/// Colours and text of charts; also part of the page's style.
pub const STYLE: &str = include_str!("chart.css");
/// Colours before they repeat; after that the marks' shapes tell lines apart.
pub const COLOURS: usize = 8;
/// Kinds of dashes before they repeat; the first is without.
const DASHES: usize = 4;
/// Width of every chart, in SVG units: about that of a phone.
pub const WIDTH: f64 = 380.0;
const PLOT_HEIGHT: f64 = 214.0;
const LEFT: f64 = 52.0;
const RIGHT: f64 = 14.0;
const TOP: f64 = 12.0;
const LEGEND_LINE: f64 = 18.0;
/// Between the marks and the ends of the axes.
const ROOM: f64 = 6.0;
/// Mean width of a letter of the legend.
const LETTER: f64 = 6.1;
const LONGEST_LABEL: usize = 30;

/// An axis.
#[derive(Debug, Clone)]
pub struct Axis {
    /// What it shows.
    pub label: String,
    /// Logarithmic; values that are not positive are left out.
    pub log: bool,
}

/// A point.
#[derive(Debug, Clone)]
pub struct Mark {
    /// Along the horizontal axis.
    pub x: f64,
    /// Along the vertical axis.
    pub y: f64,
    /// In SVG units.
    pub radius: f64,
    /// Ends of a bar through it.
    pub bar: Option<(f64, f64)>,
    /// Told when pointed at.
    pub title: String,
    /// What the page's script opens when it is pressed: method, step and scale.
    pub opens: Option<String>,
}

/// What joins the marks of a series.
#[derive(Debug, Clone)]
pub enum Line {
    /// Nothing.
    None,
    /// A line from each to the next.
    Marks,
    /// A line of its own, through these places.
    Through(Vec<(f64, f64)>),
}

/// Marks of one colour.
#[derive(Debug, Clone)]
pub struct Series {
    /// In the legend.
    pub label: String,
    /// Which colour and shape; `None` is grey, for the base model.
    pub number: Option<usize>,
    /// In order.
    pub marks: Vec<Mark>,
    /// What joins them.
    pub line: Line,
    /// Small dots behind them, such as each seed's.
    pub dots: Vec<(f64, f64)>,
}

/// A chart.
#[derive(Debug, Clone)]
pub struct Chart {
    /// For readers who hear it, and for its heading.
    pub title: String,
    /// Horizontal.
    pub x: Axis,
    /// Vertical.
    pub y: Axis,
    /// What is shown.
    pub series: Vec<Series>,
    /// A vertical line with its label.
    pub rule: Option<(f64, String)>,
}

/// From values to places on the paper.
struct Scale {
    log: bool,
    low: f64,
    high: f64,
    from: f64,
    to: f64,
}

impl Scale {
    /// Marks stay `room` units away from the ends.
    fn new(axis: &Axis, values: impl Iterator<Item = f64>, [from, to]: [f64; 2], room: f64) -> Option<Self> {
        let values: Vec<f64> = values.filter(|v| v.is_finite() && (!axis.log || *v > 0.0)).collect();
        let value = |v: f64| if axis.log { v.log10() } else { v };
        let low = value(values.iter().copied().reduce(f64::min)?);
        let high = value(values.iter().copied().reduce(f64::max)?);
        let room = match (high - low, axis.log) {
            (range, _) if range > 0.0 => range * room / ((to - from).abs() - 2.0 * room),
            (_, true) => 0.3,
            _ => (low.abs() * 0.05).max(1e-3),
        };
        let (low, high) = (low - room, high + room);
        (low.is_finite() && high.is_finite() && high > low).then_some(Self {
            log: axis.log,
            low,
            high,
            from,
            to,
        })
    }

    fn place(&self, value: f64) -> Option<f64> {
        let value = if self.log { value.log10() } else { value };
        let share = (value - self.low) / (self.high - self.low);
        share.is_finite().then_some(self.from + share * (self.to - self.from))
    }

    fn ticks(&self) -> Vec<(f64, String)> {
        if !self.log {
            return linear_ticks(self.low, self.high);
        }
        match self.log_ticks() {
            // No two round numbers lie in so short a piece of the axis.
            few if few.len() < 2 => linear_ticks(10f64.powf(self.low), 10f64.powf(self.high)),
            ticks => ticks,
        }
    }

    fn log_ticks(&self) -> Vec<(f64, String)> {
        let decades = self.low.floor() as i32..=self.high.ceil() as i32;
        let many = self.high - self.low;
        let factors: &[f64] = match many {
            m if m > 2.5 => &[1.0],
            m if m > 1.2 => &[1.0, 3.0],
            _ => &[1.0, 2.0, 5.0],
        };
        let every = (many / 6.0).ceil().max(1.0) as i32;
        let inside = |v: &f64| (self.low..=self.high).contains(&v.log10());
        let powers =
            decades.filter(|d| d % every == 0).flat_map(|d| factors.iter().map(move |f| f * 10f64.powi(d)));
        powers.filter(inside).map(|v| (v, short(v))).collect()
    }
}

/// Round numbers at equal distances.
fn linear_ticks(low: f64, high: f64) -> Vec<(f64, String)> {
    let rough = (high - low) / 4.0;
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].map(|m| m * power).into_iter().find(|s| *s >= rough).unwrap_or(rough);
    let digits = (-step.log10().floor()).clamp(0.0, 12.0) as usize;
    let first = (low / step).ceil() as i64;
    let last = (high / step).floor() as i64;
    (first..=last.min(first.saturating_add(10)))
        .map(|i| i as f64 * step)
        .map(|v| (v, if digits == 0 { short(v) } else { format!("{v:.digits$}") }))
        .collect()
}

/// `1200` as `1.2k`, `0.0001` as `1e-4`.
fn short(value: f64) -> String {
    let size = value.abs();
    let trim = |v: f64, unit: &str| format!("{}{unit}", (v * 100.0).round() / 100.0);
    match size {
        s if s >= 1e9 => format!("{value:.0e}"),
        s if s >= 1e6 => trim(value / 1e6, "M"),
        s if s >= 1e4 => trim(value / 1e3, "k"),
        s if s >= 0.01 || s == 0.0 => trim(value, ""),
        _ => format!("{value:.0e}"),
    }
}

impl Chart {
    /// Whether there is nothing to draw.
    pub fn is_empty(&self) -> bool {
        self.scales().is_none()
    }

    /// Height in SVG units, the legend and the heading with it.
    fn height(&self) -> f64 {
        TOP + PLOT_HEIGHT + 40.0 + self.legend_lines().len() as f64 * LEGEND_LINE + 4.0
    }

    fn scales(&self) -> Option<(Scale, Scale)> {
        let marks = || self.series.iter().flat_map(|s| &s.marks);
        let dots = || self.series.iter().flat_map(|s| &s.dots);
        let bars = || marks().filter_map(|m| m.bar).flat_map(|(low, high)| [low, high]);
        let xs = marks().map(|m| m.x).chain(dots().map(|d| d.0)).chain(self.rule.iter().map(|r| r.0));
        let ys = marks().map(|m| m.y).chain(dots().map(|d| d.1)).chain(bars());
        // The largest circle lies within the axes too.
        let room = ROOM + marks().map(|m| m.radius).fold(0.0, f64::max);
        let x = Scale::new(&self.x, xs, [LEFT, WIDTH - RIGHT], room)?;
        let y = Scale::new(&self.y, ys, [TOP + PLOT_HEIGHT, TOP], room)?;
        Some((x, y))
    }

    /// The whole chart as an SVG element of a page.
    pub fn svg(&self) -> Markup {
        html! {
            svg .chart role="img" xmlns="http://www.w3.org/2000/svg" viewBox={ "0 0 " (WIDTH) " " (n(self.height())) }
                aria-label=(self.title) { (self.drawing()) }
        }
    }

    fn drawing(&self) -> Markup {
        let Some((x, y)) = self.scales() else { return html! {} };
        let (bottom, right) = (TOP + PLOT_HEIGHT, WIDTH - RIGHT);
        html! {
            @for (value, label) in y.ticks() {
                @if let Some(at) = y.place(value) {
                    line .grid x1=(n(LEFT)) x2=(n(right)) y1=(n(at)) y2=(n(at)) {}
                    text .tick x=(n(LEFT - 6.0)) y=(n(at + 4.0)) text-anchor="end" { (label) }
                }
            }
            @for (value, label) in x.ticks() {
                @if let Some(at) = x.place(value) {
                    line .grid x1=(n(at)) x2=(n(at)) y1=(n(TOP)) y2=(n(bottom)) {}
                    text .tick x=(n(at)) y=(n(bottom + 16.0)) text-anchor="middle" { (label) }
                }
            }
            line .axis x1=(n(LEFT)) x2=(n(right)) y1=(n(bottom)) y2=(n(bottom)) {}
            text .label x=(n((LEFT + right) / 2.0)) y=(n(bottom + 34.0)) text-anchor="middle" { (self.x.label) }
            text .label transform={ "translate(12 " (n(TOP + PLOT_HEIGHT / 2.0)) ") rotate(-90)" } text-anchor="middle" {
                (self.y.label)
            }
            @if let Some((value, label)) = &self.rule {
                @if let Some(at) = x.place(*value) {
                    line .rule x1=(n(at)) x2=(n(at)) y1=(n(TOP)) y2=(n(bottom)) {}
                    text .tick x=(n(at + if at > WIDTH / 2.0 { -5.0 } else { 5.0 })) y=(n(TOP + 10.0))
                        text-anchor=(if at > WIDTH / 2.0 { "end" } else { "start" }) { (label) }
                }
            }
            @for series in &self.series { (series.drawing(&x, &y)) }
            (self.legend())
        }
    }

    /// Which series stand in each line of the legend, with their places.
    fn legend_lines(&self) -> Vec<Vec<(f64, &Series)>> {
        let mut lines: Vec<Vec<(f64, &Series)>> = Vec::new();
        let mut at = f64::INFINITY;
        for series in &self.series {
            let width = 24.0 + LETTER * cut(&series.label).chars().count() as f64;
            if at + width > WIDTH {
                lines.push(Vec::new());
                at = 8.0;
            }
            if let Some(line) = lines.last_mut() {
                line.push((at, series));
            }
            at += width + 6.0;
        }
        lines
    }

    fn legend(&self) -> Markup {
        let top = TOP + PLOT_HEIGHT + 40.0;
        html! {
            @for (number, line) in self.legend_lines().iter().enumerate() {
                @for (at, series) in line {
                    g .series.(class(series.number)) {
                        @if !matches!(series.line, Line::None) {
                            line .key x1=(n(at - 2.0)) x2=(n(at + 16.0)) y1=(n(top + LEGEND_LINE * (number as f64 + 0.5)))
                                y2=(n(top + LEGEND_LINE * (number as f64 + 0.5))) {}
                        }
                        (shape(series.number, at + 8.0, top + LEGEND_LINE * (number as f64 + 0.5), 4.5))
                        text .legend x=(n(at + 18.0)) y=(n(top + LEGEND_LINE * (number as f64 + 0.5) + 4.0)) {
                            (cut(&series.label))
                        }
                    }
                }
            }
        }
    }
}

impl Series {
    fn drawing(&self, x: &Scale, y: &Scale) -> Markup {
        let place = |px: f64, py: f64| Some((x.place(px)?, y.place(py)?));
        let through = match &self.line {
            Line::None => Vec::new(),
            Line::Marks => self.marks.iter().map(|m| (m.x, m.y)).collect(),
            Line::Through(places) => places.clone(),
        };
        let through = through.into_iter().filter_map(|(px, py)| place(px, py));
        let points: Vec<String> = through.map(|(px, py)| format!("{},{}", n(px), n(py))).collect();
        // Marks of long curves show only when pointed at.
        let curve = matches!(self.line, Line::Marks) && self.marks.len() > 12;
        html! {
            g .series.curve[curve].(class(self.number)) {
                @if points.len() > 1 { polyline points=(points.join(" ")) {} }
                @for (px, py) in self.dots.iter().filter_map(|(px, py)| place(*px, *py)) {
                    circle .dot cx=(n(px)) cy=(n(py)) r="2" {}
                }
                @for mark in &self.marks {
                    @if let Some((px, py)) = place(mark.x, mark.y) {
                        g .mark data-opens=[&mark.opens] tabindex=[mark.opens.as_ref().map(|_| "0")]
                            role=[mark.opens.as_ref().map(|_| "button")] aria-label=[mark.opens.as_ref().map(|_| &mark.title)] {
                            title { (mark.title) }
                            @if let Some((low, high)) = mark.bar.and_then(|(a, b)| Some((y.place(a)?, y.place(b)?))) {
                                line .bar x1=(n(px)) x2=(n(px)) y1=(n(low)) y2=(n(high)) {}
                            }
                            (shape(self.number, px, py, mark.radius))
                        }
                    }
                }
            }
        }
    }
}

/// A circle, square, triangle, diamond .., so that colour is not the only difference. Large ones are circles: their area
/// is a number.
fn shape(number: Option<usize>, x: f64, y: f64, radius: f64) -> Markup {
    let path = |points: &[(f64, f64)]| {
        let points: Vec<String> =
            points.iter().map(|(dx, dy)| format!("{},{}", n(x + dx * radius), n(y + dy * radius))).collect();
        html! { polygon points=(points.join(" ")) {} }
    };
    match number.map(|i| i % 5) {
        Some(1) if radius < 6.0 => path(&[(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)]),
        Some(2) if radius < 6.0 => path(&[(0.0, -1.15), (1.1, 0.85), (-1.1, 0.85)]),
        Some(3) if radius < 6.0 => path(&[(0.0, -1.25), (1.25, 0.0), (0.0, 1.25), (-1.25, 0.0)]),
        Some(4) if radius < 6.0 => path(&[(0.0, 1.15), (1.1, -0.85), (-1.1, -0.85)]),
        _ => html! { circle cx=(n(x)) cy=(n(y)) r=(n(radius)) {} },
    }
}

/// Several charts, one below the other, as an SVG file of its own.
pub fn standalone(title: &str, charts: &[Chart]) -> String {
    let head = 34.0;
    let height = head + charts.iter().map(|c| c.height() + 12.0).sum::<f64>();
    let mut top = head;
    let mut place = |chart: &Chart| {
        let at = top;
        top += chart.height() + 12.0;
        n(at)
    };
    html! {
        svg .chart.alone xmlns="http://www.w3.org/2000/svg" width=(n(WIDTH * 1.6)) height=(n(height * 1.6))
            viewBox={ "0 0 " (WIDTH) " " (n(height)) } role="img" aria-label=(title) {
            style { (maud::PreEscaped(STYLE)) }
            rect .paper width=(WIDTH) height=(n(height)) {}
            text .title x="12" y="22" { (cut(title)) }
            @for chart in charts { g transform={ "translate(0 " (place(chart)) ")" } { (chart.drawing()) } }
        }
    }
    .into_string()
}

/// Colour and dashes of a series: where lines lie on each other, the lower one shows between the dashes of the upper one.
fn class(number: Option<usize>) -> String {
    number.map_or_else(|| "sb".into(), |i| format!("s{} d{}", i % COLOURS, i % DASHES))
}

/// At most the label's first letters.
fn cut(label: &str) -> String {
    if label.chars().count() <= LONGEST_LABEL {
        return label.to_string();
    }
    label.chars().take(LONGEST_LABEL - 1).chain(['\u{2026}']).collect()
}

/// A place with one digit behind the point.
fn n(value: f64) -> String {
    let rounded = (value * 10.0).round() / 10.0;
    format!("{}", if rounded == 0.0 { 0.0 } else { rounded })
}
