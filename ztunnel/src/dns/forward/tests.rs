//! Queries passed on to a scripted server.

use super::*;
use hickory_proto::{
    op::{Message, Query, ResponseCode},
    rr::{Name, RecordType},
};
use std::str::FromStr;

fn query(id: u16, name: &str) -> Vec<u8> {
    let mut message = Message::query();
    message.metadata.id = id;
    message.add_query(Query::query(Name::from_str(name).unwrap(), RecordType::A));
    message.to_vec().unwrap()
}

/// The reply that a resolver would give, to the query as it arrived.
fn reply_to(query: &[u8], code: ResponseCode) -> Vec<u8> {
    let query = Message::from_vec(query).unwrap();
    let mut reply = Message::response(query.metadata.id, query.metadata.op_code);
    reply.metadata.response_code = code;
    reply.add_queries(query.queries);
    reply.to_vec().unwrap()
}

#[tokio::test]
async fn t30_only_a_reply_to_this_very_question_is_taken() {
    let resolver = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = resolver.local_addr().unwrap();
    let asked = query(7, "www.example.");
    let question = Question::decode(&asked).unwrap();
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let beside = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let no = ResponseCode::NXDomain;
    let server = async {
        let mut buffer = [0; 512];
        let (length, client) = resolver.recv_from(&mut buffer).await.unwrap();
        let arrived = buffer[..length].to_vec();
        let id = u16::from_be_bytes([arrived[0], arrived[1]]);
        // Right in everything but where it comes from.
        beside.send_to(&reply_to(&arrived, no), client).await.unwrap();
        let forged = [
            vec![],
            b"x".to_vec(),
            reply_to(&query(id.wrapping_add(1), "www.example."), no),
            reply_to(&query(id, "evil.example."), no),
            arrived.clone(),
        ];
        for reply in forged {
            resolver.send_to(&reply, client).await.unwrap();
        }
        let right = reply_to(&arrived, ResponseCode::NoError);
        resolver.send_to(&right, client).await.unwrap();
    };
    let (reply, ()) = tokio::join!(by_udp(socket, address, &asked, &question), server);
    let reply = Message::from_vec(&reply.unwrap()).unwrap();
    assert_eq!(reply.metadata.id, 7, "under the id that the application chose");
    assert_eq!(
        reply.metadata.response_code,
        ResponseCode::NoError,
        "a forged one"
    );
    assert_eq!(reply.queries[0].name.to_ascii(), "www.example.");
}

#[tokio::test]
async fn t30_a_query_goes_on_under_an_id_that_its_client_has_not_chosen() {
    let resolver = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = resolver.local_addr().unwrap();
    let asked = query(7, "www.example.");
    let question = Question::decode(&asked).unwrap();
    let mut ids = vec![];
    for _ in 0..3 {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let server = async {
            let mut buffer = [0; 512];
            let (length, client) = resolver.recv_from(&mut buffer).await.unwrap();
            ids.push(u16::from_be_bytes([buffer[0], buffer[1]]));
            let reply = reply_to(&buffer[..length], ResponseCode::NoError);
            resolver.send_to(&reply, client).await.unwrap();
        };
        let (reply, ()) = tokio::join!(by_udp(socket, address, &asked, &question), server);
        reply.unwrap();
    }
    assert!(ids.iter().any(|id| *id != 7), "{ids:?}");
}
