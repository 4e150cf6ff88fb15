//! TCP through the mesh is TCP: long, many, half-closed, silent, either end first.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use culvert_e2e::mesh::{MeshNode, Options};
use culvert_e2e::traffic::{Server, echo_once, send_pattern};
use socket2::SockRef;

use crate::{Shop, WAIT};

#[test]
fn a_gibibyte_arrives_as_it_was_sent() {
    let shop = Shop::open();
    let _digest = Server::digest(shop.cart.listen(8080).unwrap()).unwrap();
    // The second family takes the same path through fewer bytes, unless there is time.
    let second = if crate::full_length() { 1 << 30 } else { 128 << 20 };
    for (ip, bytes) in shop.vip.all().into_iter().zip([1 << 30, second]) {
        let socket = shop.web.connect((ip, 80)).unwrap();
        // Beside what else runs on the machine, a debug build carries tens of megabytes a second.
        socket.set_read_timeout(Some(Duration::from_secs(120))).unwrap();
        socket.set_write_timeout(Some(Duration::from_secs(60))).unwrap();
        let sent = send_pattern(&socket, bytes, 1).unwrap();
        let mut arrived = String::new();
        (&socket).read_to_string(&mut arrived).unwrap();
        assert_eq!(arrived, sent, "{ip}");
    }
}

#[test]
fn a_heavy_pod_is_carried_by_more_than_one_worker() {
    let shop = Shop::open_with(Options {
        ztunnel_args: vec!["--workers=2".into()],
        ..Options::default()
    });
    let _digest = Server::digest(shop.cart.listen(8080).unwrap()).unwrap();
    let to = SocketAddr::from((shop.vip.v4, 80));
    let before = worker_ticks(&shop.a);
    // One after the other: each comes when those before it keep a worker busy.
    thread::scope(|scope| {
        let streams: Vec<_> = (0..5)
            .map(|seed| {
                thread::sleep(Duration::from_millis(300));
                let socket = shop.web.connect(to).unwrap();
                socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
                scope.spawn(move || {
                    let sent = send_pattern(&socket, 384 << 20, seed).unwrap();
                    let mut arrived = String::new();
                    (&socket).read_to_string(&mut arrived).unwrap();
                    assert_eq!(arrived, sent, "stream {seed}");
                })
            })
            .collect();
        streams.into_iter().for_each(|stream| stream.join().unwrap());
    });
    let used: Vec<u64> = worker_ticks(&shop.a)
        .into_iter()
        .map(|(name, ticks)| ticks - before[&name])
        .collect();
    let all: u64 = used.iter().sum();
    assert_eq!(used.len(), 2);
    // The pod is the only one of its node: all of this is its traffic.
    assert!(
        used.iter().all(|ticks| ticks * 10 > all),
        "processor time of the workers, in ticks: {used:?}"
    );
}

/// Processor time of each worker thread of a node's ztunnel, in ticks of the clock.
fn worker_ticks(node: &MeshNode) -> BTreeMap<String, u64> {
    let pid = node.with_ztunnel(|ztunnel| ztunnel.pid()).unwrap();
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    tasks
        .filter_map(|task| {
            let stat = fs::read_to_string(task.unwrap().path().join("stat")).unwrap();
            let (name, fields) = stat.split_once('(')?.1.rsplit_once(") ")?;
            // utime and stime, the 14th and 15th of proc(5), of which two stand before.
            let ticks = fields.split(' ').skip(11).take(2);
            let ticks = ticks.map(|ticks| ticks.parse::<u64>().unwrap()).sum();
            name.starts_with("worker-").then(|| (name.to_owned(), ticks))
        })
        .collect()
}

#[test]
fn both_directions_at_once_keep_their_bytes() {
    let shop = Shop::open();
    let _echo = Server::echo(shop.cart.listen(8080).unwrap()).unwrap();
    for ip in shop.vip.all() {
        let socket = shop.web.connect((ip, 80)).unwrap();
        socket.set_read_timeout(Some(WAIT)).unwrap();
        let back = socket.try_clone().unwrap();
        let reader = thread::spawn(move || {
            let mut all = Vec::new();
            (&back).read_to_end(&mut all).map(|_| all)
        });
        let sent = send_pattern(&socket, 32 << 20, 2).unwrap();
        let echoed = reader.join().unwrap().unwrap();
        assert_eq!(echoed.len(), 32 << 20);
        let digest = culvert_e2e::traffic::digest_of(&echoed);
        assert_eq!(digest, sent, "{ip}");
    }
}

#[test]
fn five_thousand_idle_connections_stay_and_answer() {
    const CONNECTIONS: usize = 5_000;
    let shop = Shop::open();
    let server = Server::echo(shop.cart.listen(8080).unwrap()).unwrap();
    // Every other one over each family.
    let to = shop.vip.all().map(|ip| (ip, 80).into());
    let sockets: Vec<TcpStream> = shop
        .web
        .inside(|| {
            (0..CONNECTIONS)
                .map(|number| {
                    let socket = TcpStream::connect_timeout(&to[number % 2], WAIT)
                        .unwrap_or_else(|e| panic!("connection {number}: {e}"));
                    socket.set_read_timeout(Some(WAIT)).unwrap();
                    socket
                })
                .collect()
        })
        .unwrap();
    for (number, socket) in sockets.iter().enumerate() {
        echo_once(socket, &number.to_be_bytes()).unwrap_or_else(|e| panic!("connection {number}: {e:#}"));
    }
    assert_eq!(server.accepted(), CONNECTIONS as u64);
    thread::sleep(Duration::from_secs(3));
    for (number, socket) in sockets.iter().enumerate() {
        echo_once(socket, b"still").unwrap_or_else(|e| panic!("connection {number} after idling: {e:#}"));
    }
}

