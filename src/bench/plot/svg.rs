//! A chart as SVG text: frame, axes with units, legend. No scripts, so that a file can be kept in
//! a repository and compared; colours follow the reader's light or dark setting.

use std::fmt::Write;

/// Size of a chart.
const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 460.0;
/// Room around the plotted area: left, right, top without the legend, bottom.
const ROOM: [f64; 4] = [76.0, 24.0, 44.0, 58.0];
/// A line of the legend.
const LEGEND_LINE: f64 = 20.0;
/// A swatch with the gap behind it, and a letter of the legend, about.
const SWATCH: f64 = 33.0;
const LETTER: f64 = 7.3;
/// Room between the legend and the plotted area.
const LEGEND_GAP: f64 = 10.0;
/// Ticks of an axis, about.
const TICKS: f64 = 6.0;

/// Classes instead of colours, each for both settings. The series' colours are those of Okabe and
/// Ito (2008), which colour-blind readers tell apart, lighter on a dark ground.
const STYLE: &str = "\
.ground{fill:#ffffff}.ink{fill:#1b1f24}.soft{fill:#57606a}.grid{stroke:#d8dee4}.axis{stroke:#57606a}\
.s0{stroke:#0072b2}.s1{stroke:#d55e00}.s2{stroke:#009e73}.s3{stroke:#a0528a}\
.s4{stroke:#8a6d00}.s5{stroke:#6e7781}\
.f0{fill:#0072b2}.f1{fill:#d55e00}.f2{fill:#009e73}.f3{fill:#a0528a}\
.f4{fill:#8a6d00}.f5{fill:#6e7781}.bad{fill:#cf222e;stroke:#cf222e}\
@media (prefers-color-scheme:dark){\
.ground{fill:#0d1117}.ink{fill:#e6edf3}.soft{fill:#9ea7b3}.grid{stroke:#2b323b}.axis{stroke:#9ea7b3}\
.s0{stroke:#56b4e9}.s1{stroke:#f0964f}.s2{stroke:#3fcf9f}.s3{stroke:#e08fc6}\
.s4{stroke:#e3c34c}.s5{stroke:#b6bfc8}\
.f0{fill:#56b4e9}.f1{fill:#f0964f}.f2{fill:#3fcf9f}.f3{fill:#e08fc6}\
.f4{fill:#e3c34c}.f5{fill:#b6bfc8}.bad{fill:#ff7b72;stroke:#ff7b72}}\
.halo{paint-order:stroke;stroke:#ffffff;stroke-width:5px;stroke-linejoin:round}\
@media (prefers-color-scheme:dark){.halo{stroke:#0d1117}}\
text{font-family:system-ui,'Segoe UI','DejaVu Sans',sans-serif;font-size:13px}\
.title{font-size:16px;font-weight:600}.line{fill:none;stroke-width:2}.thin{fill:none;stroke-width:1}\
.band{opacity:.18;stroke:none}.dash{stroke-dasharray:7 5}";

/// Series that have a colour of their own; more begin again.
pub(super) const COLOURS: usize = 6;

/// An axis: what it shows, with the unit, and from where to where.
pub(super) struct Axis {
    pub(super) label: String,
    pub(super) from: f64,
    pub(super) to: f64,
}

impl Axis {
    /// From `from` to `to`, or a little further where both are one.
    pub(super) fn new(label: &str, from: f64, to: f64) -> Self {
        let to = if to > from { to } else { from + from.abs().max(1.0) * 0.1 };
        Self { label: label.to_owned(), from, to }
    }

    /// 1, 2 or 5 times a power of ten: the distance of ticks.
    fn step(&self) -> f64 {
        let raw = (self.to - self.from) / TICKS;
        let power = 10f64.powf(raw.log10().floor());
        [1.0, 2.0, 5.0, 10.0].map(|m| m * power).into_iter().find(|s| *s >= raw).unwrap_or(raw)
    }

