//! The stage: what stands when the first scene begins.
//!
//! ```text
//! node a: shop/web  bank/teller  plain/near        node b: shop/cart  plain/far
//! ```
//! Invariant: servers are programs that know nothing of the mesh, and run until the end.

use std::fs;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use culvert_e2e::lab::{Addresses, Pod, PodSpec, Process};
use culvert_e2e::mesh::{Mesh, MeshNode, Options, config};
use culvert_e2e::prerequisites::{CURL, PYTHON, need};
use culvert_e2e::traffic::Server;

/// In the page that the shop serves; nothing between the nodes may show it.
pub const CANARY: &str = "canary-9d2e61f0c4";

pub const HTTP_PORT: u16 = 8080;
pub const ECHO_PORT: u16 = 7000;
pub const SINK_PORT: u16 = 7001;

/// How long a server may take until it listens.
const UP_WITHIN: Duration = Duration::from_secs(15);

pub struct Stage {
    // Dropped in this order: servers first, the mesh last.
    _servers: Vec<Server>,
    _http: Vec<Process>,
    /// Tenant `shop`: `web` calls `cart`, from one node to the other.
    pub web: Pod,
    pub cart: Pod,
    /// The service `cart`.
    pub cart_vip: Addresses,
    /// Tenant `bank`, who is no customer of the shop.
    pub teller: Pod,
    /// Two pods that are not in the mesh: what the mesh is measured against.
    pub near: Pod,
    pub far: Pod,
    pub a: MeshNode,
    pub b: MeshNode,
    pub mesh: Mesh,
}

impl Stage {
    pub fn set(progress: &dyn Fn(&str)) -> Result<Self> {
        progress("looking for curl and python3");
        need(&[CURL, PYTHON])?;
        progress("building control, ztunnel-agent and ztunnel; starting control");
        let mesh = Mesh::start(Options::default())?;
        progress("node a: agent, ztunnel");
        let a = mesh.node("a")?;
        progress("node b: agent, ztunnel");
        let b = mesh.node("b")?;
        progress("tenants shop and bank, and a namespace outside of the mesh");
        mesh.namespace("shop")?;
        mesh.namespace("bank")?;
        mesh.apply_object(&config::namespace("plain", &[]))?;
        let ports = [
            ("http", 80, HTTP_PORT),
            ("echo", ECHO_PORT, ECHO_PORT),
            ("sink", SINK_PORT, SINK_PORT),
        ];
        let cart_vip = mesh.service("shop", "cart", &ports)?;
        let web = mesh.pod(&a, PodSpec::new("shop", "web"))?;
        let cart = mesh.pod(&b, PodSpec::new("shop", "cart"))?;
        let teller = mesh.pod(&a, PodSpec::new("bank", "teller"))?;
        let near = mesh.pod(&a, PodSpec::new("plain", "near"))?;
        let far = mesh.pod(&b, PodSpec::new("plain", "far"))?;
        progress("servers in shop/cart and plain/far");
        let page = mesh.path("/run/www/page");
        fs::create_dir_all(page.parent().context("the page has a folder")?)?;
        fs::write(&page, format!("{CANARY}\n"))?;
        let mut http = Vec::new();
        let mut servers = Vec::new();
        for pod in [&cart, &far] {
            let mut python = Command::new("python3");
            python.args([
                "-m",
                "http.server",
                &HTTP_PORT.to_string(),
                "--bind",
                "::",
                "--directory",
                "/run/www",
            ]);
            let process = pod.spawn("http", python)?;
            process.poll_until("the HTTP server listens", UP_WITHIN, || {
                Ok(pod
                    .connect((std::net::Ipv4Addr::LOCALHOST, HTTP_PORT))
                    .is_ok()
                    .then_some(()))
            })?;
            http.push(process);
            servers.push(Server::echo(pod.listen(ECHO_PORT)?)?);
            servers.push(Server::count(pod.listen(SINK_PORT)?)?);
        }
        Ok(Self {
            _servers: servers,
            _http: http,
            web,
            cart,
            cart_vip,
            teller,
            near,
            far,
            a,
            b,
            mesh,
        })
    }

    /// How to look around while the mesh runs.
    pub fn tour(&self) {
        println!("\nA shell in");
        for pod in [&self.web, &self.cart, &self.teller, &self.near, &self.far] {
            println!("  {:<14} {}", pod.name(), pod.shell_command());
        }
        println!(
            "  {:<14} {}",
            "control's host",
            self.mesh.control_host().shell_command()
        );
        println!("from shop/web:  curl http://{}/page", self.cart_vip.v4);
        println!("Admin pages, each from a shell in its ztunnel's pod: /config_dump /debug/connections");
        for node in [&self.a, &self.b] {
            println!(
                "  node {}: http://127.0.0.1:15000   {}",
                node.name(),
                node.ztunnel_pod().shell_command()
            );
        }
        println!(
            "Configuration to edit (put files in place by rename): {}",
            self.mesh.config().folder().display()
        );
    }
}
