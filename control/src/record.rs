//! What a restart must not forget: how far each pod is on its way (settled D11), and which nodes were served.
//!
//! ```text
//! index ──phases that changed──▶ ┌────────┐ ──at the next start──▶ index
//! ads   ──nodes that come──────▶ │ a file │ ──────────────────────▶ acks: whom to wait for
//!                                └────────┘
//! ```
//! Invariant: a phase is written down before anything that follows from it is published. Lines are added; the file
//! is written anew at a start, and when most of its lines are out of date.

use crate::index::Phase;
use anyhow::Context;
use parking_lot::Mutex;
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    fs::{self, File},
    io::{self, Write as _},
    path::{Path, PathBuf},
};

const GONE: &str = "gone";
const NODE: &str = "node";
const LEFT: &str = "left";

/// Lines that are out of date before the file is written anew, beside as many as there are others.
const SPARE_LINES: usize = 1000;

/// What an earlier process has left.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Recorded {
    pub phases: BTreeMap<String, Phase>,
    pub nodes: BTreeSet<String>,
}

pub struct Record(Mutex<Written>);

struct Written {
    path: PathBuf,
    file: File,
    /// A line may have been written in part.
    torn: bool,
    lines: usize,
    nodes: BTreeSet<String>,
}

impl Record {
    /// Reads what there is, and writes it anew.
    pub fn open(folder: &Path) -> anyhow::Result<(Self, Recorded)> {
        let path = folder.join("phases");
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
            Err(error) => return Err(error).with_context(|| path.display().to_string()),
        };
        let recorded = read(&text);
        let phases = recorded.phases.iter().map(|(uid, phase)| (uid.as_str(), *phase));
        let written =
            write_anew(&path, phases, recorded.nodes.clone()).with_context(|| path.display().to_string())?;
        Ok((Self(Mutex::new(written)), recorded))
    }

    /// Notes which pods are in another phase now; none is a pod that is no more. `all` gives all phases.
    pub fn phases<'a, I: Iterator<Item = (&'a str, Phase)>>(
        &self,
        changed: &[(String, Option<Phase>)],
        all: impl FnOnce() -> (usize, I),
    ) -> io::Result<()> {
        let mut written = self.0.lock();
        if changed.is_empty() && !written.torn {
            return Ok(());
        }
        let (count, phases) = all();
        let most = 2 * (count + written.nodes.len()) + SPARE_LINES;
        if written.torn || written.lines + changed.len() > most {
            *written = write_anew(&written.path, phases, written.nodes.clone())?;
            return Ok(());
        }
        let mut lines = String::new();
        for (uid, phase) in changed {
            line(&mut lines, phase.map_or(GONE, Phase::name), uid);
        }
        written.add(&lines, changed.len())
    }

    /// Notes that this node is served.
    pub fn node(&self, node: &str) -> io::Result<()> {
        let mut written = self.0.lock();
        if written.nodes.insert(node.to_owned()) {
            return written.add_one(NODE, node);
        }
        Ok(())
    }

    /// Notes that this node is not waited for any more.
    pub fn node_left(&self, node: &str) -> io::Result<()> {
        let mut written = self.0.lock();
        if written.nodes.remove(node) {
            return written.add_one(LEFT, node);
        }
        Ok(())
    }
}

impl Written {
    fn add(&mut self, lines: &str, count: usize) -> io::Result<()> {
        self.lines += count;
        let done = self.file.write_all(lines.as_bytes());
        self.torn |= done.is_err();
        done
    }

    fn add_one(&mut self, word: &str, name: &str) -> io::Result<()> {
        let mut lines = String::new();
        line(&mut lines, word, name);
        self.add(&lines, 1)
    }
}

fn line(lines: &mut String, word: &str, name: &str) {
    // Names with a line's end in them are refused where objects and tokens are read.
    let _ = writeln!(lines, "{word} {name}");
}

fn read(text: &str) -> Recorded {
    let mut recorded = Recorded::default();
    // What does not end in a line's end was cut short by a crash, before anything followed from it.
    for line in text
        .split_inclusive('\n')
        .filter_map(|line| line.strip_suffix('\n'))
    {
        let Some((word, name)) = line.split_once(' ') else {
            continue;
        };
        match word {
            GONE => _ = recorded.phases.remove(name),
            NODE => _ = recorded.nodes.insert(name.to_owned()),
            LEFT => _ = recorded.nodes.remove(name),
            word => match Phase::named(word) {
                Some(phase) => _ = recorded.phases.insert(name.to_owned(), phase),
                None => tracing::warn!(
                    line,
                    "a phase of another version is not known; its pod counts as new"
                ),
            },
        }
    }
    recorded
}

