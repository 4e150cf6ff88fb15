//! The folder source.
//!
//! ```text
//! file changed ──▶ its documents, parsed and checked ──▶ claims: no two objects hold one ──▶ Changes
//! ```
//! Invariant: what is given out is whole and valid. One mistake anywhere in the folder and nothing is given
//! out; a change costs what its file holds, not what the folder holds.

use super::{
    claims::{Claim, Claims},
    mistake::Mistake,
    objects::{Change, Key, Kind, Metadata, Object, ObjectId},
};
use notify::{RecursiveMode, Watcher};
use parking_lot::Mutex;
use serde::{Deserialize, de::DeserializeOwned};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::{Notify, mpsc, watch};

/// A file larger than this is no object of ours.
const MAX_FILE: u64 = 4 * 1024 * 1024;

/// Anchors let a short YAML text expand without bound; objects need none.
const MAX_ALIASES: usize = 16;

/// How long a burst of changes is collected before the files are read.
const DEBOUNCE: Duration = Duration::from_millis(20);

/// How often the folder is read though nothing was heard: a net under lost notifications.
const POLL: Duration = Duration::from_secs(5);

/// Judges one object by itself: what it claims for itself alone, or why it is not taken.
pub type Check = Arc<dyn Fn(&Object) -> Result<Vec<Claim>, String> + Send + Sync>;

/// The folder as it was read last.
pub struct Folder {
    path: PathBuf,
    check: Check,
    files: BTreeMap<PathBuf, File>,
    /// Files with mistakes.
    bad: BTreeSet<PathBuf>,
    claims: Claims,
    /// What may differ from `good`.
    touched: BTreeSet<ObjectId>,
    /// What was given out.
    good: HashMap<ObjectId, Object>,
}

/// One file's content; a file that cannot be read whole has mistakes and no objects.
#[derive(Default)]
struct File {
    stamp: Stamp,
    read: Vec<Read>,
    mistakes: Vec<Mistake>,
}

impl File {
    fn at(&self, line: usize) -> Option<&Read> {
        let index = self.read.binary_search_by_key(&line, |read| read.line).ok()?;
        self.read.get(index)
    }
}

/// Tells one version of a file from the next.
type Stamp = (i64, i64, u64, u64);

struct Read {
    line: usize,
    id: ObjectId,
    object: Object,
    claims: Vec<Claim>,
}

impl Folder {
    pub fn new(path: PathBuf, check: Check) -> Self {
        Self {
            path,
            check,
            files: BTreeMap::new(),
            bad: BTreeSet::new(),
            claims: Claims::default(),
            touched: BTreeSet::new(),
            good: HashMap::new(),
        }
    }

    /// Reads every file that is not what it was.
    pub fn read_all(&mut self) -> Result<Vec<Change>, Vec<Mistake>> {
        let present = match files(&self.path) {
            Ok(files) => files,
            Err(error) => {
                return Err(vec![Mistake {
                    file: self.path.clone(),
                    line: 0,
                    what: format!("cannot be read: {error}"),
                }]);
            }
        };
        let gone: Vec<PathBuf> = self
            .files
            .keys()
            .filter(|file| !present.contains(*file))
            .cloned()
            .collect();
        for file in present {
            let known = self.files.get(&file).map(|file| file.stamp);
            if known.is_none() || known != stamp(&file) {
                self.read_file(&file);
            }
        }
        for file in gone {
            self.read_file(&file);
        }
        self.outcome()
    }

    /// Reads these files, whatever they were.
    pub fn read_some(&mut self, files: &BTreeSet<PathBuf>) -> Result<Vec<Change>, Vec<Mistake>> {
        for file in files.iter().filter(|file| is_ours(file)) {
            self.read_file(file);
        }
        self.outcome()
    }

