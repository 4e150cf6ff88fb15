//! Metrics: declared in one place per program, shown as Prometheus's text.
//!
//! ```text
//! metrics! { doc, field: Kind = "name" ["label"] } ──▶ DECLARED (names, labels, meanings) + a struct of families
//! families, and what is read at the moment ──▶ Page
//! ```
//! Invariant: the number of series is bounded. Labels are closed words or names of the mesh; a family whose
//! labels come from outside is [`Bounded`].

mod bounded;
pub mod process;

pub use bounded::{Bounded, OVERFLOW};
// For `metrics!`, so that a program needs no further line in its manifest.
pub use prometheus;

use prometheus::{
    Encoder, Gauge, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec,
    Opts, Registry, TextEncoder,
};
use std::fmt::Write;

/// Bounds of durations, in seconds: from a handshake on one machine to a deadline.
const SECONDS: [f64; 14] = [
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
];

/// A metric: what it is called, what its labels are, and what it means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Declared {
    pub name: &'static str,
    /// `counter`, `gauge` or `histogram`.
    pub kind: &'static str,
    pub labels: &'static [&'static str],
    pub meaning: &'static str,
}

impl Declared {
    /// Its unit, which the name says.
    pub fn unit(&self) -> &'static str {
        let name = self.name.strip_suffix("_total").unwrap_or(self.name);
        if name.ends_with("_seconds") {
            "seconds"
        } else if name.ends_with("_bytes") {
            "bytes"
        } else {
            "1"
        }
    }

    /// Its row of the documentation's table.
    pub fn row(&self) -> String {
        let labels = if self.labels.is_empty() {
            "–".to_owned()
        } else {
            self.labels
                .iter()
                .map(|label| format!("`{label}`"))
                .collect::<Vec<_>>()
                .join(", ")
        };
        let meaning = self.meaning.trim().trim_end_matches('.').replace('|', "\\|");
        format!(
            "| `{}` | {} | {} | {labels} | {meaning} |",
            self.name,
            self.kind,
            self.unit()
        )
    }

    fn opts(&self) -> Opts {
        Opts::new(self.name, self.meaning.trim().trim_end_matches('.'))
    }
}

/// A kind of family that a declaration makes.
pub trait Family: Sized {
    const KIND: &'static str;
    fn declare(declared: &Declared, registry: &Registry) -> Result<Self, prometheus::Error>;
}

macro_rules! family {
    ($family:ty, $kind:literal, |$declared:ident| $make:expr) => {
        impl Family for $family {
            const KIND: &'static str = $kind;
            fn declare($declared: &Declared, registry: &Registry) -> Result<Self, prometheus::Error> {
                let family = $make?;
                registry.register(Box::new(family.clone()))?;
                Ok(family)
            }
        }
    };
}

family!(IntCounter, "counter", |declared| IntCounter::with_opts(
    declared.opts()
));
family!(IntCounterVec, "counter", |declared| IntCounterVec::new(
    declared.opts(),
    declared.labels
));
family!(IntGauge, "gauge", |declared| IntGauge::with_opts(declared.opts()));
family!(IntGaugeVec, "gauge", |declared| IntGaugeVec::new(
    declared.opts(),
    declared.labels
));
family!(Gauge, "gauge", |declared| Gauge::with_opts(declared.opts()));
family!(Histogram, "histogram", |declared| Histogram::with_opts(seconds(
    declared
)));
family!(HistogramVec, "histogram", |declared| HistogramVec::new(
    seconds(declared),
    declared.labels
));

fn seconds(declared: &Declared) -> HistogramOpts {
    HistogramOpts::from(declared.opts()).buckets(SECONDS.to_vec())
}

