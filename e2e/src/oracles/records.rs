//! O4: the access log of every ztunnel of a mesh, as records.
//!
//! ```text
//! 2026-01-01T00:00:00Z  WARN access: connection failed src.addr=10.1.0.2:999 direction="outbound" error=…
//! {"timestamp":…,"level":"WARN","target":"access","message":"connection failed","src.addr":…}
//! ```
//! Invariant: both forms give the same record, and a field that this page does not know harms nothing.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::mesh::Mesh;

/// One line of an access log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    pub level: String,
    pub message: String,
    pub fields: BTreeMap<String, String>,
    /// The line as it is.
    pub text: String,
}

/// Every record of every ztunnel that has run in this mesh.
pub fn records(mesh: &Mesh) -> Result<Vec<Record>> {
    let mut all = Vec::new();
    for log in mesh.lab().logs() {
        let text = fs::read(&log).with_context(|| log.display().to_string())?;
        all.extend(String::from_utf8_lossy(&text).lines().filter_map(Record::parse));
    }
    Ok(all)
}

impl Record {
    /// Reads a line; `None` when it is no access record.
    pub fn parse(line: &str) -> Option<Self> {
        if line.starts_with('{') {
            Self::parse_json(line)
        } else {
            Self::parse_text(line)
        }
    }

    fn parse_json(line: &str) -> Option<Self> {
        let Value::Object(object) = serde_json::from_str(line).ok()? else {
            return None;
        };
        let plain = |value: &Value| match value {
            Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        let mut fields: BTreeMap<String, String> = object
            .iter()
            .map(|(name, value)| (name.clone(), plain(value)))
            .collect();
        if fields.remove("target")? != "access" {
            return None;
        }
        Some(Self {
            level: fields.remove("level")?,
            message: fields.remove("message").unwrap_or_default(),
            fields,
            text: line.to_owned(),
        })
    }

    fn parse_text(line: &str) -> Option<Self> {
        let (head, rest) = line.split_once(" access: ")?;
        let level = head.split_whitespace().last()?.to_owned();
        let mut message: Vec<&str> = Vec::new();
        let mut fields: Vec<(String, String)> = Vec::new();
        // A value may hold spaces: it goes on until the next word that looks like a field.
        for word in rest.split(' ') {
            match (
                word.split_once('=').filter(|(name, _)| is_name(name)),
                fields.last_mut(),
            ) {
                (Some((name, value)), _) => fields.push((name.to_owned(), value.to_owned())),
                (None, Some((_, value))) => {
                    value.push(' ');
                    value.push_str(word);
                }
                (None, None) => message.push(word),
            }
        }
        let unquoted = |value: String| match value.strip_prefix('"').and_then(|v| v.strip_suffix('"')) {
            Some(inner) => inner.to_owned(),
            None => value,
        };
        Some(Self {
            level,
            message: message.join(" "),
            fields: fields
                .into_iter()
                .map(|(name, value)| (name, unquoted(value)))
                .collect(),
            text: line.to_owned(),
        })
    }

    /// A field that is there and says something.
    pub fn field(&self, name: &str) -> Option<&str> {
        self.fields
            .get(name)
            .map(String::as_str)
            .filter(|value| !value.is_empty())
    }

    pub fn is(&self, name: &str, value: &str) -> bool {
        self.field(name) == Some(value)
    }

    /// Whether it tells of a connection or tunnel that was not let through, or was ended by the mesh.
    pub fn is_refusal(&self) -> bool {
        self.level != "DEBUG" && (self.field("error").is_some() || self.field("reason").is_some())
    }
}

fn is_name(word: &str) -> bool {
    word.starts_with(|c: char| c.is_ascii_lowercase())
        && word
            .chars()
            .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '.' | '_'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn o4_both_forms_of_the_log_give_the_same_record() {
        let text = "2026-01-01T00:00:00.1Z  WARN access: connection failed src.addr=10.1.0.2:999 \
                    src.identity=spiffe://td/x direction=\"outbound\" error=denied by policy shop/no a_b=1";
        let json = r#"{"timestamp":"2026","level":"WARN","message":"connection failed","src.addr":"10.1.0.2:999",
            "src.identity":"spiffe://td/x","direction":"outbound","error":"denied by policy shop/no","a_b":1,
            "target":"access"}"#;
        for line in [text, json] {
            let record = Record::parse(line).unwrap();
            assert_eq!(record.message, "connection failed", "{line}");
            assert!(record.is_refusal(), "{line}");
            for (name, value) in [
                ("src.addr", "10.1.0.2:999"),
                ("direction", "outbound"),
                ("error", "denied by policy shop/no"),
                ("a_b", "1"),
            ] {
                assert!(record.is(name, value), "{name} of {record:?}");
            }
        }
        for other in [
            "2026 INFO ztunnel: ready",
            r#"{"level":"INFO","target":"ztunnel","message":"ready"}"#,
            "{",
            "",
        ] {
            assert_eq!(Record::parse(other), None, "{other}");
        }
        let complete = "2026  INFO access: connection complete src.addr=1.2.3.4:5 bytes_sent=3";
        assert!(!Record::parse(complete).unwrap().is_refusal());
    }
}
