//! Certificate revocation lists from a file.
//!
//! ```text
//! file ──looked at──▶ changed, and the same at the next look ──▶ lists, all or none ──▶ Identities
//! ```
//! Invariant: lists that were good stay in force until better ones are read. Until the first are read
//! nothing is trusted (settled: a list that is configured is demanded).

use culvert_io::{identity::Identities, tls::RevocationLists};
use prometheus::IntGauge;
use std::{
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::Duration,
};

/// Between two looks. A file counts once it is the same at two of them, so that half of one is not read.
const LOOK: Duration = Duration::from_millis(500);

/// Largest file that is read.
const MAX_BYTES: u64 = 64 * 1024 * 1024;

/// What tells one content of the file from the next without reading it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Mark {
    inode: u64,
    length: u64,
    modified: (i64, i64),
}

/// Watches the file for as long as it is polled.
pub async fn watch(path: PathBuf, identities: Identities, failing: IntGauge) {
    // What was last dealt with, and what was seen at the last look.
    let (mut done, mut seen) = (None, None);
    let mut first = true;
    loop {
        let mark = mark(&path).await;
        if first || (Some(&mark) != done.as_ref() && Some(&mark) == seen.as_ref()) {
            first = false;
            match read(&path, mark).await {
                Ok(lists) => {
                    identities.set_lists(lists);
                    failing.set(0);
                    tracing::info!(path = %path.display(), "revocation lists are in force");
                }
                Err(reason) => {
                    failing.set(1);
                    tracing::error!(path = %path.display(), reason, "revocation lists cannot be used; the last good ones stay in force");
                }
            }
            done = Some(mark);
        }
        seen = Some(mark);
        tokio::time::sleep(LOOK).await;
    }
}

async fn mark(path: &Path) -> Option<Mark> {
    let metadata = tokio::fs::metadata(path).await.ok()?;
    Some(Mark {
        inode: metadata.ino(),
        length: metadata.len(),
        modified: (metadata.mtime(), metadata.mtime_nsec()),
    })
}

async fn read(path: &Path, mark: Option<Mark>) -> Result<RevocationLists, String> {
    if mark.is_some_and(|mark| mark.length > MAX_BYTES) {
        return Err(format!("it is longer than {MAX_BYTES} bytes"));
    }
    let pem = tokio::fs::read_to_string(path).await.map_err(|e| e.to_string())?;
    let parse = move || RevocationLists::from_pem(&pem).map_err(|e| e.to_string());
    tokio::task::spawn_blocking(parse)
        .await
        .map_err(|e| e.to_string())?
}
