//! The folder source.

use super::objects::{Key, Metadata, Objects};
use notify::{RecursiveMode, Watcher};
use serde::{Deserialize, de::DeserializeOwned};
use std::{
    collections::BTreeMap,
    fmt, fs, io,
    path::{Path, PathBuf},
    time::Duration,
};
use tokio::sync::{mpsc, watch};

/// A file larger than this is no object of ours.
const MAX_FILE: u64 = 4 * 1024 * 1024;

/// Anchors let a short YAML text expand without bound; objects need none.
const MAX_ALIASES: usize = 16;

/// How long a burst of changes is collected before the folder is read.
const DEBOUNCE: Duration = Duration::from_millis(20);

/// How often the folder is read though nothing was heard: a net under lost notifications.
const POLL: Duration = Duration::from_secs(5);

/// A mistake in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mistake {
    pub file: PathBuf,
    pub line: usize,
    pub what: String,
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.file.display(), self.line, self.what)
    }
}

#[derive(Deserialize)]
struct Head {
    #[serde(rename = "apiVersion", default)]
    api_version: String,
    #[serde(default)]
    kind: String,
    metadata: Option<Metadata>,
}

/// Reads the whole folder: all of it, or the mistakes in it.
pub fn load(folder: &Path) -> Result<Objects, Vec<Mistake>> {
    let mut objects = Objects::default();
    let mut mistakes = vec![];
    let files = match files(folder) {
        Ok(files) => files,
        Err(error) => {
            return Err(vec![Mistake {
                file: folder.to_owned(),
                line: 0,
                what: format!("cannot be read: {error}"),
            }]);
        }
    };
    for file in files {
        let mistake = |line, what| Mistake {
            file: file.clone(),
            line,
            what,
        };
        match text(&file) {
            Ok(text) => {
                for (line, document) in documents(&text) {
                    if let Err((at, what)) = take(&mut objects, document) {
                        mistakes.push(mistake(line + at, what));
                    }
                }
            }
            // It was there a moment ago: a rename in progress, and a notification follows.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => mistakes.push(mistake(0, error.to_string())),
        }
    }
    if mistakes.is_empty() {
        Ok(objects)
    } else {
        Err(mistakes)
    }
}

