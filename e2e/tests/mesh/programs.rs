//! Programs of others, unmodified, that know nothing of the mesh.

use std::fs;
use std::net::IpAddr;
use std::process::Command;

use culvert_e2e::lab::{Endpoint, Process, poll_until};
use culvert_e2e::prerequisites::{CURL, PYTHON, REDIS_CLI, REDIS_SERVER, SSH, SSHD, find, need};
use culvert_e2e::traffic::digest_of;

use crate::{Shop, WAIT};

/// Runs a program and returns what it wrote; fails unless it succeeded.
fn output(at: &Endpoint, program: &str, arguments: &[&str]) -> Vec<u8> {
    let mut command = Command::new(program);
    command.args(arguments);
    let output = at.run_within(command, WAIT).unwrap();
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output.stdout
}

fn text(at: &Endpoint, program: &str, arguments: &[&str]) -> String {
    String::from_utf8(output(at, program, arguments)).unwrap()
}

/// Waits until something accepts on `port` of loopback: from inside the pod, round the mesh.
fn listening(at: &Endpoint, port: u16, process: &Process) {
    let local = (std::net::Ipv4Addr::LOCALHOST, port);
    process
        .poll_until("the server listens", WAIT, || {
            Ok(at.connect(local).is_ok().then_some(()))
        })
        .unwrap();
}

/// An address as a URL has it.
fn host(ip: IpAddr) -> String {
    match ip {
        IpAddr::V4(ip) => ip.to_string(),
        IpAddr::V6(ip) => format!("[{ip}]"),
    }
}

#[test]
fn curl_talks_to_an_http_server() {
    need(&[CURL, PYTHON]).unwrap();
    let shop = Shop::open();
    let folder = shop.cart.path("/run/www");
    fs::create_dir_all(&folder).unwrap();
    let page: Vec<u8> = (0..3_000_000u32)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    fs::write(folder.join("page"), &page).unwrap();
    let mut python = Command::new("python3");
    python.args([
        "-m",
        "http.server",
        "8080",
        "--bind",
        "::",
        "--directory",
        "/run/www",
    ]);
    let server = shop.cart.spawn("http", python).unwrap();
    listening(&shop.cart, 8080, &server);
    for (addresses, port) in [(shop.vip, 80), (shop.cart.addresses(), 8080)] {
        for ip in addresses.all() {
            let url = format!("http://{}:{port}/page", host(ip));
            // Twice in one run: the second over the connection that was kept.
            let got = output(
                &shop.web,
                "curl",
                &["-sS", "--fail", "--max-time", "15", &url, &url],
            );
            assert_eq!(got.len(), 2 * page.len(), "{url}");
            assert_eq!(
                digest_of(&got),
                digest_of(&[page.clone(), page.clone()].concat()),
                "{url}"
            );
        }
    }
    let web = shop.web.addresses();
    poll_until("the server's log names its clients", WAIT, || {
        let log = server.log();
        Ok((log.contains(&web.v4.to_string()) && log.contains(&web.v6.to_string())).then_some(()))
    })
    .unwrap();
}

#[test]
fn redis_talks_to_its_own_client() {
    need(&[REDIS_SERVER, REDIS_CLI]).unwrap();
    let shop = Shop::open();
    let mut redis = Command::new("redis-server");
    redis.args([
        "--port",
        "8080",
        "--bind",
        "*",
        "-::*",
        "--protected-mode",
        "no",
        "--save",
        "",
    ]);
    redis.args(["--daemonize", "no", "--dir", "/run"]);
    let server = shop.cart.spawn("redis", redis).unwrap();
    listening(&shop.cart, 8080, &server);
    for ip in shop.vip.all() {
        let address = ip.to_string();
        let redis = |arguments: &[&str]| {
            let fixed = ["-h", &address, "-p", "80", "--no-auth-warning"];
            text(&shop.web, "redis-cli", &[&fixed, arguments].concat())
        };
        assert_eq!(redis(&["PING"]), "PONG\n");
        assert_eq!(redis(&["SET", "price", "42"]), "OK\n");
        assert_eq!(redis(&["INCRBY", "price", "8"]), "50\n");
        // A second of silence: nothing comes to the empty list.
        assert_eq!(redis(&["BLPOP", "empty", "1"]), "\n");
        assert_eq!(
            redis(&["EVAL", "return #string.rep('x', 5000000)", "0"]),
            "5000000\n"
        );
        // Many commands over one connection.
        assert_eq!(redis(&["-r", "500", "INCR", "count"]).lines().count(), 500);
        assert_eq!(redis(&["DEL", "count"]), "1\n");
        let client = redis(&["CLIENT", "INFO"]);
        let want = format!("addr={}:", host(shop.web.ip_like(ip)));
        assert!(client.contains(&want), "{client} has no {want}");
    }
}

#[test]
fn ssh_where_the_server_speaks_first() {
    need(&[SSHD, SSH]).unwrap();
    let shop = Shop::open();
    // Debian's sshd wants its folder of privilege separation; the lab's /run is new.
    shop.cart
        .shell("mkdir -p /run/sshd /run/ssh-test && chmod 700 /run/ssh-test")
        .unwrap();
    shop.cart
        .shell("ssh-keygen -q -t ed25519 -N '' -f /run/ssh-test/host")
        .unwrap();
    shop.cart
        .shell("ssh-keygen -q -t ed25519 -N '' -f /run/ssh-test/user")
        .unwrap();
    let mut sshd = Command::new(find("sshd").unwrap());
    sshd.args([
        "-D",
        "-e",
        "-f",
        "/dev/null",
        "-p",
        "8080",
        "-h",
        "/run/ssh-test/host",
    ]);
    for option in [
        "AuthorizedKeysFile=/run/ssh-test/user.pub",
        "PermitRootLogin=prohibit-password",
        "UsePAM=no",
        "PidFile=none",
        "StrictModes=no",
    ] {
        sshd.args(["-o", option]);
    }
    let server = shop.cart.spawn("sshd", sshd).unwrap();
    listening(&shop.cart, 8080, &server);
    for ip in shop.vip.all() {
        let address = format!("root@{ip}");
        let ssh = [
            "-F",
            "/dev/null",
            "-i",
            "/run/ssh-test/user",
            "-p",
            "80",
            "-o",
            "StrictHostKeyChecking=no",
            "-o",
            "UserKnownHostsFile=/dev/null",
            "-o",
            "BatchMode=yes",
            "-o",
            "ConnectTimeout=10",
            &address,
        ];
        let seen = text(
            &shop.web,
            "ssh",
            &[&ssh[..], &["echo hello from $SSH_CLIENT"]].concat(),
        );
        assert!(
            seen.starts_with(&format!("hello from {} ", shop.web.ip_like(ip))),
            "{seen}"
        );
        // Five megabytes from the server, by a real cipher inside of ours.
        let many = output(
            &shop.web,
            "ssh",
            &[&ssh[..], &["head -c 5000000 /dev/zero"]].concat(),
        );
        assert_eq!(many.len(), 5_000_000);
    }
}
