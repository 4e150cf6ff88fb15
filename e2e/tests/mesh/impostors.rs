//! Endpoints that are not whom discovery takes them for, or that take back what they have offered: what comes
//! to them goes to another, whole, and without a byte said to the wrong one.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use culvert_e2e::hostile::{Impostor, Svid, frames};
use culvert_e2e::lab::{Pod, PodSpec, poll_until};
use culvert_e2e::traffic::{Server, echo_once};
use serde_json::json;

use crate::{Shop, WAIT};

/// A shop whose service has, beside `cart`, an endpoint at which somebody else answers by now.
struct Stale {
    endpoint: Pod,
    shop: Shop,
}

impl Stale {
    fn open() -> Self {
        let shop = Shop::open();
        let endpoint = shop.b.node().pod(PodSpec::new("shop", "stale")).unwrap();
        shop.mesh
            .apply_object(&json!({
                "apiVersion": "culvert.dev/v1alpha1", "kind": "Workload",
                "metadata": { "name": "stale", "namespace": "shop", "labels": { "app": "cart" } },
                "spec": {
                    "addresses": endpoint.addresses().all(),
                    "serviceAccount": shop.cart.spec().service_account,
                    "node": "b", "hbone": true,
                },
            }))
            .unwrap();
        Self { endpoint, shop }
    }

    fn impostor(&self, svid: &Svid, says: Vec<u8>) -> Impostor {
        Impostor::start(self.endpoint.listen(15008).unwrap(), svid, says).unwrap()
    }

    /// Calls the service until the impostor has been tried for it, and some more; each call is answered. The
    /// longest that one took.
    fn call_until_tried(&self, impostor: &Impostor) -> Duration {
        let to = SocketAddr::from((self.shop.vip.v4, 80));
        let (started, mut longest) = (Instant::now(), Duration::ZERO);
        let mut more = 20;
        while more > 0 {
            let call = Instant::now();
            let socket = self.shop.web.connect(to).unwrap();
            socket.set_read_timeout(Some(WAIT)).unwrap();
            echo_once(&socket, b"whoever answers").unwrap();
            longest = longest.max(call.elapsed());
            more -= u32::from(impostor.connections() > 0);
            assert!(started.elapsed() < 2 * WAIT, "the stale endpoint is never tried");
        }
        longest
    }

    /// A call to the stale endpoint's own address, for which there is no other.
    fn call_it(&self) -> anyhow::Result<()> {
        let socket = self
            .shop
            .web
            .connect_within((self.endpoint.addresses().v4, 8080), WAIT)?;
        socket.set_read_timeout(Some(WAIT))?;
        echo_once(&socket, b"is it you?")
    }
}

#[test]
fn t39_an_endpoint_with_anothers_svid_is_told_nothing_and_another_is_tried() {
    let stale = Stale::open();
    let shop = &stale.shop;
    let cart = Server::echo(shop.cart.listen(8080).unwrap()).unwrap();
    let phone = shop.mesh.pod(&shop.b, PodSpec::new("shop", "phone")).unwrap();
    // A good certificate of the same mesh, of somebody else: the address was used again.
    let svid = Svid::of(&shop.mesh, &shop.b, &phone).unwrap();
    let impostor = stale.impostor(&svid, frames::settings(&[]));
    stale.call_until_tried(&impostor);
    assert!(stale.call_it().is_err(), "nobody else has that address");
    assert_eq!(impostor.bytes(), 0, "bytes to the wrong one");
    assert!(cart.accepted() >= 20);
    let refused = shop.a.metrics().unwrap().sum(
        "culvert_tunnels_total",
        &[("direction", "outbound"), ("outcome", "unexpected_identity")],
    );
    assert!(refused >= 1.0, "{refused} refusals were counted");
}

#[test]
fn t43_a_peer_that_takes_back_its_streams_or_goes_away_holds_no_caller_up() {
    let stale = Stale::open();
    let shop = &stale.shop;
    let _cart = Server::echo(shop.cart.listen(8080).unwrap()).unwrap();
    // It is whom it should be.
    let id = format!(
        "spiffe://cluster.local/ns/shop/sa/{}",
        shop.cart.spec().service_account
    );
    let svid = Svid::issue(&shop.mesh, &shop.b, &id).unwrap();
    let none_at_once = frames::settings(&[(3, 0)]);
    let going_away = frames::frame(frames::GOAWAY, 0, 0, &[0; 8]);
    for (case, says) in [
        ("no streams", none_at_once.clone()),
        (
            "GOAWAY, then no streams",
            [frames::settings(&[]), going_away, none_at_once].concat(),
        ),
    ] {
        let impostor = stale.impostor(&svid, says);
        let longest = stale.call_until_tried(&impostor);
        assert!(impostor.bytes() > 0, "{case}: a tunnel came up");
        assert!(
            longest < Duration::from_secs(10),
            "{case}: a call took {longest:?}"
        );
        let started = Instant::now();
        assert!(stale.call_it().is_err(), "{case}");
        assert!(started.elapsed() < WAIT, "{case}: the application waits");
        drop(impostor);
        // Who failed a moment ago is left alone for a while.
        poll_until("the other endpoint takes calls", WAIT, || {
            let socket = shop.web.connect((shop.vip.v4, 80))?;
            socket.set_read_timeout(Some(WAIT))?;
            echo_once(&socket, b"again").map(Some)
        })
        .unwrap();
    }
}
