//! The committed code is what the `.proto` files say.

#![allow(clippy::unwrap_used, reason = "a test fails where it stands")]

use std::{collections::BTreeMap, fs, path::Path};

const FILES: [&str; 8] = [
    "google/rpc_status.proto",
    "envoy/discovery.proto",
    "istio/workload.proto",
    "istio/security.proto",
    "istio/ca.proto",
    "culvert/mesh.proto",
    "culvert/node.proto",
    "culvert/agent.proto",
];

fn sources(dir: &Path) -> BTreeMap<String, String> {
    fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| {
            (
                path.file_name().unwrap().to_str().unwrap().to_owned(),
                fs::read_to_string(path).unwrap(),
            )
        })
        .collect()
}

#[test]
fn committed_code_is_what_the_proto_files_say() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let out = tempfile::tempdir().unwrap();
    let descriptors = protox::compile(FILES, [root.join("proto")]).unwrap();
    let mut config = prost_build::Config::new();
    config.bytes([".istio.workload.Workload.addresses"]);
    // Ordered, so that equal messages have equal bytes: a version is a digest of them.
    config.btree_map([".istio.workload"]);
    tonic_prost_build::configure()
        .out_dir(out.path())
        .compile_fds_with_config(descriptors, config)
        .unwrap();
    let committed = root.join("src/generated");
    if std::env::var_os("CULVERT_REGENERATE").is_some() {
        for (name, text) in sources(out.path()) {
            fs::write(committed.join(name), text).unwrap();
        }
    }
    assert_eq!(
        sources(&committed),
        sources(out.path()),
        "run this test with CULVERT_REGENERATE=1"
    );
}
