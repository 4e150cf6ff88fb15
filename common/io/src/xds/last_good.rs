//! The last good state on disk: what control has said, so that a restart while it is away serves on.
//!
//! ```text
//! client ──changes──▶ Recorder ──every few seconds──▶ old file + changes, renamed into its place
//! start  ◀── resources with their versions, questions, age ──┘
//! ```
//! Invariant: what is read is whole (SHA-256) and at most a day old, or it is nothing; the digest detects
//! damage, not forgery (settled D6). Keys are no part of it. Writing delays nothing that is served: a disk
//! that is full, gone or slow costs a warning.

use culvert_proto::discovery::Resource;
use parking_lot::Mutex;
use prost::Message;
use sha2::{Digest, Sha256};
use std::{
    collections::HashMap,
    fs::{self, File, OpenOptions},
    io::{self, BufReader, BufWriter, Read, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};
use tokio::sync::{Notify, watch};

/// Older than this it is no state: a mesh has changed too much in a day.
const LASTS: Duration = Duration::from_secs(24 * 3600);

/// Pause after a change before it is written, so that a burst of changes is one write.
const SETTLES: Duration = Duration::from_secs(1);

/// Least time between two writes.
const BETWEEN_WRITES: Duration = Duration::from_secs(5);

/// A write may take this share of time, as a divisor: large meshes are written less often.
const SHARE: u32 = 50;

/// Written again after this without a change, so that its age says when control was last heard.
const CONFIRMED_EVERY: Duration = Duration::from_secs(1800);

/// Largest record that is read.
const MAX_RECORD: u32 = 16 * 1024 * 1024;

const FILE: &str = "snapshot";

/// Type of the first record: its name is control's version, its own version the time of writing.
const HEADER: &str = "culvert.dev/state/1";

/// Type of the records that say what control was asked.
pub(super) const QUESTION: &str = "culvert.dev/question";

/// What was read.
pub(super) struct Saved {
    /// `uid/n`, as control names its versions.
    pub source: String,
    pub age: Duration,
    pub records: Vec<Resource>,
}

/// Reads the state, or says why there is none. What cannot be used is removed.
pub(super) fn load(folder: &Path, now: SystemTime) -> Option<Saved> {
    let path = folder.join(FILE);
    let read = || -> io::Result<Option<Saved>> {
        let mut reader = Reader::open(&path)?;
        let mut records = vec![];
        while let Some(record) = reader.next()? {
            records.push(record);
        }
        // A clock that was set back makes it young, not invalid.
        let age = now.duration_since(reader.written).unwrap_or_default();
        Ok((age <= LASTS).then_some(Saved {
            source: reader.source,
            age,
            records,
        }))
    };
    let reason = match read() {
        Ok(Some(saved)) => return Some(saved),
        Ok(None) => "it is more than a day old".to_owned(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
        Err(error) => error.to_string(),
    };
    tracing::warn!(path = %path.display(), reason, "the last good state is not used");
    // What cannot be removed is refused again at the next start.
    let _ = fs::remove_file(&path);
    None
}

/// Collects changes until they are written. Clones share them.
#[derive(Clone, Default)]
pub(super) struct Recorder(Arc<Shared>);

#[derive(Default)]
struct Shared {
    changes: Mutex<Changes>,
    changed: Notify,
}

/// By type and name: the newest content, or none for what was removed.
#[derive(Default)]
struct Changes {
    source: String,
    by_type: HashMap<String, HashMap<String, Option<Resource>>>,
}

impl Changes {
    fn covers(&self, record: &Resource) -> bool {
        self.by_type
            .get(kind(record))
            .is_some_and(|names| names.contains_key(&record.name))
    }

    /// Puts what could not be written back, beneath what has come since.
    fn put_beneath(&mut self, older: Self) {
        for (kind, names) in older.by_type {
            let newer = self.by_type.entry(kind).or_default();
            for (name, record) in names {
                newer.entry(name).or_insert(record);
            }
        }
        if self.source.is_empty() {
            self.source = older.source;
        }
    }
}

fn kind(record: &Resource) -> &str {
    record
        .resource
        .as_ref()
        .map(|any| any.type_url.as_str())
        .unwrap_or_default()
}

impl Recorder {
    pub fn source(&self, version: &str) {
        version.clone_into(&mut self.0.changes.lock().source);
    }

    pub fn put(&self, kind: &str, name: String, version: String, value: Vec<u8>) {
        let record = Resource {
            name: name.clone(),
            version,
            resource: Some(prost_types::Any {
                type_url: kind.to_owned(),
                value,
            }),
            ..Resource::default()
        };
        self.change(kind, name, Some(record));
    }

    pub fn remove(&self, kind: &str, name: &str) {
        self.change(kind, name.to_owned(), None);
    }

    fn change(&self, kind: &str, name: String, record: Option<Resource>) {
        let mut changes = self.0.changes.lock();
        match changes.by_type.get_mut(kind) {
            Some(names) => _ = names.insert(name, record),
            None => _ = changes.by_type.insert(kind.to_owned(), [(name, record)].into()),
        }
        drop(changes);
        self.0.changed.notify_one();
    }

    /// Writes what is collected once all has been listed, for as long as it is polled. `age` says how long ago
    /// control was heard.
    pub async fn keep(
        self,
        folder: PathBuf,
        mut listed: watch::Receiver<bool>,
        age: impl Fn() -> Duration + Send,
    ) {
        if listed.wait_for(|listed| *listed).await.is_err() {
            return;
        }
        let mut failing = false;
        loop {
            let _ = tokio::time::timeout(CONFIRMED_EVERY, self.0.changed.notified()).await;
            tokio::time::sleep(SETTLES).await;
            let changes = std::mem::take(&mut *self.0.changes.lock());
            let started = Instant::now();
            let (changes, outcome) = match self
                .write(folder.clone(), changes, SystemTime::now() - age())
                .await
            {
                Some(done) => done,
                None => return,
            };
            match outcome {
                Ok(()) => {
                    // Not held through the pause: at first they are the whole mesh.
                    drop(changes);
                    if std::mem::take(&mut failing) {
                        tracing::info!("the last good state is written again");
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                    tracing::error!(%error, "the last good state was damaged; none is kept until the next start");
                    let _ = fs::remove_file(folder.join(FILE));
                    return;
                }
                Err(error) => {
                    if !std::mem::replace(&mut failing, true) {
                        tracing::warn!(%error, "the last good state cannot be written; serving on");
                    }
                    self.0.changes.lock().put_beneath(changes);
                    self.0.changed.notify_one();
                }
            }
            tokio::time::sleep(BETWEEN_WRITES.max(started.elapsed() * SHARE)).await;
        }
    }

    /// Writes what is collected, on this thread.
    #[cfg(test)]
    pub fn write_now(&self, folder: &Path) -> io::Result<()> {
        write(
            folder,
            &std::mem::take(&mut *self.0.changes.lock()),
            SystemTime::now(),
        )
    }

    async fn write(
        &self,
        folder: PathBuf,
        changes: Changes,
        heard: SystemTime,
    ) -> Option<(Changes, io::Result<()>)> {
        let write = move || {
            let outcome = write(&folder, &changes, heard);
            (changes, outcome)
        };
        tokio::task::spawn_blocking(write).await.ok()
    }
}

/// Merges the changes into what is there: memory holds the changes alone.
fn write(folder: &Path, changes: &Changes, now: SystemTime) -> io::Result<()> {
    if !folder.exists() {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    }
    let path = folder.join(FILE);
    let part = folder.join(format!("{FILE}.{}.part", std::process::id()));
    let written = merge(&path, &part, changes, now).and_then(|()| fs::rename(&part, &path));
    if written.is_err() {
        let _ = fs::remove_file(&part);
    }
    written
}

fn merge(path: &Path, part: &Path, changes: &Changes, now: SystemTime) -> io::Result<()> {
    let mut old = match Reader::open(path) {
        Ok(reader) => Some(reader),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(error),
    };
    let source = match &old {
        Some(old) if changes.source.is_empty() => old.source.clone(),
        _ => changes.source.clone(),
    };
    let mut writer = Writer::create(part)?;
    writer.put(&header(source, now))?;
    if let Some(old) = &mut old {
        while let Some(record) = old.next()? {
            if !changes.covers(&record) {
                writer.put(&record)?;
            }
        }
    }
    for record in changes.by_type.values().flat_map(HashMap::values).flatten() {
        writer.put(record)?;
    }
    writer.finish()
}

fn header(source: String, now: SystemTime) -> Resource {
    let seconds = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    Resource {
        name: source,
        version: seconds.to_string(),
        resource: Some(prost_types::Any {
            type_url: HEADER.to_owned(),
            value: vec![],
        }),
        ..Resource::default()
    }
}

/// Records, each after its length; a length of zero, then the digest of all before it.
struct Writer {
    to: BufWriter<File>,
    digest: Sha256,
}

impl Writer {
    fn create(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(path)?;
        Ok(Self {
            to: BufWriter::new(file),
            digest: Sha256::new(),
        })
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.digest.update(bytes);
        self.to.write_all(bytes)
    }

    fn put(&mut self, record: &Resource) -> io::Result<()> {
        let bytes = record.encode_to_vec();
        let length = u32::try_from(bytes.len()).map_err(io::Error::other)?;
        self.write(&length.to_be_bytes())?;
        self.write(&bytes)
    }

    fn finish(mut self) -> io::Result<()> {
        self.write(&0u32.to_be_bytes())?;
        let digest = self.digest.finalize();
        self.to.write_all(&digest)?;
        self.to.flush()?;
        self.to.get_ref().sync_all()
    }
}

struct Reader {
    from: BufReader<File>,
    digest: Sha256,
    source: String,
    written: SystemTime,
}

impl Reader {
    fn open(path: &Path) -> io::Result<Self> {
        let mut reader = Self {
            from: BufReader::new(File::open(path)?),
            digest: Sha256::new(),
            source: String::new(),
            written: UNIX_EPOCH,
        };
        let header = reader.next()?.filter(|record| kind(record) == HEADER);
        let header = header.ok_or_else(|| damaged("it does not begin as one"))?;
        let seconds = header.version.parse().map_err(|_| damaged("it has no time"))?;
        reader.source = header.name;
        reader.written = UNIX_EPOCH + Duration::from_secs(seconds);
        Ok(reader)
    }

    /// The next record; none once the digest has been found right.
    fn next(&mut self) -> io::Result<Option<Resource>> {
        let mut length = [0; 4];
        self.take(&mut length)?;
        let length = u32::from_be_bytes(length);
        if length == 0 {
            let mut digest = [0; 32];
            self.from.read_exact(&mut digest).map_err(cut_short)?;
            let right = self.digest.clone().finalize()[..] == digest;
            return if right {
                Ok(None)
            } else {
                Err(damaged("its digest differs"))
            };
        }
        if length > MAX_RECORD {
            return Err(damaged("a record is too long"));
        }
        let mut bytes = vec![0; length as usize];
        self.take(&mut bytes)?;
        let record = Resource::decode(bytes.as_slice()).map_err(|_| damaged("a record cannot be read"))?;
        Ok(Some(record))
    }

    fn take(&mut self, bytes: &mut [u8]) -> io::Result<()> {
        self.from.read_exact(bytes).map_err(cut_short)?;
        self.digest.update(&*bytes);
        Ok(())
    }
}

fn damaged(reason: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("it is damaged: {reason}"))
}

fn cut_short(error: io::Error) -> io::Error {
    if error.kind() == io::ErrorKind::UnexpectedEof {
        damaged("it is cut short")
    } else {
        error
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIND: &str = "type.example/Thing";

    fn recorder(changes: &[(&str, Option<&str>)]) -> Changes {
        let recorder = Recorder::default();
        recorder.source("uid/7");
        for (name, content) in changes {
            match content {
                Some(text) => recorder.put(KIND, (*name).into(), "1".into(), text.as_bytes().to_vec()),
                None => recorder.remove(KIND, name),
            }
        }
        std::mem::take(&mut *recorder.0.changes.lock())
    }

    fn names(saved: &Saved) -> Vec<&str> {
        let mut names: Vec<_> = saved.records.iter().map(|record| record.name.as_str()).collect();
        names.sort_unstable();
        names
    }

    #[test]
    fn what_is_written_is_read_with_changes_merged_and_its_age() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("state");
        let now = SystemTime::now();
        assert!(load(&folder, now).is_none());
        write(&folder, &recorder(&[("a", Some("1")), ("b", Some("1"))]), now).unwrap();
        write(&folder, &recorder(&[("a", None), ("c", Some("1"))]), now).unwrap();
        let saved = load(&folder, now + Duration::from_secs(60)).unwrap();
        assert_eq!((names(&saved), saved.source.as_str()), (vec!["b", "c"], "uid/7"));
        assert!(saved.age.as_secs().abs_diff(60) <= 1, "{:?}", saved.age);
        use std::os::unix::fs::PermissionsExt;
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&folder), mode(&folder.join(FILE))), (0o700, 0o600));
    }

    #[test]
    fn a_day_old_state_is_none_and_a_clock_set_back_makes_it_young() {
        let folder = tempfile::tempdir().unwrap();
        let now = SystemTime::now();
        write(folder.path(), &recorder(&[("a", Some("1"))]), now).unwrap();
        assert_eq!(
            load(folder.path(), now - Duration::from_secs(3600)).unwrap().age,
            Duration::ZERO
        );
        assert!(load(folder.path(), now + LASTS + Duration::from_secs(2)).is_none());
    }

    #[test]
    fn damage_anywhere_is_no_state_and_never_half_of_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(FILE);
        let now = SystemTime::now();
        write(
            folder.path(),
            &recorder(&[("a", Some("one")), ("b", Some("two"))]),
            now,
        )
        .unwrap();
        let whole = fs::read(&path).unwrap();
        for at in 0..whole.len() {
            let mut one = whole.clone();
            one[at] ^= 0x10;
            fs::write(&path, &one).unwrap();
            assert!(load(folder.path(), now).is_none(), "byte {at}");
            fs::write(&path, &whole[..at]).unwrap();
            assert!(load(folder.path(), now).is_none(), "cut at {at}");
        }
        fs::write(&path, &whole).unwrap();
        assert!(load(folder.path(), now).is_some());
    }

    #[test]
    fn f39_what_cannot_be_written_is_kept_for_later_beneath_what_is_newer() {
        let folder = tempfile::tempdir().unwrap();
        let blocked = folder.path().join("file");
        fs::write(&blocked, "no folder").unwrap();
        let older = recorder(&[("a", Some("old")), ("b", Some("old"))]);
        assert!(write(&blocked, &older, SystemTime::now()).is_err());
        let mut newer = recorder(&[("a", Some("new"))]);
        newer.put_beneath(older);
        let content = |name: &str| {
            newer.by_type[KIND][name]
                .as_ref()
                .unwrap()
                .resource
                .as_ref()
                .unwrap()
                .value
                .clone()
        };
        assert_eq!((content("a"), content("b")), (b"new".to_vec(), b"old".to_vec()));
    }
}