#[test]
fn f53_each_direction_closes_alone() {
    let shop = Shop::open();
    let listener = shop.cart.listen(8080).unwrap();
    for ip in shop.vip.all() {
        // The client ends first, and still receives.
        let mut client = shop.web.connect((ip, 80)).unwrap();
        let mut server = accept(&listener);
        client.set_read_timeout(Some(WAIT)).unwrap();
        client.write_all(b"question").unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let mut question = String::new();
        server.read_to_string(&mut question).unwrap();
        assert_eq!(question, "question");
        thread::sleep(Duration::from_millis(300));
        server.write_all(b"answer").unwrap();
        drop(server);
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, "answer");

        // The server ends first, and still receives.
        let mut client = shop.web.connect((ip, 80)).unwrap();
        let mut server = accept(&listener);
        client.set_read_timeout(Some(WAIT)).unwrap();
        server.write_all(b"notice").unwrap();
        server.shutdown(Shutdown::Write).unwrap();
        let mut notice = String::new();
        client.read_to_string(&mut notice).unwrap();
        assert_eq!(notice, "notice");
        thread::sleep(Duration::from_millis(300));
        client.write_all(b"noted").unwrap();
        drop(client);
        let mut noted = String::new();
        server.read_to_string(&mut noted).unwrap();
        assert_eq!(noted, "noted");
    }
}

#[test]
fn f53_a_server_that_speaks_first_is_heard_at_once() {
    let shop = Shop::open();
    let _greeting = Server::greet(shop.cart.listen(8080).unwrap()).unwrap();
    // The first connection pays for the certificate and the handshake.
    echo_once(&greeted(&shop), b"warm").unwrap();
    let start = Instant::now();
    let socket = greeted(&shop);
    let took = start.elapsed();
    assert!(
        took < Duration::from_millis(500),
        "connect and greeting took {took:?}"
    );
    echo_once(&socket, b"EHLO").unwrap();
}

#[test]
fn f53_a_reset_is_a_reset_and_an_urgent_byte_is_a_byte() {
    let shop = Shop::open();
    let listener = shop.cart.listen(8080).unwrap();
    for ip in shop.vip.all() {
        let pair = || {
            let client = shop.web.connect((ip, 80)).unwrap();
            client.set_read_timeout(Some(WAIT)).unwrap();
            (client, accept(&listener))
        };
        // Either end resets in the middle of a stream; the other is told so, and not that it has ended.
        for client_resets in [true, false] {
            let (mut client, mut server) = pair();
            client.write_all(b"begun").unwrap();
            server.read_exact(&mut [0; 5]).unwrap();
            let (resetting, told) = if client_resets {
                (client, &mut server)
            } else {
                (server, &mut client)
            };
            SockRef::from(&resetting)
                .set_linger(Some(Duration::ZERO))
                .unwrap();
            drop(resetting);
            let error = told.read(&mut [0; 1]).unwrap_err();
            assert_eq!(
                error.kind(),
                ErrorKind::ConnectionReset,
                "{ip}, by the client: {client_resets}"
            );
        }
        // Writes of nothing say nothing; an urgent byte arrives in its place.
        let (mut client, mut server) = pair();
        for part in [&b""[..], b"before", b"", b""] {
            client.write_all(part).unwrap();
            // Through the tunnel before what follows, so that nothing hides a byte out of place.
            thread::sleep(Duration::from_millis(50));
        }
        SockRef::from(&client).send_out_of_band(b"!").unwrap();
        thread::sleep(Duration::from_millis(50));
        client.write_all(b"after").unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let mut all = String::new();
        server.read_to_string(&mut all).unwrap();
        assert_eq!(all, "before!after", "{ip}");
        SockRef::from(&server).send_out_of_band(b"?").unwrap();
        drop(server);
        let mut all = String::new();
        client.read_to_string(&mut all).unwrap();
        assert_eq!(all, "?", "{ip}");
    }
}

fn greeted(shop: &Shop) -> TcpStream {
    let socket = shop.web.connect((shop.vip.v6, 80)).unwrap();
    socket.set_read_timeout(Some(WAIT)).unwrap();
    let mut line = String::new();
    BufReader::with_capacity(1, &socket).read_line(&mut line).unwrap();
    assert_eq!(line, format!("220 {}\r\n", shop.web.addresses().v6));
    socket
}

fn accept(listener: &std::net::TcpListener) -> TcpStream {
    listener.set_nonblocking(true).unwrap();
    let accepted = culvert_e2e::lab::poll_until("a connection arrives", WAIT, || match listener.accept() {
        Ok((socket, _)) => Ok(Some(socket)),
        Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => Ok(None),
        Err(e) => Err(e.into()),
    });
    let socket = accepted.unwrap();
    socket.set_nonblocking(false).unwrap();
    socket.set_read_timeout(Some(WAIT)).unwrap();
    socket
}
