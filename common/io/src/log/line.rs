//! How a record is written: `time LEVEL target: message name=value …`, or one JSON object.
//!
//! Invariant: what a field holds never ends the line, starts another field, or moves a terminal's cursor.

use std::{
    error::Error,
    fmt::{self, Debug, Write},
    str::FromStr,
};
use tracing::{
    Event, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::{
    fmt::{FmtContext, FormatEvent, FormatFields, format::Writer},
    registry::LookupSpan,
};

/// Form of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    Text,
    Json,
}

impl FromStr for Format {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            _ => Err("write text or json"),
        }
    }
}

/// Writes events as lines.
pub(super) struct Lines(pub Format);

impl<S, N> FormatEvent<S, N> for Lines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        write_line(&mut writer, self.0, time::OffsetDateTime::now_utc(), event)
    }
}

fn write_line(
    out: &mut dyn Write,
    format: Format,
    now: time::OffsetDateTime,
    event: &Event<'_>,
) -> fmt::Result {
    let metadata = event.metadata();
    let mut fields = Fields::new(format);
    event.record(&mut fields);
    let Fields { message, rest, .. } = fields;
    match format {
        Format::Text => {
            write_time(out, now)?;
            writeln!(
                out,
                " {:>5} {}: {message}{rest}",
                metadata.level(),
                metadata.target()
            )
        }
        Format::Json => {
            out.write_str("{\"timestamp\":\"")?;
            write_time(out, now)?;
            let (level, target) = (metadata.level(), metadata.target());
            writeln!(
                out,
                "\",\"level\":\"{level}\",\"target\":\"{target}\",\"message\":\"{message}\"{rest}}}"
            )
        }
    }
}

fn write_time(out: &mut dyn Write, now: time::OffsetDateTime) -> fmt::Result {
    write!(
        out,
        "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}.{:06}Z",
        now.year(),
        u8::from(now.month()),
        now.day(),
        now.hour(),
        now.minute(),
        now.second(),
        now.microsecond()
    )
}

/// The fields of one event as they will stand in its line.
struct Fields {
    format: Format,
    message: String,
    rest: String,
    scratch: String,
}

impl Fields {
    fn new(format: Format) -> Self {
        Self {
            format,
            message: String::new(),
            rest: String::with_capacity(512),
            scratch: String::new(),
        }
    }

    fn name(&mut self, field: &Field) {
        // Writing to memory does not fail, here and below.
        let _ = match self.format {
            Format::Text => write!(self.rest, " {}=", field.name()),
            Format::Json => write!(self.rest, ",\"{}\":", field.name()),
        };
    }

    fn bare(&mut self, field: &Field, value: fmt::Arguments<'_>) {
        self.name(field);
        let _ = self.rest.write_fmt(value);
    }

    fn text(&mut self, field: &Field, value: fmt::Arguments<'_>) {
        if field.name() == "message" {
            let _ = Escaped(&mut self.message).write_fmt(value);
            return;
        }
        self.name(field);
        if self.format == Format::Json {
            self.rest.push('"');
            let _ = Escaped(&mut self.rest).write_fmt(value);
            self.rest.push('"');
            return;
        }
        self.scratch.clear();
        let _ = self.scratch.write_fmt(value);
        if !self.scratch.is_empty() && self.scratch.bytes().all(is_plain) {
            self.rest.push_str(&self.scratch);
        } else {
            self.rest.push('"');
            let _ = Escaped(&mut self.rest).write_str(&self.scratch);
            self.rest.push('"');
        }
    }
}

/// What needs no quotes in a text line.
fn is_plain(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-_.:/[]@+%,".contains(&byte)
}

impl Visit for Fields {
    fn record_f64(&mut self, field: &Field, value: f64) {
        if value.is_finite() {
            self.bare(field, format_args!("{value}"));
        } else {
            self.text(field, format_args!("{value}"));
        }
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.bare(field, format_args!("{value}"));
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.bare(field, format_args!("{value}"));
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.bare(field, format_args!("{value}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.text(field, format_args!("{value}"));
    }

    fn record_error(&mut self, field: &Field, value: &(dyn Error + 'static)) {
        self.text(field, format_args!("{value}"));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.text(field, format_args!("{value:?}"));
    }
}

/// Writes text with everything escaped that could end a string, a line, or a reader's trust in what it sees:
/// quotes, control characters of both sets, line separators, and changes of direction.
struct Escaped<'o>(&'o mut String);

impl Write for Escaped<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for c in text.chars() {
            match c {
                '"' => self.0.push_str("\\\""),
                '\\' => self.0.push_str("\\\\"),
                '\n' => self.0.push_str("\\n"),
                '\r' => self.0.push_str("\\r"),
                '\t' => self.0.push_str("\\t"),
                c if c.is_control() || is_deceptive(c) => write!(self.0, "\\u{:04x}", u32::from(c))?,
                c => self.0.push(c),
            }
        }
        Ok(())
    }
}

fn is_deceptive(c: char) -> bool {
    matches!(c, '\u{2028}' | '\u{2029}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
}

#[cfg(test)]
mod tests;
