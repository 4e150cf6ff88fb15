//! Recordings made by hand, and what is found in them.

use std::net::Ipv4Addr;

use super::packet::Segment;
use super::stream::Stream;
use super::tls::{NotTls, ServerHello, TLS13, X25519MLKEM768, server_hello};
use super::*;

fn segment(sequence: u32, payload: &[u8]) -> Segment<'_> {
    Segment {
        source_port: 1,
        destination_port: 2,
        sequence,
        syn: false,
        ack: true,
        rst: false,
        payload,
    }
}

#[test]
fn a_stream_is_put_back_in_order_across_the_wrap_of_sequence_numbers() {
    let start = u32::MAX - 3;
    let mut stream = Stream::new(0);
    let mut syn = segment(start.wrapping_sub(1), b"");
    syn.syn = true;
    for next in [
        syn,
        segment(start, b"ab"),
        segment(start.wrapping_add(4), b"ef"),
        segment(start.wrapping_add(1), b"bcd"),
        segment(start.wrapping_add(2), b"cdefgh"),
    ] {
        stream.segment(&next, &[]);
    }
    assert_eq!(stream.head(), b"abcdefgh");
    assert_eq!((stream.bytes(), stream.missed()), (8, 0));
}

#[test]
fn a_canary_across_any_border_of_segments_is_seen_once() {
    let text = b"....canary-7f3a....";
    let canaries = [Finder::new(b"canary-7f3a")];
    for size in 1..text.len() {
        let mut stream = Stream::new(1);
        let mut sightings = 0;
        for (index, chunk) in text.chunks(size).enumerate() {
            sightings += stream
                .segment(&segment((index * size) as u32, chunk), &canaries)
                .len();
        }
        assert_eq!(sightings, 1, "segments of {size} bytes");
    }
}

#[test]
fn a_hole_that_never_fills_is_counted() {
    let mut stream = Stream::new(0);
    stream.segment(&segment(0, b"start"), &[]);
    let block = vec![7; 1 << 20];
    for number in 0..5u32 {
        stream.segment(&segment(105 + (number << 20), &block), &[]);
    }
    assert_eq!(stream.missed(), 100);
    assert_eq!(stream.bytes(), 5 + (5 << 20));
}

#[test]
fn any_bytes_are_a_packet() {
    let mut frame = [0u8; 96];
    for kind in [[0x08, 0x00], [0x86, 0xdd], [0x08, 0x06], [0x12, 0x34]] {
        frame[12..14].copy_from_slice(&kind);
        for first in 0..=255 {
            frame[14] = first;
            frame[20] = first;
            for length in 0..frame.len() {
                Packet::parse(&frame[..length]).to_string();
            }
        }
    }
}

/// A ServerHello record with the given extensions.
fn hello(random: [u8; 32], extensions: &[u8]) -> Vec<u8> {
    let mut body = vec![3, 3];
    body.extend(random);
    body.extend([0, 0x13, 0x02, 0]);
    body.extend((extensions.len() as u16).to_be_bytes());
    body.extend(extensions);
    let mut message = vec![2, 0];
    message.extend((body.len() as u16).to_be_bytes());
    message.extend(body);
    let mut record = vec![22, 3, 3];
    record.extend((message.len() as u16).to_be_bytes());
    record.extend(message);
    record
}

#[test]
fn a_server_hello_tells_version_and_group() {
    let hybrid = [0, 43, 0, 2, 3, 4, 0, 51, 0, 5, 0x11, 0xec, 0, 1, 9];
    let classic = [0, 51, 0, 5, 0, 29, 0, 1, 9, 0, 43, 0, 2, 3, 4];
    let retry: [u8; 32] = [
        0xcf, 0x21, 0xad, 0x74, 0xe5, 0x9a, 0x61, 0x11, 0xbe, 0x1d, 0x8c, 0x02, 0x1e, 0x65, 0xb8, 0x91, 0xc2,
        0xa2, 0x11, 0x16, 0x7a, 0xbb, 0x8c, 0x5e, 0x07, 0x9e, 0x09, 0xe2, 0xc8, 0xa8, 0x33, 0x9c,
    ];
    let selected = |group: u16, retried| ServerHello {
        version: TLS13,
        group: Some(group),
        cipher_suite: 0x1302,
        retried,
    };
    let mut after_retry = hello(retry, &[0, 43, 0, 2, 3, 4, 0, 51, 0, 2, 0x11, 0xec]);
    after_retry.extend([20, 3, 3, 0, 1, 1]);
    after_retry.extend(hello([5; 32], &hybrid));
    let old = ServerHello {
        version: 0x0303,
        group: None,
        cipher_suite: 0x1302,
        retried: false,
    };
    for (case, head, want) in [
        (
            "hybrid",
            hello([5; 32], &hybrid),
            Ok(selected(X25519MLKEM768, false)),
        ),
        ("classic", hello([5; 32], &classic), Ok(selected(29, false))),
        ("after a retry", after_retry, Ok(selected(X25519MLKEM768, true))),
        ("no supported_versions", hello([5; 32], &[]), Ok(old)),
        (
            "plaintext",
            b"HTTP/1.1 200 OK\r\n\r\n".to_vec(),
            Err(NotTls::NoHandshake),
        ),
        ("nothing", Vec::new(), Err(NotTls::NoHandshake)),
        (
            "cut",
            hello([5; 32], &hybrid)[..40].to_vec(),
            Err(NotTls::NoHandshake),
        ),
    ] {
        assert_eq!(server_hello(&head), want, "{case}");
    }
}

#[test]
fn a_packet_names_what_is_no_tcp() {
    let mut frame = vec![0u8; 14 + 28];
    frame[12] = 8;
    frame[14] = 0x45;
    frame[16..18].copy_from_slice(&28u16.to_be_bytes());
    frame[23] = 17;
    frame[26..30].copy_from_slice(&Ipv4Addr::new(10, 1, 0, 2).octets());
    frame[34..36].copy_from_slice(&40_000u16.to_be_bytes());
    frame[36..38].copy_from_slice(&53u16.to_be_bytes());
    let packet = Packet::parse(&frame);
    assert_eq!(packet.to_string(), "udp port 53 10.1.0.2 -> 0.0.0.0");
}