    fn read_file(&mut self, path: &Path) {
        let before = self.files.remove(path).unwrap_or_default();
        self.bad.remove(path);
        for read in &before.read {
            self.touched.insert(read.id.clone());
            self.claims.leave(path, read.line, &read.claims);
        }
        let stamp = stamp(path).unwrap_or_default();
        let mut file = match text(path) {
            Ok(text) => parse_file(path, &text, &self.check),
            // Gone, or a rename in progress of which a notification follows.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return,
            Err(error) => File {
                mistakes: vec![Mistake {
                    file: path.to_owned(),
                    line: 0,
                    what: error.to_string(),
                }],
                ..File::default()
            },
        };
        file.stamp = stamp;
        for read in &file.read {
            self.touched.insert(read.id.clone());
            self.claims.take(path, read.line, &read.id, &read.claims);
        }
        if !file.mistakes.is_empty() {
            self.bad.insert(path.to_owned());
        }
        self.files.insert(path.to_owned(), file);
    }

    /// What has changed since the last good state, if the folder is good now.
    fn outcome(&mut self) -> Result<Vec<Change>, Vec<Mistake>> {
        let bad = self.bad.iter().filter_map(|file| self.files.get(file));
        let in_files = bad.flat_map(|file| file.mistakes.iter().cloned());
        let mistakes: Vec<Mistake> = in_files.chain(self.claims.contested()).collect();
        if !mistakes.is_empty() {
            return Err(mistakes);
        }
        let mut changes = vec![];
        for id in std::mem::take(&mut self.touched) {
            let now = self
                .claims
                .holder(&Claim::Object(id.clone()))
                .and_then(|(file, line)| self.files.get(file)?.at(line))
                .map(|read| read.object.clone());
            if self.good.get(&id) != now.as_ref() {
                match &now {
                    Some(object) => self.good.insert(id.clone(), object.clone()),
                    None => self.good.remove(&id),
                };
                changes.push(Change { id, object: now });
            }
        }
        Ok(changes)
    }
}

fn is_ours(path: &Path) -> bool {
    let hidden = path
        .file_name()
        .is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
    !hidden
        && path
            .extension()
            .is_some_and(|kind| kind == "yaml" || kind == "yml")
}

fn files(folder: &Path) -> io::Result<BTreeSet<PathBuf>> {
    let mut files = BTreeSet::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if is_ours(&path) {
            files.insert(path);
        }
    }
    Ok(files)
}

fn stamp(file: &Path) -> Option<Stamp> {
    let about = fs::metadata(file).ok()?;
    Some((about.mtime(), about.mtime_nsec(), about.len(), about.ino()))
}

fn text(file: &Path) -> io::Result<String> {
    let length = fs::metadata(file)?.len();
    if length > MAX_FILE {
        return Err(io::Error::other(format!(
            "{length} bytes; at most {MAX_FILE} are read: divide it"
        )));
    }
    let text = String::from_utf8(fs::read(file)?).map_err(|error| {
        let line = error.as_bytes()[..error.utf8_error().valid_up_to()]
            .iter()
            .filter(|byte| **byte == b'\n')
            .count();
        io::Error::other(format!("line {} is not UTF-8: save the file as UTF-8", line + 1))
    })?;
    // Some editors begin a file with a byte order mark.
    match text.strip_prefix('\u{feff}') {
        Some(rest) => Ok(rest.to_owned()),
        None => Ok(text),
    }
}

fn parse_file(path: &Path, text: &str, check: &Check) -> File {
    let mut file = File::default();
    for (line, document) in documents(text) {
        let checked = take(document).and_then(|(id, object)| match check(&object) {
            Ok(mut claims) => {
                claims.push(Claim::Object(id.clone()));
                claims.sort_unstable();
                claims.dedup();
                Ok(Read {
                    line: line + 1,
                    id,
                    object,
                    claims,
                })
            }
            Err(why) => Err((line_of(document, &why), format!("{id}: {why}"))),
        });
        match checked {
            Ok(read) => file.read.push(read),
            Err((at, what)) => file.mistakes.push(Mistake {
                file: path.to_owned(),
                line: line + at,
                what,
            }),
        }
    }
    file
}

/// The line of a document that holds a value which the mistake quotes; the first one if none does.
fn line_of(document: &str, why: &str) -> usize {
    why.split('"')
        .skip(1)
        .step_by(2)
        .filter(|value| !value.is_empty())
        .find_map(|value| document.lines().position(|line| line.contains(value)))
        .map_or(1, |index| index + 1)
}

