//! A resolver, and somebody beside it, that answer what was not asked; and a pod that asks without end.

use std::collections::HashSet;
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use culvert_e2e::lab::{PodSpec, poll_until};

use crate::{AtEnd, Shop, WAIT, full_length};

const QUERY_A: [u8; 4] = [0, 1, 0, 1];

/// A query for the A record of `name`.
fn query(id: u16, name: &str) -> Vec<u8> {
    let mut bytes = id.to_be_bytes().to_vec();
    bytes.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    for label in name.split('.') {
        bytes.push(label.len() as u8);
        bytes.extend_from_slice(label.as_bytes());
    }
    bytes.push(0);
    bytes.extend(QUERY_A);
    bytes
}

/// The reply to a query, with one address.
fn reply(query: &[u8], address: [u8; 4]) -> Vec<u8> {
    let mut bytes = query.to_vec();
    bytes[2] |= 0x80;
    bytes[7] = 1;
    // The name is the question's; type A, class IN, five seconds, four bytes.
    bytes.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 5, 0, 4]);
    bytes.extend(address);
    bytes
}

const RIGHT: [u8; 4] = [192, 0, 2, 1];
const FORGED: [u8; 4] = [192, 0, 2, 66];

/// Answers every query: first wrongly in every way there is, then rightly.
fn lie(resolver: &UdpSocket, beside: &UdpSocket, over: &AtomicBool) {
    let mut buffer = [0; 4096];
    while !over.load(Ordering::Relaxed) {
        let Ok((length, client)) = resolver.recv_from(&mut buffer) else {
            continue;
        };
        let asked = &buffer[..length];
        if memchr::memmem::find(asked, b"silent").is_some() {
            continue;
        }
        if memchr::memmem::find(asked, b"lies").is_some() {
            let forged = reply(asked, FORGED);
            // Right in everything but where it comes from.
            let _ = beside.send_to(&forged, client);
            let mut other_id = forged.clone();
            other_id[1] ^= 1;
            let mut other_name = forged.clone();
            other_name[13] ^= 1;
            let mut other_type = forged.clone();
            let at = asked.len() - 3;
            other_type[at] = 28;
            let mut looped = asked[..12].to_vec();
            looped[2] |= 0x80;
            looped.extend([0xc0, 12, 0, 1, 0, 1]);
            let mut promised = forged.clone();
            promised[6] = 0xff;
            for wrong in [
                other_id,
                other_name,
                other_type,
                looped,
                promised,
                asked.to_vec(),
                vec![0; 3],
                vec![0xff; 4000],
            ] {
                let _ = resolver.send_to(&wrong, client);
            }
        }
        let _ = resolver.send_to(&reply(asked, RIGHT), client);
    }
}

#[test]
fn t30_forged_replies_are_waited_past_and_names_by_the_thousand_cost_nothing() {
    let shop = Shop::open();
    let phone = shop.mesh.pod(&shop.a, PodSpec::new("shop", "phone")).unwrap();
    shop.a.wait_published(&phone).unwrap();
    let host = shop.mesh.resolver();
    let to = SocketAddr::from((host.addresses().v4, 53));
    let resolver = host.udp(to).unwrap();
    let beside = host.udp((host.addresses().v4, 0)).unwrap();
    resolver
        .set_read_timeout(Some(Duration::from_millis(100)))
        .unwrap();
    let over = AtomicBool::new(false);
    let resident = || -> u64 {
        let text = shop
            .a
            .with_ztunnel(|ztunnel| ztunnel.status_field("VmRSS"))
            .unwrap()
            .unwrap();
        text.trim_end_matches("kB").trim().parse().unwrap()
    };
    let descriptors = || {
        let pid = shop.a.with_ztunnel(|ztunnel| ztunnel.pid()).unwrap();
        std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
    };
    thread::scope(|scope| {
        let end = AtEnd(&over);
        scope.spawn(|| lie(&resolver, &beside, &over));
        let web = shop.web.udp((shop.web.addresses().v4, 0)).unwrap();
        web.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        for id in 0..20 {
            let asked = query(id, &format!("lies-{id}.example"));
            let heard = poll_until("an answer", WAIT, || {
                web.send_to(&asked, to)?;
                let mut heard = [0; 4096];
                let (length, from) = web.recv_from(&mut heard)?;
                anyhow::ensure!(from == to, "an answer of {from}");
                Ok(Some(heard[..length].to_vec()))
            })
            .unwrap();
            assert_eq!(heard, reply(&asked, RIGHT), "the question and the right answer");
        }
        // Names without end, a part of which nobody answers; another pod goes on asking for the mesh's own.
        let (before, sockets_before) = (resident(), descriptors());
        let mut most = 0;
        let names: u32 = if full_length() { 65_536 } else { 16_384 };
        let sender = web.try_clone().unwrap();
        let asking = scope.spawn(move || {
            for number in 0..names {
                let kind = if number % 16 == 0 { "silent" } else { "name" };
                let _ = sender.send_to(&query(number as u16, &format!("{kind}-{number}.example")), to);
                if number % 256 == 0 {
                    thread::sleep(Duration::from_millis(5));
                }
            }
        });
        let caller = phone.udp((phone.addresses().v4, 0)).unwrap();
        caller.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        let mut answers = HashSet::new();
        let start = Instant::now();
        while !asking.is_finished() || answers.len() < 20 {
            assert!(
                start.elapsed() < Duration::from_secs(60),
                "{} answers",
                answers.len()
            );
            let id = answers.len() as u16;
            caller
                .send_to(&query(id, "cart.shop.svc.cluster.local"), to)
                .unwrap();
            let mut heard = [0; 4096];
            if let Ok((length, _)) = caller.recv_from(&mut heard) {
                assert_eq!(
                    heard[length - 4..length],
                    shop.vip.v4.octets(),
                    "the service's own address"
                );
                answers.insert(u16::from_be_bytes([heard[0], heard[1]]));
            }
            most = most.max(descriptors());
            thread::sleep(Duration::from_millis(10));
        }
        asking.join().unwrap();
        let after = resident();
        assert!(
            after < before + (24 << 10),
            "{before} KiB before, {after} KiB after {names} names"
        );
        // Queries in flight are as many as one pod may have, and each has a socket of its own.
        assert!(
            most < sockets_before + 256 + 128,
            "{sockets_before} descriptors before, {most} meanwhile"
        );
        // Late replies belong to nobody, and the asker is served again.
        web.set_nonblocking(true).unwrap();
        poll_until("the asker is served again", Duration::from_secs(40), || {
            while web.recv(&mut [0; 4096]).is_ok() {}
            web.send_to(&query(4711, "lies-again.example"), to)?;
            thread::sleep(Duration::from_millis(200));
            let mut heard = [0; 4096];
            while let Ok(length) = web.recv(&mut heard) {
                if heard[..2] == 4711u16.to_be_bytes()
                    && memchr::memmem::find(&heard[..length], b"lies-again").is_some()
                {
                    assert_eq!(heard[length - 4..length], RIGHT);
                    return Ok(Some(()));
                }
            }
            Ok(None)
        })
        .unwrap();
        drop(end);
    });
}
