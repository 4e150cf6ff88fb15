//! Folders, right and wrong, and what is given out or said of them.

use super::*;

/// The objects of a YAML text, each as a change.
pub(crate) fn changes(text: &str) -> Vec<Change> {
    let parsed = documents(text).into_iter().map(|(_, document)| {
        let (id, object) = take(document).unwrap_or_else(|why| panic!("{why:?} in {document}"));
        Change {
            id,
            object: Some(object),
        }
    });
    parsed.collect()
}

fn any() -> Check {
    Arc::new(|_| Ok(vec![]))
}

fn load(path: &Path) -> Result<Vec<Change>, Vec<Mistake>> {
    Folder::new(path.to_owned(), any()).read_all()
}

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
        (
            "b.yaml",
            "\u{feff}apiVersion: v1\r\nkind: Namespace\r\nmetadata: {name: bank}\r\n",
        ),
        (".hidden.yaml", "{"),
        ("x.txt", "{"),
    ]);
    let kinds: Vec<Kind> = load(dir.path())
        .unwrap()
        .iter()
        .map(|change| change.id.kind)
        .collect();
    assert_eq!(
        kinds,
        [Kind::Namespace, Kind::Namespace, Kind::AuthorizationPolicy]
    );
    fs::write(dir.path().join("c.yaml"), b"# one\n# \xff\n").unwrap();
    let mistake = load(dir.path()).unwrap_err().remove(0).to_string();
    assert!(
        mistake.ends_with("c.yaml: line 2 is not UTF-8: save the file as UTF-8"),
        "{mistake}"
    );
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
        ("wrong type", policy("  rules: yes\n"), 10, "expected a list"),
        (
            "no port",
            format!(
                "{NAMESPACE}---\napiVersion: v1\nkind: Service\nmetadata: {{name: a, namespace: shop}}\nspec:\n  ports:\n  - port: many\n"
            ),
            11,
            "spec.ports[0].port: invalid type: string \"many\", expected a whole number from 0 to 65535",
        ),
        ("no object", "text\n".to_owned(), 1, "expected an object"),
        ("cut short", policy("  rules: [\n"), 11, "while parsing a flow"),
        ("twice", format!("{NAMESPACE}---\n{NAMESPACE}"), 6, "twice"),
        (
            "no name",
            "apiVersion: v1\nkind: Namespace\n".to_owned(),
            1,
            "metadata.name",
        ),
        (
            "unknown kind, which may have no name",
            "apiVersion: v1\nkind: List\nitems: []\n".to_owned(),
            1,
            "\"List\" of apiVersion",
        ),
    ] {
        let dir = folder(&[("p.yaml", &text)]);
        let mistakes = load(dir.path()).unwrap_err();
        let [mistake] = mistakes.as_slice() else {
            panic!("{case}: {mistakes:?}")
        };
        assert!(mistake.what.contains(says), "{case}: {mistake}");
        assert!(!mistake.what.contains(" at line "), "{case}: {mistake}");
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
        bomb +=
            &format!("{name}: &{name} [*{of},*{of},*{of},*{of},*{of},*{of},*{of},*{of}]\nz{name}: *{of}\n");
    }
    let dir = folder(&[("bomb.yaml", &bomb), ("huge.yaml", &" ".repeat(5 * 1024 * 1024))]);
    assert_eq!(load(dir.path()).unwrap_err().len(), 2);
}

#[tokio::test]
async fn the_last_good_state_stays_while_a_file_is_wrong() {
    let dir = folder(&[("ns.yaml", NAMESPACE)]);
    let health = watch::Sender::new(Health::default());
    let mut seen = health.subscribe();
    let (changed, mut changes) = mpsc::channel(1);
    tokio::spawn(watch_folder(dir.path().to_owned(), any(), changed, health));
    let wait = Duration::from_secs(10);
    let names = |batch: Vec<Change>| -> Vec<String> { batch.iter().map(|one| one.id.to_string()).collect() };
    let batch = tokio::time::timeout(wait, changes.recv()).await.unwrap().unwrap();
    assert_eq!(names(batch), ["Namespace shop"]);
    fs::write(dir.path().join("wrong.yaml"), "kind: [").unwrap();
    fs::remove_file(dir.path().join("ns.yaml")).unwrap();
    tokio::time::timeout(wait, seen.wait_for(|now| !now.mistakes.is_empty()))
        .await
        .unwrap()
        .unwrap();
    assert!(
        changes.try_recv().is_err(),
        "nothing is given out while anything is wrong"
    );
    assert!(
        seen.borrow().since.is_some(),
        "what is served is not the folder's"
    );
    fs::write(dir.path().join("wrong.yaml"), NAMESPACE.replace("shop", "bank")).unwrap();
    let batch = tokio::time::timeout(wait, changes.recv()).await.unwrap().unwrap();
    assert_eq!(
        names(batch),
        ["Namespace bank", "Namespace shop"],
        "one comes, one goes"
    );
    assert!(seen.borrow().mistakes.is_empty() && seen.borrow().since.is_none());
}

#[tokio::test]
async fn a_file_in_a_folder_named_from_here_is_one_file_when_it_changes() {
    let dir = folder(&[("ns.yaml", NAMESPACE)]);
    let here = std::env::current_dir().unwrap();
    let up: PathBuf = here.components().skip(1).map(|_| "..").collect();
    let relative = up.join(dir.path().strip_prefix("/").unwrap());
    assert!(
        relative.is_relative() && relative.is_dir(),
        "{}",
        relative.display()
    );
    let health = watch::Sender::new(Health::default());
    let seen = health.subscribe();
    let (changed, mut changes) = mpsc::channel(1);
    tokio::spawn(watch_folder(relative, any(), changed, health));
    let wait = Duration::from_secs(10);
    let mut next = async || tokio::time::timeout(wait, changes.recv()).await.unwrap().unwrap();
    assert_eq!(next().await.len(), 1);
    let other = NAMESPACE.to_owned() + "  labels: {a: b}\n";
    fs::write(dir.path().join("ns.yaml"), other).unwrap();
    assert_eq!(next().await.len(), 1);
    assert_eq!(seen.borrow().mistakes, []);
}

#[test]
fn a_change_is_what_its_file_says_anew() {
    let dir = folder(&[
        ("a.yaml", NAMESPACE),
        ("b.yaml", &NAMESPACE.replace("shop", "bank")),
    ]);
    let mut folder = Folder::new(dir.path().to_owned(), any());
    assert_eq!(folder.read_all().unwrap().len(), 2);
    assert_eq!(folder.read_all().unwrap(), []);
    // An object that moves to another file is the same object.
    fs::rename(dir.path().join("a.yaml"), dir.path().join("c.yaml")).unwrap();
    let touched = ["a.yaml", "c.yaml"].map(|name| dir.path().join(name)).into();
    assert_eq!(folder.read_some(&touched).unwrap(), []);
    fs::write(
        dir.path().join("c.yaml"),
        format!("{NAMESPACE}  labels: {{a: b}}\n"),
    )
    .unwrap();
    assert_eq!(folder.read_all().unwrap().len(), 1);
    fs::remove_file(dir.path().join("c.yaml")).unwrap();
    let gone = folder.read_all().unwrap();
    assert_eq!((gone.len(), gone[0].object.is_none()), (1, true));
}
