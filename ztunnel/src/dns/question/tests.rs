//! Queries as resolvers write them, and as they must not.

use super::*;
use std::str::FromStr;

fn query(name: &str, kind: RecordType) -> Vec<u8> {
    let mut message = Message::query();
    message.metadata.id = 9;
    message.add_query(hickory_proto::op::Query::query(
        Name::from_str(name).unwrap(),
        kind,
    ));
    message.to_vec().unwrap()
}

#[test]
fn a_reply_repeats_the_question_and_carries_the_addresses() {
    let question = Question::decode(&query("Cart.Shop.svc.", RecordType::A)).unwrap();
    let asked = question.asked().unwrap();
    assert_eq!((asked.name.as_str(), asked.kind), ("cart.shop.svc", Kind::A));
    let answer = Answer::Addresses(vec!["10.96.0.1".parse().unwrap()]);
    let reply = question.reply(&answer, Transport::Udp);
    assert!(question.is_answered_by(&reply), "letter by letter");
    let reply = Message::from_vec(&reply).unwrap();
    assert_eq!((reply.metadata.id, reply.answers.len()), (9, 1));
}

#[test]
fn what_does_not_fit_a_datagram_is_truncated_and_asked_again_by_tcp() {
    let question = Question::decode(&query("cart.shop.svc.", RecordType::A)).unwrap();
    let many = (0..200u8)
        .map(|last| std::net::Ipv4Addr::new(10, 0, 0, last).into())
        .collect();
    let answer = Answer::Addresses(many);
    let by_udp = Message::from_vec(&question.reply(&answer, Transport::Udp)).unwrap();
    assert!(by_udp.metadata.truncation);
    let by_tcp = Message::from_vec(&question.reply(&answer, Transport::Tcp)).unwrap();
    assert_eq!((by_tcp.metadata.truncation, by_tcp.answers.len()), (false, 200));
}

#[test]
fn t30_broken_queries_are_errors_and_never_a_panic() {
    let good = query("cart.shop.svc.", RecordType::A);
    for length in 0..good.len() {
        let _ = Question::decode(&good[..length]);
    }
    // A name that points at itself.
    let mut looped = good[..12].to_vec();
    looped.extend([0xc0, 12, 0, 1, 0, 1]);
    assert!(Question::decode(&looped).is_err());
    for seed in 0..2000u32 {
        let bytes: Vec<u8> = (0..seed % 64)
            .map(|i| (i.wrapping_mul(seed ^ 0x9e37) >> 2) as u8)
            .collect();
        if let Ok(question) = Question::decode(&bytes) {
            let _ = (question.asked(), question.printable(), question.failure());
        }
    }
}

/// Whatever a pod or a resolver sends, it is read or refused, and what is read can be answered.
#[test]
fn fuzz_dns_question_and_answer() {
    let addresses = |count: u8| (0..count).map(|n| IpAddr::from([10, 0, 0, n])).collect();
    let answers = [
        Answer::Empty,
        Answer::Addresses(addresses(3)),
        Answer::Addresses(addresses(200)),
        Answer::Services(vec![crate::dns::answer::Target {
            host: "a.b".into(),
            port: 80,
            addresses: addresses(1),
        }]),
    ];
    let outcomes = culvert_fuzz::fuzz("dns_question", 20_000, |input| {
        let question = match Question::decode(input) {
            Ok(question) => question,
            Err(error) => return culvert_fuzz::kind(&error),
        };
        assert!(question.printable().chars().all(|c| !c.is_control()));
        let is_reply = question.is_answered_by(input);
        let Some(asked) = question.asked() else {
            question.failure();
            return format!("no question for the mesh, {is_reply}");
        };
        assert_eq!(asked.name, asked.name.to_ascii_lowercase());
        for answer in &answers {
            for (transport, most) in [(Transport::Udp, 1232), (Transport::Tcp, 65_535)] {
                let reply = question.reply(answer, transport);
                assert!(question.is_answered_by(&reply), "it repeats its question");
                assert!(reply.len() <= most, "{} bytes", reply.len());
            }
        }
        format!("{:?}", asked.kind)
    });
    assert!(outcomes > 5, "{outcomes} outcomes");
}