/// The documents of a file with the number of lines before each.
fn documents(text: &str) -> Vec<(usize, &str)> {
    let mut documents = vec![];
    let (mut start, mut first_line) = (0, 0);
    let mut offset = 0;
    for (number, line) in text.split_inclusive('\n').enumerate() {
        let end = offset;
        offset += line.len();
        if line.trim_end() == "---" {
            documents.push((first_line, &text[start..end]));
            (start, first_line) = (offset, number + 1);
        }
    }
    documents.push((first_line, &text[start..]));
    let blank = |document: &str| {
        document
            .lines()
            .all(|line| line.trim().is_empty() || line.trim_start().starts_with('#'))
    };
    documents.retain(|(_, document)| !blank(document));
    documents
}

type Refused = (usize, String);

fn parse<T: DeserializeOwned>(document: &str) -> Result<T, Refused> {
    serde_yaml::from_str(document).map_err(|error| {
        let line = error.location().map_or(1, |at| at.line());
        (line, readable(&error.to_string()))
    })
}

/// The parser's message in the words of whoever wrote the file.
fn readable(message: &str) -> String {
    let mut text = without_places(message);
    for (word, meaning) in [
        ("expected u16", "expected a whole number from 0 to 65535"),
        ("expected u32", "expected a whole number"),
        ("expected a sequence", "expected a list"),
        (
            "expected struct Head",
            "expected an object: a map with apiVersion, kind and metadata",
        ),
    ] {
        text = text.replace(word, meaning);
    }
    match text.find("expected struct ") {
        Some(at) => text[..at].to_owned() + "expected a map of fields",
        None => text,
    }
}

/// Places in it count from the document's start; the mistake has the file's own line.
fn without_places(message: &str) -> String {
    const PLACE: &str = " at line ";
    fn after_digits(text: &str) -> &str {
        text.trim_start_matches(|c: char| c.is_ascii_digit())
    }
    let (mut text, mut rest) = (String::new(), message);
    while let Some(at) = rest.find(PLACE) {
        text.push_str(&rest[..at]);
        rest = after_digits(&rest[at + PLACE.len()..]);
        rest = rest.strip_prefix(" column ").map_or(rest, after_digits);
    }
    text + rest
}

#[derive(Deserialize)]
struct Head {
    #[serde(rename = "apiVersion", default)]
    api_version: String,
    #[serde(default)]
    kind: String,
    metadata: Option<Metadata>,
}

/// Reads one document.
fn take(document: &str) -> Result<(ObjectId, Object), Refused> {
    let aliases = document.matches(['&', '*']).count();
    if document.contains(": *") && aliases > MAX_ALIASES {
        return Err((
            1,
            "YAML anchors and aliases are not expanded here; write the values out".to_owned(),
        ));
    }
    let head: Head = parse(document)?;
    let kind = kind_of(&head.api_version, &head.kind)?;
    let metadata = head.metadata.unwrap_or_default();
    if metadata.name.is_empty() {
        return Err((1, "metadata.name is missing; every object has a name".to_owned()));
    }
    let object = read_kind(kind, document)?;
    let namespace = match kind {
        Kind::Namespace | Kind::Node => String::new(),
        _ if metadata.namespace.is_empty() => {
            return Err((
                1,
                format!(
                    "{kind:?} {}: metadata.namespace is missing; name the namespace",
                    metadata.name
                ),
            ));
        }
        _ => metadata.namespace,
    };
    let key = Key {
        namespace,
        name: metadata.name,
    };
    Ok((ObjectId { kind, key }, object))
}

fn kind_of(api_version: &str, kind: &str) -> Result<Kind, Refused> {
    let group = api_version.rsplit_once('/').map_or("", |(group, _)| group);
    Ok(match (group, kind) {
        ("", "Namespace") => Kind::Namespace,
        ("", "Node") => Kind::Node,
        ("", "Pod") => Kind::Pod,
        ("", "Service") => Kind::Service,
        ("discovery.k8s.io", "EndpointSlice") => Kind::EndpointSlice,
        ("culvert.dev", "Workload") => Kind::Workload,
        ("culvert.dev", "ExternalService") => Kind::ExternalService,
        ("culvert.dev" | "security.istio.io", "AuthorizationPolicy") => Kind::AuthorizationPolicy,
        ("culvert.dev" | "security.istio.io", "PeerAuthentication") => Kind::PeerAuthentication,
        _ => {
            return Err((
                1,
                format!(
                    "kind {kind:?} of apiVersion {api_version:?} is not read here; known are Namespace, Node, Pod, \
                     Service (v1), EndpointSlice (discovery.k8s.io/v1), Workload, ExternalService, \
                     AuthorizationPolicy, PeerAuthentication (culvert.dev/v1alpha1; the last two also \
                     security.istio.io/v1)"
                ),
            ));
        }
    })
}

