//! What the kernel says of the running processes.

use std::fs;
use std::process::Command;

use culvert_e2e::lab::{Lab, PodSpec, Start};
use culvert_e2e::mesh::{ZTUNNEL_UID, programs};

use crate::{Shop, WAIT};

#[test]
fn ztunnel_runs_without_any_privilege() {
    let shop = Shop::open();
    for node in [&shop.a, &shop.b] {
        let field = |name: &str| {
            node.with_ztunnel(|ztunnel| ztunnel.status_field(name))
                .unwrap()
                .unwrap()
        };
        for (name, want) in [
            ("CapInh", "0000000000000000"),
            ("CapPrm", "0000000000000000"),
            ("CapEff", "0000000000000000"),
            ("CapBnd", "0000000000000000"),
            ("CapAmb", "0000000000000000"),
            ("NoNewPrivs", "1"),
            ("Seccomp", "2"),
            ("Uid", "65532\t65532\t65532\t65532"),
            ("Gid", "65532\t65532\t65532\t65532"),
            ("Groups", ""),
        ] {
            assert_eq!(field(name), want, "{name} of ztunnel on {}", node.name());
        }
        let pid = node.with_ztunnel(|ztunnel| ztunnel.pid()).unwrap();
        // Every thread has its own filter and credentials.
        for task in fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
            let status = fs::read_to_string(task.unwrap().path().join("status")).unwrap();
            for line in ["Seccomp:\t2", "NoNewPrivs:\t1", "CapEff:\t0000000000000000"] {
                assert!(status.lines().any(|found| found == line), "{line} in\n{status}");
            }
        }
        let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
        let core = limits
            .lines()
            .find(|line| line.starts_with("Max core file size"))
            .unwrap();
        assert_eq!(core.split_whitespace().nth(4), Some("0"), "no core dump: {core}");
    }
}

#[test]
fn ztunnel_refuses_to_run_with_privileges() {
    let lab = Lab::new().unwrap();
    let pod = lab
        .node("a")
        .unwrap()
        .pod(PodSpec::new("culvert-system", "ztunnel"))
        .unwrap();
    let ztunnel = || {
        let mut command = Command::new(&programs().unwrap().ztunnel);
        command.args([
            "--control",
            "https://127.0.0.1:15012",
            "--control-ca",
            "/nowhere",
            "--token",
            "/nowhere",
        ]);
        command.args(["--node", "a", "--agent-socket", "/nowhere"]);
        command
    };
    let as_root = pod.run(ztunnel()).unwrap();
    assert!(!as_root.status.success());
    let said = String::from_utf8_lossy(&as_root.stderr).into_owned();
    assert!(said.contains("root") || said.contains("uid 0"), "{said}");
    // As anybody else it goes on to what it misses next, and waits for it.
    let unprivileged = pod
        .spawn("ztunnel", Start::from(ztunnel()).as_uid(ZTUNNEL_UID))
        .unwrap();
    unprivileged.wait_for_log("no agent", WAIT).unwrap();
}