    fn ticks(&self) -> Vec<f64> {
        let step = self.step();
        let first = (self.from / step - 1e-9).ceil() as i64;
        let last = (self.to / step + 1e-9).floor() as i64;
        (first..=last).map(|i| i as f64 * step).collect()
    }

    fn decimals(&self) -> usize {
        (-self.step().log10().floor()).clamp(0.0, 6.0) as usize
    }
}

/// How a line is drawn.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Stroke {
    Line,
    Thin,
    Dashed,
}

/// A chart under construction.
pub(super) struct Chart {
    x: Axis,
    y: Axis,
    body: String,
    legend: Vec<(String, String)>,
    title: String,
    /// Without the legend, which [`Self::finish`] makes room for.
    height: f64,
}

impl Chart {
    /// An empty chart.
    pub(super) fn new(title: &str, x: Axis, y: Axis) -> Self {
        let (body, legend) = Default::default();
        Self { x, y, body, legend, title: title.to_owned(), height: HEIGHT }
    }

    /// As high as `rows` lines of text need.
    pub(super) fn rows(mut self, rows: usize) -> Self {
        self.height = ROOM[2] + ROOM[3] + 30.0 * rows as f64;
        self
    }

    /// Where `x` lies, points from the left.
    fn at_x(&self, x: f64) -> f64 {
        let share = (x - self.x.from) / (self.x.to - self.x.from);
        ROOM[0] + share.clamp(0.0, 1.0) * (WIDTH - ROOM[0] - ROOM[1])
    }

    /// Where `y` lies, points from the top.
    fn at_y(&self, y: f64) -> f64 {
        let share = (y - self.y.from) / (self.y.to - self.y.from);
        self.height - ROOM[3] - share.clamp(0.0, 1.0) * (self.height - ROOM[2] - ROOM[3])
    }

    fn points(&self, points: impl IntoIterator<Item = (f64, f64)>) -> String {
        let mut text = String::new();
        for (x, y) in points {
            let _ = write!(text, "{:.1},{:.1} ", self.at_x(x), self.at_y(y));
        }
        text.truncate(text.trim_end().len());
        text
    }

    /// A line through `points` in the colour of series `series`.
    pub(super) fn line(
        &mut self,
        series: usize,
        stroke: Stroke,
        points: impl IntoIterator<Item = (f64, f64)>,
    ) {
        let class = match stroke {
            Stroke::Line => "line",
            Stroke::Thin => "thin",
            Stroke::Dashed => "line dash",
        };
        let points = self.points(points);
        let n = series % COLOURS;
        let _ = writeln!(self.body, "<polyline class=\"s{n} {class}\" points=\"{points}\"/>");
    }

    /// The area between two lines.
    pub(super) fn band(&mut self, series: usize, low: &[(f64, f64)], high: &[(f64, f64)]) {
        let outline = low.iter().chain(high.iter().rev()).copied();
        let (points, n) = (self.points(outline), series % COLOURS);
        let _ = writeln!(self.body, "<polygon class=\"f{n} band\" points=\"{points}\"/>");
    }

    /// A dot, in a series' colour or as a warning.
    pub(super) fn dot(&mut self, series: Option<usize>, radius: f64, x: f64, y: f64) {
        let class = series.map_or_else(|| "bad".to_owned(), |n| format!("f{}", n % COLOURS));
        let (x, y) = (self.at_x(x), self.at_y(y));
        let _ = writeln!(
            self.body,
            "<circle class=\"{class}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"{radius}\"/>"
        );
    }

    /// A bar over the whole height from `from` to `to`, as a warning.
    pub(super) fn warn(&mut self, from: f64, to: f64) {
        let (from, to) = (self.at_x(from), self.at_x(to));
        let (top, height, width) = (ROOM[2], self.height - ROOM[2] - ROOM[3], (to - from).max(2.0));
        let _ = writeln!(
            self.body,
            "<rect class=\"bad band\" x=\"{from:.1}\" y=\"{top}\" width=\"{width:.1}\" \
             height=\"{height:.1}\"/>"
        );
    }

