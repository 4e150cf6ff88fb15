//! The mesh, end to end: real processes, real sockets, and what a user of the cluster would see.
#![expect(clippy::unwrap_used, reason = "a test fails where it stands")]

mod admission;
mod agent;
mod authority;
mod control_plane;
mod faults;
mod first;
mod floods;
mod hostile;
mod impostors;
mod names;
mod peers;
mod processes;
mod programs;
mod quotas;
mod resolver_abuse;
mod restarts;
mod revocation;
mod state;
mod streams;
mod telemetry;
mod tunnel_abuse;
mod wire;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use culvert_e2e::lab::{Addresses, Pod, PodSpec};
use culvert_e2e::mesh::{Mesh, MeshNode, Options};

/// Most waits of these tests end far sooner; the bound is for a loaded machine.
const WAIT: Duration = Duration::from_secs(20);

/// Whether rows that take minutes run at their full length: set `CULVERT_E2E_LONG` for that.
fn full_length() -> bool {
    std::env::var_os("CULVERT_E2E_LONG").is_some()
}

/// Set when this is dropped: threads that go on until then also end when the test fails.
struct AtEnd<'a>(&'a AtomicBool);

impl Drop for AtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A namespace `shop`, enrolled, with `web` on one node calling `cart` on the other.
struct Shop {
    // Dropped in this order: pods' processes first, the lab last.
    web: Pod,
    cart: Pod,
    /// The service `cart`: port 80 is the pods' 8080.
    vip: Addresses,
    a: MeshNode,
    b: MeshNode,
    mesh: Mesh,
}

impl Shop {
    fn open() -> Self {
        Self::open_with(Options::default())
    }

    fn open_with(options: Options) -> Self {
        let (mesh, a, b) = Mesh::two_nodes_with(options).unwrap();
        mesh.namespace("shop").unwrap();
        let vip = mesh.service("shop", "cart", &[("tcp", 80, 8080)]).unwrap();
        let web = mesh.pod(&a, PodSpec::new("shop", "web")).unwrap();
        let cart = mesh
            .pod(&b, PodSpec::new("shop", "cart").port("tcp", 8080))
            .unwrap();
        a.wait_tunnelled(&web).unwrap();
        b.wait_tunnelled(&cart).unwrap();
        Self {
            web,
            cart,
            vip,
            a,
            b,
            mesh,
        }
    }
}