fn read_kind(kind: Kind, document: &str) -> Result<Object, Refused> {
    fn of<T: DeserializeOwned>(document: &str, make: fn(Arc<T>) -> Object) -> Result<Object, Refused> {
        parse(document).map(|one| make(Arc::new(one)))
    }
    match kind {
        Kind::Namespace => of(document, Object::Namespace),
        Kind::Node => of(document, Object::Node),
        Kind::Pod => of(document, Object::Pod),
        Kind::Service => of(document, Object::Service),
        Kind::EndpointSlice => of(document, Object::EndpointSlice),
        Kind::Workload => of(document, Object::Workload),
        Kind::ExternalService => of(document, Object::ExternalService),
        Kind::AuthorizationPolicy => of(document, Object::AuthorizationPolicy),
        Kind::PeerAuthentication => of(document, Object::PeerAuthentication),
    }
}

/// How the source is now.
#[derive(Debug, Clone, Default)]
pub struct Health {
    /// What is wrong with the folder; the last good state stays while there is anything.
    pub mistakes: Vec<Mistake>,
    /// Since when there has been something wrong without a break.
    pub since: Option<Instant>,
}

/// What was heard of the folder and not yet looked at.
#[derive(Default)]
struct Heard {
    files: BTreeSet<PathBuf>,
    /// Something that names no file.
    all: bool,
}

/// Watches the folder for as long as somebody takes its changes. The first batch is sent once the folder has
/// been read whole, even if it is empty.
pub async fn watch_folder(
    path: PathBuf,
    check: Check,
    changes: mpsc::Sender<Vec<Change>>,
    health: watch::Sender<Health>,
) -> notify::Result<()> {
    // A file is known by its path: what is heard of it names it as what is read does.
    let path = std::path::absolute(path).map_err(notify::Error::io)?;
    let heard = Arc::new((Mutex::new(Heard::default()), Notify::new()));
    let ear = heard.clone();
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        match event {
            Ok(event) if event.kind.is_access() => return,
            Ok(event) if !event.need_rescan() => ear.0.lock().files.extend(event.paths),
            Ok(_) | Err(_) => ear.0.lock().all = true,
        }
        ear.1.notify_one();
    })?;
    watcher.watch(&path, RecursiveMode::NonRecursive)?;
    let mut folder = Folder::new(path, check);
    heard.0.lock().all = true;
    let mut first = true;
    loop {
        let Heard { files, all } = std::mem::take(&mut *heard.0.lock());
        // Files are read and parsed on a thread that may block.
        let reading = tokio::task::spawn_blocking(move || {
            let outcome = if all {
                folder.read_all()
            } else {
                folder.read_some(&files)
            };
            (folder, outcome)
        });
        let Ok((same, outcome)) = reading.await else {
            return Err(notify::Error::generic("the reader of the folder has panicked"));
        };
        folder = same;
        match outcome {
            Ok(batch) => {
                health.send_if_modified(|now| !std::mem::take(now).mistakes.is_empty());
                if (first || !batch.is_empty()) && changes.send(batch).await.is_err() {
                    return Ok(());
                }
                first = false;
            }
            Err(mistakes) => {
                health.send_if_modified(|now| {
                    if now.mistakes == mistakes {
                        return false;
                    }
                    for mistake in &mistakes {
                        tracing::error!(%mistake, "rejected; the last good state stays");
                    }
                    now.mistakes = mistakes;
                    now.since.get_or_insert_with(Instant::now);
                    true
                });
            }
        }
        tokio::select! {
            () = heard.1.notified() => tokio::time::sleep(DEBOUNCE).await,
            () = tokio::time::sleep(POLL) => heard.0.lock().all = true,
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
