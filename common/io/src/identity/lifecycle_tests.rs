//! Identities from one process to the next, and under revocation lists and clocks.

use super::*;
use crate::{
    agent_socket::{Channel, Peer},
    tls::tests::{Authority, CART, WEB},
};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

const HOUR: Duration = Duration::from_secs(3600);
const MINUTE: Duration = Duration::from_secs(60);

/// Identities whose control is nowhere.
fn identities() -> Identities {
    Identities::new(&Control {
        address: "https://127.0.0.1:1".into(),
        bundle: "/nowhere".into(),
        name: "control.example".into(),
        token: "/nowhere".into(),
    })
    .unwrap()
}

fn credential(ca: &Authority, id: &str) -> Credential {
    let svid = ca.svid(id);
    Credential::checked(&id.parse().unwrap(), svid, &ca.root(), SystemTime::now()).unwrap()
}

fn pair() -> (Channel, Channel) {
    let (give, take) = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )
    .unwrap();
    (Channel::new(give).unwrap(), Channel::new(take).unwrap())
}

fn myself() -> Peer {
    Peer {
        uid: nix::unistd::getuid().as_raw(),
        pid: nix::unistd::getpid().as_raw(),
    }
}

#[tokio::test]
async fn a_successor_serves_with_the_svids_of_its_predecessor() {
    let ca = Authority::new("cluster.local");
    let (old, new) = (identities(), identities());
    let (web, cart) = (WEB.parse().unwrap(), CART.parse().unwrap());
    let (_web, _cart) = (old.acquire(&web), old.acquire(&cart));
    for id in [WEB, CART] {
        old.take_over(credential(&ca, id));
    }
    // One workload is there before, one arrives after.
    let before = new.acquire(&web);
    assert!(before.current().is_none());
    let (give, take) = pair();
    let (given, taken) = tokio::join!(
        handover::give(give, myself(), &old),
        handover::take(take, myself(), &new)
    );
    assert_eq!((given.unwrap(), taken.unwrap()), (2, 2));
    let after = new.acquire(&cart);
    for (lease, id) in [(before, WEB), (after, CART)] {
        let held = lease.current().unwrap();
        let expected = old
            .all()
            .into_iter()
            .find(|(of, _)| of.as_str() == id)
            .unwrap()
            .1
            .unwrap();
        assert_eq!(
            (held.svid.id().as_str(), held.svid.serial()),
            (id, expected.svid.serial())
        );
    }
}

#[tokio::test]
async fn t57_keys_pass_over_a_socket_of_the_agents_making_alone() {
    let ca = Authority::new("cluster.local");
    let old = identities();
    let _web = old.acquire(&WEB.parse().unwrap());
    old.take_over(credential(&ca, WEB));
    let (give, take) = pair();
    let agent = Peer {
        pid: myself().pid + 1,
        ..myself()
    };
    let refused = handover::give(give, agent, &old).await;
    assert!(
        matches!(refused, Err(handover::HandoverError::Stranger)),
        "{refused:?}"
    );
    assert!(take.recv_bytes().await.unwrap().is_none(), "nothing was sent");
    // What is no SVID is not taken, and ends it.
    let (give, take) = pair();
    give.send_bytes(b"\x0a\x03abc", &[]).await.unwrap();
    let refused = handover::take(take, myself(), &identities()).await;
    assert!(refused.is_err(), "{refused:?}");
}

#[tokio::test]
async fn t37_an_awaited_list_refuses_every_identity_until_it_is_read() {
    let ca = Authority::new("cluster.local");
    let identities = identities();
    identities.await_lists();
    let lease = identities.acquire(&WEB.parse().unwrap());
    identities.take_over(credential(&ca, WEB));
    assert!(lease.current().is_none() && !identities.are_lists_read());
    let before = lease.0.current.borrow().as_ref().unwrap().bundles.generation;
    identities.set_lists(RevocationLists::from_pem(&ca.revoke(&[])).unwrap());
    identities.lists_read().await;
    let after = lease.current().unwrap().bundles.generation;
    assert_ne!(before, after, "new lists are new trust");
}

#[test]
fn f55_renewal_follows_the_wall_clock_wherever_it_is_set() {
    let began = SystemTime::UNIX_EPOCH + Duration::from_secs(2_145_916_800); // 2038
    let (from, to) = (began - MINUTE, began + HOUR);
    for (case, now, due) in [
        ("at once", began, Some(30 * MINUTE)),
        ("later", began + 10 * MINUTE, Some(20 * MINUTE)),
        ("past half of its life", began + 31 * MINUTE, None),
        ("an hour ahead", began + HOUR, None),
        ("ten minutes back: not valid yet", began - 10 * MINUTE, None),
        (
            "a minute back: within what is tolerated",
            began - MINUTE,
            Some(31 * MINUTE),
        ),
    ] {
        assert_eq!(renews_in(from, to, began, now, 1.0), due, "{case}");
    }
}
