//! The folder that `control` reads: one file per object, put in place by rename.
//!
//! Invariant: a reader never sees half a file, and an object applied again replaces its file.

use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};

use crate::lab::{Addresses, Pod};

/// The label, on a namespace or a pod, that takes part in the mesh.
pub const ENROL: &str = "culvert.dev/dataplane-mode";

#[derive(Debug)]
pub struct ConfigFolder {
    folder: PathBuf,
    /// On the same file system, where nobody looks.
    aside: PathBuf,
    serial: AtomicU64,
}

impl ConfigFolder {
    pub fn new(folder: PathBuf, aside: PathBuf) -> Result<Self> {
        fs::create_dir_all(&folder)?;
        fs::create_dir_all(&aside)?;
        Ok(Self {
            folder,
            aside,
            serial: AtomicU64::new(0),
        })
    }

    /// Where it is, as this process sees it.
    pub fn folder(&self) -> &std::path::Path {
        &self.folder
    }

    /// Puts every object of a YAML text (documents divided by `---`) in place, each in its file.
    pub fn apply(&self, yaml: &str) -> Result<()> {
        for document in documents(yaml) {
            let object: Value = serde_yaml::from_str(document).with_context(|| document.to_owned())?;
            self.write(&file_name(&object), document)?;
        }
        Ok(())
    }

    pub fn apply_object(&self, object: &Value) -> Result<()> {
        // JSON is YAML; so tall, a mistake has a line number of use.
        self.write(&file_name(object), &serde_json::to_string_pretty(object)?)
    }

    /// Puts any text in place as `name`: to see it refused.
    pub fn write(&self, name: &str, text: &str) -> Result<()> {
        let serial = self.serial.fetch_add(1, Ordering::Relaxed);
        let part = self.aside.join(format!("{serial}"));
        fs::write(&part, text)?;
        fs::rename(&part, self.folder.join(name)).with_context(|| name.to_owned())
    }

    pub fn delete(&self, kind: &str, namespace: &str, name: &str) -> Result<()> {
        let file = named(kind, namespace, name);
        fs::remove_file(self.folder.join(&file)).with_context(|| file)
    }

    pub fn remove_file(&self, name: &str) -> Result<()> {
        fs::remove_file(self.folder.join(name)).with_context(|| name.to_owned())
    }
}

/// A namespace object; with label `ENROL` = `ambient` its pods take part in the mesh.
pub fn namespace(name: &str, labels: &[(&str, &str)]) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Namespace",
        "metadata": { "name": name, "labels": map(labels.iter().map(|(k, v)| (*k, *v))) },
    })
}

/// The pod's object, as a cluster shows a running pod.
pub fn pod(pod: &Pod) -> Value {
    let spec = pod.spec();
    let ports: Vec<Value> = spec
        .ports
        .iter()
        .map(|(name, port)| json!({ "name": name, "containerPort": port }))
        .collect();
    let mut containers = vec![json!({ "name": "app", "ports": ports })];
    for (number, port) in spec.probes.iter().enumerate() {
        let probe = json!({ "tcpSocket": { "port": port } });
        containers.push(json!({ "name": format!("probed-{number}"), "readinessProbe": probe }));
    }
    let ips: Vec<Value> = pod
        .addresses()
        .all()
        .iter()
        .map(|ip| json!({ "ip": ip }))
        .collect();
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": spec.name,
            "namespace": spec.namespace,
            "uid": pod.uid(),
            "labels": map(pairs(&spec.labels)),
            "annotations": map(pairs(&spec.annotations)),
        },
        "spec": {
            "nodeName": pod.node().name(),
            "serviceAccountName": spec.service_account,
            "containers": containers,
        },
        "status": {
            "phase": "Running",
            "podIPs": ips,
            "conditions": [{ "type": "Ready", "status": "True" }],
        },
    })
}

/// A service of both families at `vip`, of the pods with label `app=NAME`; ports as (name, port, target).
pub fn service(namespace: &str, name: &str, vip: Addresses, ports: &[(&str, u16, u16)]) -> Value {
    let ports: Vec<Value> = ports
        .iter()
        .map(|(name, port, target)| {
            json!({ "name": name, "port": port, "targetPort": target, "protocol": "TCP" })
        })
        .collect();
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": { "name": name, "namespace": namespace },
        "spec": {
            "selector": { "app": name },
            "clusterIP": vip.v4,
            "clusterIPs": vip.all(),
            "ipFamilies": ["IPv4", "IPv6"],
            "ports": ports,
        },
    })
}

fn pairs(labels: &[(String, String)]) -> impl Iterator<Item = (&str, &str)> {
    labels.iter().map(|(name, value)| (&**name, &**value))
}

fn map<'a>(pairs: impl Iterator<Item = (&'a str, &'a str)>) -> Map<String, Value> {
    pairs
        .map(|(name, value)| (name.to_owned(), value.into()))
        .collect()
}

fn documents(yaml: &str) -> impl Iterator<Item = &str> {
    yaml.split("\n---")
        .map(|text| text.trim_start_matches("---"))
        .filter(|text| !text.trim().is_empty())
}

fn file_name(object: &Value) -> String {
    let word = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let metadata = &object["metadata"];
    named(
        &word(&object["kind"]),
        &word(&metadata["namespace"]),
        &word(&metadata["name"]),
    )
}

fn named(kind: &str, namespace: &str, name: &str) -> String {
    format!("{}.{namespace}.{name}.yaml", kind.to_lowercase())
}