/// Declares a struct of families and, as its `DECLARED`, what they are.
#[macro_export]
macro_rules! metrics {
    ($(#[$meta:meta])* $vis:vis struct $name:ident {
        $( $(#[doc = $meaning:literal])+ $field:ident: $family:ty = $metric:literal [$($label:literal),*], )*
    }) => {
        $(#[$meta])*
        $vis struct $name { $( $(#[doc = $meaning])+ pub $field: $family, )* }

        impl $name {
            pub const DECLARED: &'static [$crate::metrics::Declared] = &[ $( $crate::metrics::Declared {
                name: $metric,
                kind: <$family as $crate::metrics::Family>::KIND,
                labels: &[$($label),*],
                meaning: concat!($($meaning),+),
            }, )* ];

            pub fn declare(
                registry: &$crate::metrics::prometheus::Registry,
            ) -> Result<Self, $crate::metrics::prometheus::Error> {
                let mut declared = Self::DECLARED.iter();
                // The list has one entry per field, in this order.
                $( let $field = match declared.next() {
                    Some(declared) => <$family as $crate::metrics::Family>::declare(declared, registry)?,
                    None => return Err($crate::metrics::prometheus::Error::AlreadyReg),
                }; )*
                Ok(Self { $($field),* })
            }
        }
    };
}

/// Declares constants: metrics that are read when the page is asked for.
#[macro_export]
macro_rules! read_metrics {
    ($vis:vis $all:ident = { $( $(#[doc = $meaning:literal])+ $constant:ident: $kind:literal = $metric:literal [$($label:literal),*], )* }) => {
        $( $(#[doc = $meaning])+ $vis const $constant: $crate::metrics::Declared = $crate::metrics::Declared {
            name: $metric,
            kind: $kind,
            labels: &[$($label),*],
            meaning: concat!($($meaning),+),
        }; )*
        $vis const $all: &[$crate::metrics::Declared] = &[$($constant),*];
    };
}

/// A page in Prometheus's text format.
#[derive(Default)]
pub struct Page(String);

impl Page {
    /// Shows every family of a registry.
    pub fn registry(&mut self, registry: &Registry) {
        let mut text = vec![];
        // Writing to memory does not fail, and our families are consistent.
        let _ = TextEncoder::new().encode(&registry.gather(), &mut text);
        self.0.push_str(&String::from_utf8_lossy(&text));
    }

    /// Begins a family; its samples follow.
    pub fn family(&mut self, declared: &Declared) -> Samples<'_> {
        let meaning = declared.meaning.trim().trim_end_matches('.');
        let _ = writeln!(
            self.0,
            "# HELP {0} {meaning}\n# TYPE {0} {1}",
            declared.name, declared.kind
        );
        Samples {
            page: &mut self.0,
            name: declared.name,
            labels: declared.labels,
        }
    }

    /// Shows a family of one series.
    pub fn one(&mut self, declared: &Declared, value: f64) {
        self.family(declared).sample(&[], value);
    }

    pub fn into_bytes(self) -> Vec<u8> {
        self.0.into_bytes()
    }

    pub fn text(&self) -> &str {
        &self.0
    }
}

/// The samples of one family.
pub struct Samples<'p> {
    page: &'p mut String,
    name: &'static str,
    labels: &'static [&'static str],
}

impl Samples<'_> {
    /// One series; `values` are of the declared labels, in their order.
    pub fn sample(&mut self, values: &[&str], value: f64) {
        self.page.push_str(self.name);
        for (index, (label, value)) in self.labels.iter().zip(values).enumerate() {
            self.page.push_str(if index == 0 { "{" } else { "," });
            push_label(self.page, label, value);
        }
        let end = if self.labels.is_empty() || values.is_empty() {
            ""
        } else {
            "}"
        };
        let _ = writeln!(self.page, "{end} {value}");
    }

    /// One series whose labels are written already, without braces.
    pub fn written(&mut self, labels: &str, more: &str, value: u64) {
        let _ = writeln!(self.page, "{}{{{labels}{more}}} {value}", self.name);
    }
}

/// Writes `label="value"`.
pub fn push_label(out: &mut String, label: &str, value: &str) {
    out.push_str(label);
    out.push_str("=\"");
    for c in value.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            c => out.push(c),
        }
    }
    out.push('"');
}

/// Fails unless the section `## heading` of a page of documentation has a table of exactly these metrics;
/// with `CULVERT_WRITE_DOCS` set, writes it first. For a test of each program.
pub fn check_documented(
    page: &std::path::Path,
    heading: &str,
    declared: &[&[Declared]],
) -> Result<(), String> {
    let rows: Vec<String> = declared
        .iter()
        .flat_map(|some| some.iter())
        .map(Declared::row)
        .collect();
    let text = std::fs::read_to_string(page).map_err(|error| format!("{}: {error}", page.display()))?;
    let title = format!("## {heading}\n");
    let start = text
        .find(&title)
        .ok_or_else(|| format!("{} has no {title}", page.display()))?
        + title.len();
    let end = text[start..]
        .find("\n## ")
        .map_or(text.len(), |end| start + end + 1);
    let section = &text[start..end];
    let found: Vec<&str> = section.lines().filter(|line| line.starts_with("| `")).collect();
    if found == rows {
        return Ok(());
    }
    if std::env::var_os("CULVERT_WRITE_DOCS").is_some() {
        let table = format!(
            "\n| metric | kind | unit | labels | meaning |\n|---|---|---|---|---|\n{}\n{}",
            rows.join("\n"),
            if end == text.len() { "" } else { "\n" }
        );
        let text = format!("{}{table}{}", &text[..start], &text[end..]);
        return std::fs::write(page, text).map_err(|error| error.to_string());
    }
    Err(format!(
        "{} and the declarations of {heading} differ; run this test with CULVERT_WRITE_DOCS=1\nonly declared: \
         {:#?}\nonly documented: {:#?}",
        page.display(),
        rows.iter()
            .filter(|row| !found.contains(&row.as_str()))
            .collect::<Vec<_>>(),
        found
            .iter()
            .filter(|row| !rows.iter().any(|known| known == *row))
            .collect::<Vec<_>>(),
    ))
}

#[cfg(test)]
mod tests;
