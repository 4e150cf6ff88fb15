//! What outlives the agent: a file per pod in the run folder, and the node's last settings.
//!
//! Invariant: a file is written beside its place and renamed into it, so that a reader sees the old or the
//! new one. Records are a memory of pods, never a proof: capture is looked at anew after every start.

use crate::{
    marks::Marks,
    orders::{PodOrder, Settings},
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::{
    collections::BTreeSet,
    fs, io,
    net::IpAddr,
    path::{Path, PathBuf},
};

/// A pod as the CNI plugin and control have described it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    pub uid: String,
    pub namespace: String,
    pub name: String,
    pub addresses: Vec<IpAddr>,
    /// The host end of the pod's link, in the agent's namespace; zero where the plugin did not say.
    pub host_ifindex: u32,
    /// Where the namespace is also found by path, if anywhere.
    pub netns_path: Option<PathBuf>,
    /// Device and inode of the namespace.
    pub netns: (u64, u64),
    pub marks: Marks,
    pub order: Option<PodOrder>,
}

/// The run folder.
#[derive(Debug, Clone)]
pub struct Records {
    folder: PathBuf,
}

/// Namespaces that took no part in the mesh when control last spoke of them.
pub type Apart = BTreeSet<String>;

impl Records {
    /// Opens the folder, making it where it is missing.
    pub fn open(folder: &Path) -> io::Result<Self> {
        fs::create_dir_all(folder.join("pods"))?;
        fs::create_dir_all(folder.join("netns"))?;
        Ok(Self {
            folder: folder.to_owned(),
        })
    }

    /// All pods; a file that cannot be read is reported and skipped.
    pub fn pods(&self) -> io::Result<Vec<Record>> {
        let mut records = vec![];
        for entry in fs::read_dir(self.folder.join("pods"))? {
            let path = entry?.path();
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            match read(&path) {
                Ok(record) => records.push(record),
                Err(error) => tracing::error!(path = %path.display(), %error, "a pod's record is unreadable"),
            }
        }
        Ok(records)
    }

    pub fn keep(&self, record: &Record) -> io::Result<()> {
        write(&self.pod(&record.uid), record)
    }

    pub fn forget(&self, uid: &str) -> io::Result<()> {
        match fs::remove_file(self.pod(uid)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    pub fn settings(&self) -> Option<Settings> {
        read(&self.folder.join("settings.json")).ok()
    }

    pub fn keep_settings(&self, settings: &Settings) -> io::Result<()> {
        write(&self.folder.join("settings.json"), settings)
    }

    pub fn apart(&self) -> Apart {
        read(&self.folder.join("apart.json")).unwrap_or_default()
    }

    pub fn keep_apart(&self, apart: &Apart) -> io::Result<()> {
        write(&self.folder.join("apart.json"), apart)
    }

    /// Where the agent itself keeps the namespace of a pod, when the runtime does not.
    pub fn own_netns(&self, uid: &str) -> PathBuf {
        self.folder.join("netns").join(uid)
    }

    fn pod(&self, uid: &str) -> PathBuf {
        self.folder.join("pods").join(format!("{uid}.json"))
    }
}

/// Whether a UID can name a file: what Kubernetes gives out, and nothing that leaves the folder.
pub fn is_uid(uid: &str) -> bool {
    (1..=128).contains(&uid.len())
        && uid
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
}

fn read<T: DeserializeOwned>(path: &Path) -> io::Result<T> {
    serde_json::from_slice(&fs::read(path)?).map_err(Into::into)
}

fn write(path: &Path, value: &impl Serialize) -> io::Result<()> {
    let part = path.with_extension("part");
    fs::write(&part, serde_json::to_vec(value)?)?;
    fs::rename(part, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_read_as_it_was_written_and_a_damaged_one_is_skipped() {
        let folder = tempfile::tempdir().unwrap();
        let records = Records::open(folder.path()).unwrap();
        let record = Record {
            uid: "u-1".into(),
            namespace: "shop".into(),
            name: "web".into(),
            addresses: vec!["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()],
            host_ifindex: 7,
            netns_path: None,
            netns: (4, 4026532000),
            marks: Marks::random(),
            order: Some(PodOrder {
                enrolled: true,
                ..Default::default()
            }),
        };
        records.keep(&record).unwrap();
        fs::write(folder.path().join("pods/u-2.json"), b"{\"uid\":").unwrap();
        assert_eq!(records.pods().unwrap(), [record]);
        records.forget("u-1").unwrap();
        records.forget("u-1").unwrap();
        assert!(records.pods().unwrap().is_empty());
    }

    #[test]
    fn a_uid_never_names_a_file_elsewhere() {
        for (uid, want) in [
            ("c4a760a8-dbcf-4e14-9f8e-b6dd2fe0b5d5", true),
            ("", false),
            ("../x", false),
            ("a/b", false),
            ("a.b", false),
        ] {
            assert_eq!(is_uid(uid), want, "{uid}");
        }
    }
}
