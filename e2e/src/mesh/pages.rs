//! Pages that the mesh's processes serve: admin, metrics, readiness.
//!
//! Invariant: read from inside the namespace that the page is for, within a deadline.

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::lab::Endpoint;

const WAIT: Duration = Duration::from_secs(5);

/// An answer: its status and body.
#[derive(Debug)]
pub struct Page {
    pub status: u16,
    pub body: String,
}

/// `GET path` from `from`.
pub fn fetch(from: &Endpoint, address: SocketAddr, path: &str) -> Result<Page> {
    request(from, address, "GET", path)
}

/// A request without a body.
pub fn request(from: &Endpoint, address: SocketAddr, method: &str, path: &str) -> Result<Page> {
    let mut socket = from
        .connect_within(address, WAIT)
        .with_context(|| format!("{address}{path}"))?;
    socket.set_read_timeout(Some(WAIT))?;
    let head = format!("{method} {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n");
    socket.write_all(head.as_bytes())?;
    let mut answer = Vec::new();
    socket
        .read_to_end(&mut answer)
        .with_context(|| format!("{address}{path}"))?;
    parse(&answer).with_context(|| format!("{address}{path}"))
}

fn parse(answer: &[u8]) -> Result<Page> {
    let end = memchr::memmem::find(answer, b"\r\n\r\n").context("no end of the head")?;
    let head = String::from_utf8_lossy(&answer[..end]).to_ascii_lowercase();
    let status = head.split(' ').nth(1).context("no status")?.parse()?;
    let body = &answer[end + 4..];
    let body = if head.contains("\r\ntransfer-encoding: chunked") {
        unchunk(body)?
    } else {
        body.to_vec()
    };
    Ok(Page {
        status,
        body: String::from_utf8_lossy(&body).into_owned(),
    })
}

fn unchunk(mut rest: &[u8]) -> Result<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let line = memchr::memmem::find(rest, b"\r\n").context("a chunk without its size")?;
        let size = usize::from_str_radix(std::str::from_utf8(&rest[..line])?.trim(), 16)?;
        rest = &rest[line + 2..];
        if size == 0 {
            return Ok(body);
        }
        ensure!(rest.len() >= size + 2, "a chunk is cut short");
        body.extend_from_slice(&rest[..size]);
        rest = &rest[size + 2..];
    }
}

/// A page of Prometheus's text format.
#[derive(Debug, Clone)]
pub struct Metrics(Vec<Sample>);

#[derive(Debug, Clone)]
pub struct Sample {
    pub name: String,
    pub labels: Vec<(String, String)>,
    pub value: f64,
}

impl Metrics {
    pub fn scrape(from: &Endpoint, address: SocketAddr) -> Result<Self> {
        let page = fetch(from, address, "/metrics")?;
        if page.status != 200 {
            bail!("metrics at {address}: {}", page.status);
        }
        Ok(Self::parse(&page.body))
    }

    pub fn parse(text: &str) -> Self {
        Self(
            text.lines()
                .filter(|line| !line.starts_with('#'))
                .filter_map(sample)
                .collect(),
        )
    }

    /// The sum of every series of `name` that has all of `labels`.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        self.series(name, labels).map(|sample| sample.value).sum()
    }

    pub fn series<'a>(
        &'a self,
        name: &'a str,
        labels: &'a [(&'a str, &'a str)],
    ) -> impl Iterator<Item = &'a Sample> {
        self.0.iter().filter(move |sample| {
            sample.name == name
                && labels.iter().all(|want| {
                    sample
                        .labels
                        .iter()
                        .any(|(label, value)| (&**label, &**value) == *want)
                })
        })
    }

    pub fn samples(&self) -> &[Sample] {
        &self.0
    }
}

/// `name{label="value",…} number`.
fn sample(line: &str) -> Option<Sample> {
    let Some((name, rest)) = line.split_once('{') else {
        let mut words = line.split_whitespace();
        let name = words.next()?.to_owned();
        return Some(Sample {
            name,
            labels: Vec::new(),
            value: words.next()?.parse().ok()?,
        });
    };
    let mut labels = Vec::new();
    let mut rest = rest;
    while let Some((label, after)) = rest.split_once("=\"") {
        let mut value = String::new();
        let mut characters = after.char_indices();
        let end = loop {
            match characters.next()? {
                (_, '\\') => match characters.next()?.1 {
                    'n' => value.push('\n'),
                    other => value.push(other),
                },
                (end, '"') => break end,
                (_, other) => value.push(other),
            }
        };
        labels.push((label.trim_start_matches(',').to_owned(), value));
        rest = &after[end + 1..];
        if rest.starts_with('}') {
            break;
        }
    }
    let value = rest
        .trim_start_matches(['}', ','])
        .split_whitespace()
        .next()?
        .parse()
        .ok()?;
    Some(Sample {
        name: name.to_owned(),
        labels,
        value,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_metrics_page_is_read_with_its_labels() {
        let page = "# HELP x y\n# TYPE x counter\nx 3\nx_total{a=\"1\",b=\"q\\\"}{\"} 4\nx_total{a=\"2\"} 5.5 1700\n";
        let metrics = Metrics::parse(page);
        for (name, labels, want) in [
            ("x", &[][..], 3.0),
            ("x_total", &[], 9.5),
            ("x_total", &[("a", "1")], 4.0),
            ("x_total", &[("b", "q\"}{")], 4.0),
            ("x_total", &[("a", "3")], 0.0),
        ] {
            assert_eq!(metrics.sum(name, labels), want, "{name} {labels:?}");
        }
    }

    #[test]
    fn an_answer_in_chunks_is_put_together() {
        let page =
            parse(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n1\r\nd\r\n0\r\n\r\n");
        assert_eq!(page.unwrap().body, "abcd");
    }
}