fn files(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let mut files = vec![];
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let hidden = path
            .file_name()
            .is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
        if !hidden
            && path
                .extension()
                .is_some_and(|kind| kind == "yaml" || kind == "yml")
        {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

fn text(file: &Path) -> io::Result<String> {
    let length = fs::metadata(file)?.len();
    if length > MAX_FILE {
        return Err(io::Error::other(format!(
            "{length} bytes; at most {MAX_FILE} are read"
        )));
    }
    fs::read_to_string(file)
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
    serde_yaml::from_str(document)
        .map_err(|error| (error.location().map_or(1, |at| at.line()), error.to_string()))
}

/// Reads one document into its kind's map.
fn take(objects: &mut Objects, document: &str) -> Result<(), Refused> {
    let aliases = document.matches(['&', '*']).count();
    if document.contains(": *") && aliases > MAX_ALIASES {
        return Err((
            1,
            "YAML anchors and aliases are not expanded here; write the values out".to_owned(),
        ));
    }
    let head: Head = parse(document)?;
    let metadata = head.metadata.unwrap_or_default();
    if metadata.name.is_empty() {
        return Err((1, "metadata.name is missing".to_owned()));
    }
    let group = head.api_version.rsplit_once('/').map_or("", |(group, _)| group);
    match (group, head.kind.as_str()) {
        ("", "Namespace") => {
            let name = metadata.name.clone();
            insert(&mut objects.namespaces, name, parse(document)?, &head.kind)
        }
        ("", "Pod") => insert(&mut objects.pods, key(&metadata)?, parse(document)?, &head.kind),
        ("", "Service") => insert(
            &mut objects.services,
            key(&metadata)?,
            parse(document)?,
            &head.kind,
        ),
        ("culvert.dev", "Workload") => insert(
            &mut objects.workloads,
            key(&metadata)?,
            parse(document)?,
            &head.kind,
        ),
        ("culvert.dev", "ExternalService") => insert(
            &mut objects.externals,
            key(&metadata)?,
            parse(document)?,
            &head.kind,
        ),
        ("culvert.dev" | "security.istio.io", "AuthorizationPolicy") => insert(
            &mut objects.policies,
            key(&metadata)?,
            parse(document)?,
            &head.kind,
        ),
        ("culvert.dev" | "security.istio.io", "PeerAuthentication") => insert(
            &mut objects.peer_authentications,
            key(&metadata)?,
            parse(document)?,
            &head.kind,
        ),
        (_, kind) => Err((
            1,
            format!(
                "kind {kind:?} of apiVersion {:?} is not read here; known are Namespace, Pod, Service (v1), Workload, \
                 ExternalService, AuthorizationPolicy, PeerAuthentication (culvert.dev/v1alpha1; the last two also \
                 security.istio.io/v1)",
                head.api_version
            ),
        )),
    }
}

fn key(metadata: &Metadata) -> Result<Key, Refused> {
    if metadata.namespace.is_empty() {
        return Err((1, "metadata.namespace is missing".to_owned()));
    }
    Ok(Key {
        namespace: metadata.namespace.clone(),
        name: metadata.name.clone(),
    })
}

fn insert<K: Ord + fmt::Debug, V>(
    map: &mut BTreeMap<K, V>,
    key: K,
    value: V,
    kind: &str,
) -> Result<(), Refused> {
    if map.contains_key(&key) {
        return Err((1, format!("{kind} {key:?} is defined twice; remove one of them")));
    }
    map.insert(key, value);
    Ok(())
}

/// What the source says now.
#[derive(Debug, Clone, Default)]
pub struct Latest {
    /// The last good objects.
    pub objects: std::sync::Arc<Objects>,
    /// What is wrong with the folder as it is now.
    pub mistakes: Vec<Mistake>,
}

/// Watches the folder for as long as it is polled. `check` may refuse objects that are each valid but do
/// not fit together.
pub async fn watch_folder(
    folder: PathBuf,
    latest: watch::Sender<Latest>,
    check: impl Fn(&Objects) -> Result<(), String>,
) -> notify::Result<()> {
    let (changed, mut changes) = mpsc::channel(1);
    let mut watcher = notify::recommended_watcher(move |_event| {
        // One waiting notification says all.
        let _ = changed.try_send(());
    })?;
    watcher.watch(&folder, RecursiveMode::NonRecursive)?;
    loop {
        let loaded = load(&folder).and_then(|objects| match check(&objects) {
            Ok(()) => Ok(objects),
            Err(what) => Err(vec![Mistake {
                file: folder.clone(),
                line: 0,
                what,
            }]),
        });
        match loaded {
            Ok(objects) => {
                latest.send_if_modified(|now| {
                    let cleared = !std::mem::take(&mut now.mistakes).is_empty();
                    if *now.objects == objects {
                        return cleared;
                    }
                    now.objects = std::sync::Arc::new(objects);
                    true
                });
            }
            Err(mistakes) => {
                latest.send_if_modified(|now| {
                    if now.mistakes == mistakes {
                        return false;
                    }
                    for mistake in &mistakes {
                        tracing::error!(%mistake, "rejected; the last good state stays");
                    }
                    now.mistakes = mistakes;
                    true
                });
            }
        }
        tokio::select! {
            _ = changes.recv() => tokio::time::sleep(DEBOUNCE).await,
            () = tokio::time::sleep(POLL) => {}
        }
        while changes.try_recv().is_ok() {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            fs::write(dir.path().join(name), text).unwrap();
        }
        dir
    }

    const NAMESPACE: &str = "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: shop\n";

    #[test]
    fn a_folder_is_read_whole() {
        let policy = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: a, namespace: shop}\nspec:\n  action: DENY\n  rules:\n  - from:\n    - source: {principals: [cluster.local/ns/shop/sa/web]}\n";
        let dir = folder(&[
            ("a.yaml", &format!("# first\n---\n{NAMESPACE}---\n{policy}")),
            (".hidden.yaml", "{"),
            ("x.txt", "{"),
        ]);
        let objects = load(dir.path()).unwrap();
        assert_eq!((objects.namespaces.len(), objects.policies.len()), (1, 1));
    }

    #[test]
    fn a_mistake_is_named_with_file_and_line() {
        let policy = |spec: &str| {
            format!(
                "{NAMESPACE}---\napiVersion: culvert.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {{name: a, namespace: shop}}\nspec:\n{spec}"
            )
        };
        for (case, text, line, says) in [
            ("unknown field", policy("  actoin: DENY\n"), 10, "actoin"),
            ("unknown action", policy("  action: CUSTOM\n"), 10, "CUSTOM"),
            (
                "unknown field deep down",
                policy("  rules:\n  - from:\n    - source:\n        principles: [a]\n"),
                13,
                "principles",
            ),
            ("wrong type", policy("  rules: yes\n"), 10, "rules"),
            ("twice", format!("{NAMESPACE}---\n{NAMESPACE}"), 6, "twice"),
            (
                "no name",
                "apiVersion: v1\nkind: Namespace\n".to_owned(),
                1,
                "metadata.name",
            ),
            (
                "unknown kind",
                "apiVersion: v1\nkind: Secret\nmetadata: {name: x}\n".to_owned(),
                1,
                "Secret",
            ),
        ] {
            let dir = folder(&[("p.yaml", &text)]);
            let mistakes = load(dir.path()).unwrap_err();
            let [mistake] = mistakes.as_slice() else {
                panic!("{case}: {mistakes:?}")
            };
            assert!(mistake.what.contains(says), "{case}: {mistake}");
            assert!(
                mistake.line.abs_diff(line) <= 1,
                "{case}: {mistake}, wanted about line {line}"
            );
        }
    }

    #[test]
    fn t50_an_alias_bomb_and_a_huge_file_are_refused() {
        let mut bomb = "apiVersion: v1\nkind: Namespace\na: &a [x,x,x,x,x,x,x,x,x]\n".to_owned();
        for (name, of) in ["b", "c", "d", "e", "f"]
            .into_iter()
            .zip(["a", "b", "c", "d", "e"])
        {
            bomb += &format!(
                "{name}: &{name} [*{of},*{of},*{of},*{of},*{of},*{of},*{of},*{of}]\nz{name}: *{of}\n"
            );
        }
        let dir = folder(&[("bomb.yaml", &bomb), ("huge.yaml", &" ".repeat(5 * 1024 * 1024))]);
        assert_eq!(load(dir.path()).unwrap_err().len(), 2);
    }

    #[tokio::test]
    async fn the_last_good_state_stays_while_a_file_is_wrong() {
        let dir = folder(&[("ns.yaml", NAMESPACE)]);
        let latest = watch::Sender::new(Latest::default());
        let mut seen = latest.subscribe();
        tokio::spawn(watch_folder(dir.path().to_owned(), latest, |_| Ok(())));
        let wait = Duration::from_secs(10);
        let good = |latest: &Latest| latest.objects.namespaces.len() == 1 && latest.mistakes.is_empty();
        tokio::time::timeout(wait, seen.wait_for(good))
            .await
            .unwrap()
            .unwrap();
        fs::write(dir.path().join("wrong.yaml"), "kind: [").unwrap();
        let wrong = |latest: &Latest| latest.objects.namespaces.len() == 1 && !latest.mistakes.is_empty();
        tokio::time::timeout(wait, seen.wait_for(wrong))
            .await
            .unwrap()
            .unwrap();
        fs::write(dir.path().join("wrong.yaml"), NAMESPACE.replace("shop", "bank")).unwrap();
        let both = |latest: &Latest| latest.objects.namespaces.len() == 2 && latest.mistakes.is_empty();
        tokio::time::timeout(wait, seen.wait_for(both))
            .await
            .unwrap()
            .unwrap();
    }
}