    /// A vertical line over the whole height.
    pub(super) fn rule(&mut self, x: f64) {
        let (x, top, bottom) = (self.at_x(x), ROOM[2], self.height - ROOM[3]);
        let _ = writeln!(
            self.body,
            "<line class=\"axis\" x1=\"{x:.1}\" y1=\"{top}\" x2=\"{x:.1}\" y2=\"{bottom:.1}\"/>"
        );
    }

    /// A bar from the left axis to `to`, on row `row` of `rows`, with text on and behind it.
    pub(super) fn bar(&mut self, row: usize, rows: usize, to: f64, name: &str, figures: &str) {
        let height = (self.height - ROOM[2] - ROOM[3]) / rows.max(1) as f64;
        let top = ROOM[2] + height * row as f64;
        let (left, right) = (self.at_x(self.x.from), self.at_x(to));
        let middle = top + height / 2.0 + 4.5;
        let _ = writeln!(
            self.body,
            "<rect class=\"f0 band\" x=\"{left:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{:.1}\"/>\n\
             <text class=\"ink\" x=\"{:.1}\" y=\"{middle:.1}\">{}</text>\n\
             <text class=\"soft halo\" x=\"{:.1}\" y=\"{middle:.1}\" text-anchor=\"end\">{}</text>",
            top + 2.0,
            (right - left).max(1.0),
            height - 4.0,
            left + 8.0,
            escape(name),
            WIDTH - ROOM[1] - 6.0,
            escape(figures)
        );
    }

    /// An interval on row `row` of `rows` with its middle, and two lines of text above it.
    pub(super) fn interval(
        &mut self,
        row: usize,
        rows: usize,
        [low, middle, high]: [f64; 3],
        series: Option<usize>,
        [name, figures]: [&str; 2],
    ) {
        let height = (self.height - ROOM[2] - ROOM[3]) / rows.max(1) as f64;
        let y = ROOM[2] + height * (row as f64 + 0.8);
        let class = series.map_or_else(|| "bad".to_owned(), |n| format!("s{0} f{0}", n % COLOURS));
        let (low, middle, high) = (self.at_x(low), self.at_x(middle), self.at_x(high));
        let _ = writeln!(
            self.body,
            "<line class=\"{class}\" stroke-width=\"3\" x1=\"{low:.1}\" y1=\"{y:.1}\" \
             x2=\"{high:.1}\" y2=\"{y:.1}\"/>\n\
             <circle class=\"{class}\" cx=\"{middle:.1}\" cy=\"{y:.1}\" r=\"5\"/>\n\
             <text class=\"ink halo\" x=\"{0:.1}\" y=\"{1:.1}\">{2}</text>\n\
             <text class=\"soft halo\" x=\"{0:.1}\" y=\"{3:.1}\">{4}</text>",
            ROOM[0] + 8.0,
            y - 32.0,
            escape(name),
            y - 14.0,
            escape(figures)
        );
    }

    /// An entry of the legend, with a swatch of class `swatch`.
    fn entry(&mut self, swatch: String, text: &str) {
        self.legend.push((swatch, text.to_owned()));
    }

    /// Names a series.
    pub(super) fn name(&mut self, series: usize, stroke: Stroke, text: &str) {
        let dash = if stroke == Stroke::Dashed { " dash" } else { "" };
        self.entry(format!("s{} line{dash}", series % COLOURS), text);
    }

    /// Names the warnings.
    pub(super) fn name_warning(&mut self, text: &str) {
        self.entry("bad line".to_owned(), text);
    }