/// Writes beside the file, then puts it in its place; later lines are added to it.
fn write_anew<'a>(
    path: &Path,
    phases: impl Iterator<Item = (&'a str, Phase)>,
    nodes: BTreeSet<String>,
) -> io::Result<Written> {
    let (mut text, mut lines) = (String::new(), nodes.len());
    for node in &nodes {
        line(&mut text, NODE, node);
    }
    for (uid, phase) in phases {
        line(&mut text, phase.name(), uid);
        lines += 1;
    }
    let part = path.with_extension("part");
    let mut file = File::create(&part)?;
    file.write_all(text.as_bytes())?;
    fs::rename(&part, path)?;
    Ok(Written {
        path: path.to_owned(),
        file,
        torn: false,
        lines,
        nodes,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use Phase::{Both, In, Leaving, Out};

    fn owned(phases: &[(&str, Option<Phase>)]) -> Vec<(String, Option<Phase>)> {
        let owned = phases.iter().map(|(uid, phase)| ((*uid).to_owned(), *phase));
        owned.collect()
    }

    #[test]
    fn what_is_noted_is_there_at_the_next_start() {
        let folder = tempfile::tempdir().unwrap();
        let (record, before) = Record::open(folder.path()).unwrap();
        assert_eq!(before, Recorded::default());
        let none = || (1000, std::iter::empty());
        let first = [("a", Some(In)), ("b", Some(Out)), ("c", Some(In))];
        record.phases(&owned(&first), none).unwrap();
        let second = [("a", Some(Leaving { since: 7 })), ("c", None)];
        record.phases(&owned(&second), none).unwrap();
        for node in ["n", "m", "n"] {
            record.node(node).unwrap();
        }
        record.node_left("m").unwrap();
        // Cut short by a crash.
        let path = folder.path().join("phases");
        let whole = fs::read_to_string(&path).unwrap();
        fs::write(&path, whole + "in d").unwrap();
        for _ in 0..2 {
            let (_, after) = Record::open(folder.path()).unwrap();
            let phases = [("a".to_owned(), Leaving { since: 0 }), ("b".to_owned(), Out)];
            assert_eq!(after.phases, phases.into());
            assert_eq!(after.nodes, ["n".to_owned()].into());
        }
    }

    #[test]
    fn what_could_not_be_written_is_written_once_it_can() {
        let folder = tempfile::tempdir().unwrap();
        let (record, _) = Record::open(folder.path()).unwrap();
        let all = || (1, [("a", In)].into_iter());
        record.0.lock().file = File::options().write(true).open("/dev/full").unwrap();
        assert!(record.node("n").is_err(), "a full disk");
        let aside = folder.path().join("phases.part");
        fs::create_dir(&aside).unwrap();
        assert!(record.phases(&[], all).is_err(), "and still a full one");
        fs::remove_dir(&aside).unwrap();
        record.phases(&owned(&[("a", Some(In))]), all).unwrap();
        let (_, after) = Record::open(folder.path()).unwrap();
        assert_eq!(after.phases, [("a".to_owned(), In)].into());
        assert_eq!(after.nodes, ["n".to_owned()].into());
    }

    #[test]
    fn the_file_does_not_grow_with_what_has_been() {
        let folder = tempfile::tempdir().unwrap();
        let (record, _) = Record::open(folder.path()).unwrap();
        let all = || (1, [("a", Both { since: 3 })].into_iter());
        for _ in 0..5 * SPARE_LINES {
            record.phases(&owned(&[("a", Some(In))]), all).unwrap();
        }
        let text = fs::read_to_string(folder.path().join("phases")).unwrap();
        assert!(
            text.lines().count() <= 2 * SPARE_LINES,
            "{}",
            text.lines().count()
        );
        record.phases(&owned(&[("b", Some(Out))]), all).unwrap();
        let (_, after) = Record::open(folder.path()).unwrap();
        assert_eq!(
            after.phases["b"], Out,
            "lines go on in the file that was put in place"
        );
    }
}
