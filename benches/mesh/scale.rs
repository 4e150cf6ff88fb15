//! A large mesh: one ztunnel learns all of it.
//!
//! ```text
//! files ──▶ control ──100k workloads──▶ ztunnel, killed and started again for each run
//! ```
//! Invariant: time is from the start of the process until it is ready to serve, and memory is what it
//! holds a while after that.

use std::fmt::Write as _;
use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use culvert_e2e::lab::poll_until;
use culvert_e2e::mesh::{Mesh, MeshNode, Options as MeshOptions, pages};

use crate::Options;
use crate::cost::{cpu_of, memory_of};
use crate::report::{Floor, Report, Row, median};

/// Pods that share a service, a namespace and a file.
const PODS_OF_A_SERVICE: usize = 100;
const SERVICES_OF_A_NAMESPACE: usize = 10;

/// How long control may take to read so many files.
const READ_WITHIN: Duration = Duration::from_secs(300);

/// How long after it is ready its memory is looked at.
const SETTLED_AFTER: Duration = Duration::from_secs(3);

pub fn measure(options: &Options, report: &mut Report) -> Result<()> {
    eprintln!("bench: setting the stage of {} workloads", options.workloads);
    let mesh = Mesh::start(MeshOptions {
        ztunnel_args: ["--discovery", "wildcard"].map(str::to_owned).into(),
        ..MeshOptions::default()
    })?;
    let node = mesh.node("a")?;
    write_world(&mesh, options.workloads)?;
    poll_until("control has read all", READ_WITHIN, || {
        Ok((known(&node)? >= options.workloads).then_some(()))
    })?;
    let (mut times, mut cpus, mut memory, mut peaks) = (vec![], vec![], vec![], vec![]);
    for run in 1..=options.long_pairs {
        node.kill_ztunnel()?;
        forget(&node)?;
        let start = Instant::now();
        node.start_ztunnel()?;
        wait_ready(&node)?;
        times.push(start.elapsed().as_secs_f64());
        let pid = node.with_ztunnel(|ztunnel| ztunnel.pid())?;
        cpus.push(cpu_of(pid)?.as_secs_f64());
        thread::sleep(SETTLED_AFTER);
        ensure!(known(&node)? >= options.workloads, "it does not know all");
        memory.push(memory_of(pid)? as f64 / 1e6);
        let peak = node.with_ztunnel(|ztunnel| ztunnel.status_field("VmHWM"))??;
        let peak: f64 = peak.trim_end_matches(" kB").trim().parse()?;
        peaks.push(peak * 1024.0 / 1e6);
        eprintln!(
            "bench: scale, run {run} of {}: {:.2} s, {:.2} s of CPU, {:.0} MB, at most {:.0} MB",
            options.long_pairs,
            times[run - 1],
            cpus[run - 1],
            memory[run - 1],
            peaks[run - 1]
        );
    }
    let load = format!(
        "{}k workloads, all subscribed, one ztunnel",
        options.workloads / 1000
    );
    let row = |what: &str, mesh: String, measured, floor, unit| Row {
        load: format!("{load}: {what}"),
        raw: "–".to_owned(),
        relay: "–".to_owned(),
        mesh,
        measured,
        floor: Floor::AtMost(floor),
        unit,
    };
    let cpu = format!("{:.2} s of CPU", median(cpus));
    report.rows.push(row("ready", cpu, median(times), 2.0, "s"));
    let peak = format!("at most {:.0} MB", median(peaks));
    report.rows.push(row("memory", peak, median(memory), 150.0, "MB"));
    Ok(())
}

/// Takes the last good state away, so that all is learnt from control.
fn forget(node: &MeshNode) -> Result<()> {
    for entry in fs::read_dir(node.path("state"))? {
        fs::remove_file(entry?.path())?;
    }
    Ok(())
}

/// Workloads that a node's ztunnel knows.
fn known(node: &MeshNode) -> Result<usize> {
    Ok(node.metrics()?.sum("culvert_workloads", &[]) as usize)
}

/// As `MeshNode::wait_ready`, but to the millisecond.
fn wait_ready(node: &MeshNode) -> Result<()> {
    let pod = node.ztunnel_pod();
    let address = (pod.addresses().v4, 15021).into();
    let start = Instant::now();
    while !pages::fetch(pod, address, "/healthz/ready").is_ok_and(|page| page.status == 200) {
        ensure!(start.elapsed() < READ_WITHIN, "ztunnel is not ready");
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Pods of many services in many namespaces on many nodes, as a cluster shows them.
fn write_world(mesh: &Mesh, workloads: usize) -> Result<()> {
    let services = workloads.div_ceil(PODS_OF_A_SERVICE);
    for service in 0..services {
        let namespace = format!("team-{}", service / SERVICES_OF_A_NAMESPACE);
        let mut text = String::new();
        if service % SERVICES_OF_A_NAMESPACE == 0 {
            writeln!(
                text,
                r#"{{"apiVersion": "v1", "kind": "Namespace", "metadata": {{"name": "{namespace}", "labels": {{"culvert.dev/dataplane-mode": "ambient"}}}}}}
---"#
            )?;
        }
        let vip = format!("10.96.{}.{}", 128 + service / 250, service % 250 + 1);
        writeln!(
            text,
            r#"{{"apiVersion": "v1", "kind": "Service", "metadata": {{"name": "app-{service}", "namespace": "{namespace}"}}, "spec": {{"selector": {{"app": "app-{service}"}}, "clusterIP": "{vip}", "clusterIPs": ["{vip}"], "ipFamilies": ["IPv4"], "ports": [{{"name": "http", "port": 80, "targetPort": 8080, "protocol": "TCP"}}]}}}}"#
        )?;
        for pod in 0..PODS_OF_A_SERVICE.min(workloads - service * PODS_OF_A_SERVICE) {
            let number = service * PODS_OF_A_SERVICE + pod;
            let node = number % 500;
            let ip = format!(
                "10.{}.{}.{}",
                32 + number / 62500,
                number / 250 % 250,
                number % 250 + 1
            );
            writeln!(
                text,
                r#"---
{{"apiVersion": "v1", "kind": "Pod", "metadata": {{"name": "app-{service}-6f7c9d8b5d-{pod:05}", "namespace": "{namespace}", "uid": "{number:08x}-5ca1-4000-8000-{number:012x}", "labels": {{"app": "app-{service}"}}}}, "spec": {{"nodeName": "node-{node}", "serviceAccountName": "app-{service}", "containers": [{{"name": "app", "ports": [{{"name": "http", "containerPort": 8080}}]}}]}}, "status": {{"phase": "Running", "podIPs": [{{"ip": "{ip}"}}], "conditions": [{{"type": "Ready", "status": "True"}}]}}}}"#
            )?;
        }
        mesh.config()
            .write(&format!("scale-{service}.yaml"), &text)
            .with_context(|| format!("service {service}"))?;
    }
    Ok(())
}