    /// The legend from `left` to `right`, in as many lines as it needs, and the height of them.
    fn legend(&self, left: f64, right: f64) -> (String, f64) {
        let (mut s, mut at, mut y) = (String::new(), left, 50.0);
        for (swatch, text) in &self.legend {
            let width = SWATCH + LETTER * text.chars().count() as f64;
            if at > left && at + width > right {
                (at, y) = (left, y + LEGEND_LINE);
            }
            let _ = writeln!(
                s,
                "<polyline class=\"{swatch}\" points=\"{at:.1},{y} {:.1},{y}\"/>\n\
                 <text class=\"ink\" x=\"{:.1}\" y=\"{}\">{}</text>",
                at + SWATCH - 7.0,
                at + SWATCH,
                y + 4.5,
                escape(text)
            );
            at += width + 18.0;
        }
        let room = if s.is_empty() { 0.0 } else { y - 50.0 + LEGEND_LINE + LEGEND_GAP };
        (s, room)
    }

    /// The whole file. An axis without a label has no ticks.
    pub(super) fn finish(self) -> String {
        let (left, top) = (ROOM[0], ROOM[2]);
        let (right, bottom) = (WIDTH - ROOM[1], self.height - ROOM[3]);
        let (legend, room) = self.legend(left, right);
        let height = self.height + room;
        let mut s = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" \
             width=\"{WIDTH}\" height=\"{height}\" role=\"img\">\n<title>{0}</title>\n\
             <style>{STYLE}</style>\n<rect class=\"ground\" width=\"{WIDTH}\" height=\"{height}\"/>\n\
             <text class=\"ink title\" x=\"{left}\" y=\"26\">{0}</text>\n",
            escape(&self.title)
        );
        s.push_str(&legend);
        let _ = writeln!(s, "<g transform=\"translate(0 {room})\">");
        if !self.x.label.is_empty() {
            for tick in self.x.ticks() {
                let x = self.at_x(tick);
                let _ = writeln!(
                    s,
                    "<line class=\"grid\" x1=\"{x:.1}\" y1=\"{top}\" x2=\"{x:.1}\" y2=\"{bottom}\"/>\n\
                     <text class=\"soft\" x=\"{x:.1}\" y=\"{}\" text-anchor=\"middle\">{tick:.*}</text>",
                    bottom + 19.0,
                    self.x.decimals()
                );
            }
        }
        if !self.y.label.is_empty() {
            for tick in self.y.ticks() {
                let y = self.at_y(tick);
                let _ = writeln!(
                    s,
                    "<line class=\"grid\" x1=\"{left}\" y1=\"{y:.1}\" x2=\"{right}\" y2=\"{y:.1}\"/>\n\
                     <text class=\"soft\" x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{tick:.*}</text>",
                    left - 9.0,
                    y + 4.5,
                    self.y.decimals()
                );
            }
        }
        s.push_str(&self.body);
        let middle = (top + bottom) / 2.0;
        let _ = writeln!(
            s,
            "<polyline class=\"axis thin\" points=\"{left},{top} {left},{bottom} {right},{bottom}\"/>\n\
             <text class=\"ink\" x=\"{}\" y=\"{}\" text-anchor=\"middle\">{}</text>\n\
             <text class=\"ink\" transform=\"translate(20 {middle}) rotate(-90)\" \
             text-anchor=\"middle\">{}</text>\n</g>\n</svg>",
            (left + right) / 2.0,
            bottom + 44.0,
            escape(&self.x.label),
            escape(&self.y.label)
        );
        s
    }
}

/// Text from a file, as XML wants it.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '&' => out.push_str("&amp;"),
            '"' => out.push_str("&quot;"),
            c if c.is_control() => out.push(' '),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_within_the_axis() {
        let ticks = |from, to| Axis::new("", from, to).ticks();
        assert_eq!(ticks(0.0, 10.0), [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]);
        assert_eq!(ticks(0.0, 16384.0), [0.0, 5000.0, 10000.0, 15000.0]);
        assert_eq!(Axis::new("", 0.95, 1.05).decimals(), 2);
        // A range of nothing is widened, not divided by.
        assert!(ticks(3.0, 3.0).iter().all(|t| t.is_finite()));
    }

    #[test]
    fn text_of_a_file_cannot_leave_its_element() {
        assert_eq!(escape("<a b=\"c\">&\u{1b}"), "&lt;a b=&quot;c&quot;&gt;&amp; ");
    }
}
