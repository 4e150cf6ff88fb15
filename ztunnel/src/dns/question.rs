//! A query as bytes: what it asks, and how a reply to it looks.
//!
//! Invariant: a reply carries the question as it was asked, letter by letter (clients that mix upper and
//! lower case to make forging hard compare it), and fits the size that the client takes.

use super::{
    Transport,
    answer::{Address, Answer, Asked, Kind},
};
use hickory_proto::{
    op::{Edns, Message, MessageType, Metadata, OpCode, ResponseCode},
    rr::{
        DNSClass, Name, RData, Record, RecordType,
        rdata::{A, AAAA, SRV},
    },
    serialize::binary::DecodeError,
};
use std::net::IpAddr;

/// How long a client may keep an answer: as short as the cluster's own DNS gives, for endpoints of headless
/// services come and go.
const TTL_SECONDS: u32 = 5;

/// Largest datagram that is sent, so that it is never fragmented (DNS flag day 2020).
const MAX_UDP_REPLY: usize = 1232;

/// A decoded query.
#[derive(Debug)]
pub struct Question {
    message: Message,
}

impl Question {
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        Message::from_vec(bytes).map(|message| Self { message })
    }

    /// What is asked, if it is a question such as the mesh answers.
    pub fn asked(&self) -> Option<Asked> {
        let metadata = &self.message.metadata;
        let [query] = self.message.queries.as_slice() else {
            return None;
        };
        let plain = metadata.message_type == MessageType::Query
            && metadata.op_code == OpCode::Query
            && query.query_class == DNSClass::IN;
        let kind = match query.query_type {
            RecordType::A => Kind::A,
            RecordType::AAAA => Kind::Aaaa,
            RecordType::SRV => Kind::Srv,
            _ => return None,
        };
        let name = query.name.to_ascii().to_ascii_lowercase();
        plain.then(|| Asked {
            name: name.trim_end_matches('.').to_owned(),
            kind,
        })
    }

    /// The kind of question, as a metric's label.
    pub fn kind(&self) -> &'static str {
        match self.message.queries.first().map(|query| query.query_type) {
            Some(RecordType::A) => "A",
            Some(RecordType::AAAA) => "AAAA",
            Some(RecordType::SRV) => "SRV",
            Some(RecordType::PTR) => "PTR",
            Some(RecordType::CNAME) => "CNAME",
            Some(RecordType::TXT) => "TXT",
            Some(RecordType::MX) => "MX",
            Some(RecordType::NS) => "NS",
            Some(RecordType::SOA) => "SOA",
            Some(RecordType::HTTPS) => "HTTPS",
            Some(RecordType::SVCB) => "SVCB",
            Some(_) => "other",
            None => "none",
        }
    }

    /// The name for the log, with nothing in it that a terminal obeys.
    pub fn printable(&self) -> String {
        let name = self.message.queries.first().map(|query| query.name.to_ascii());
        name.unwrap_or_default().escape_debug().to_string()
    }

    pub fn id(&self) -> u16 {
        self.message.metadata.id
    }

    /// Whether `reply` is a reply to this question.
    pub fn is_answered_by(&self, reply: &[u8]) -> bool {
        Message::from_vec(reply).is_ok_and(|reply| {
            reply.metadata.message_type == MessageType::Response
                && reply.queries.len() == self.message.queries.len()
                && reply.queries.iter().zip(&self.message.queries).all(|(a, b)| {
                    a.query_type == b.query_type && a.query_class == b.query_class && a.name.eq_case(&b.name)
                })
        })
    }

    /// An empty reply to this question.
    fn blank(&self) -> Message {
        let mut metadata = Metadata::response_from_request(&self.message.metadata);
        metadata.recursion_available = true;
        let mut reply = Message::response(self.id(), metadata.op_code);
        reply.metadata = metadata;
        reply.add_queries(self.message.queries.iter().cloned());
        if self.message.edns.is_some() {
            let mut edns = Edns::new();
            edns.set_max_payload(MAX_UDP_REPLY as u16);
            reply.set_edns(edns);
        }
        reply
    }

    /// The reply in bytes.
    pub fn reply(&self, answer: &Answer, transport: Transport) -> Vec<u8> {
        let mut reply = self.blank();
        reply.metadata.authoritative = true;
        let name = self.message.queries.first().map(|query| query.name.clone());
        let name = name.unwrap_or_else(Name::root);
        match answer {
            Answer::Addresses(addresses) => {
                let records = addresses.iter().map(|ip| record(name.clone(), *ip));
                reply.add_answers(records);
            }
            Answer::Services(targets) => {
                for target in targets {
                    let Ok(host) = Name::from_ascii(format!("{}.", target.host)) else {
                        continue;
                    };
                    let data = RData::SRV(SRV::new(0, 100, target.port, host.clone()));
                    reply.add_answer(Record::from_rdata(name.clone(), TTL_SECONDS, data));
                    let additional = target.addresses.iter().map(|ip| record(host.clone(), *ip));
                    reply.add_additionals(additional);
                }
            }
            Answer::Empty | Answer::Forward | Answer::Ask(_) => {}
        }
        let limit = match transport {
            Transport::Udp => usize::from(self.message.max_payload()).min(MAX_UDP_REPLY),
            Transport::Tcp => usize::from(u16::MAX),
        };
        match reply.to_vec() {
            Ok(bytes) if bytes.len() <= limit => bytes,
            // The client asks again by TCP, where all of it fits.
            Ok(_) => reply.truncate().to_vec().unwrap_or_else(|_| self.failure()),
            Err(_) => self.failure(),
        }
    }

    /// SERVFAIL: the client may ask another resolver.
    pub fn failure(&self) -> Vec<u8> {
        let mut reply = self.blank();
        reply.metadata.response_code = ResponseCode::ServFail;
        // A decoded question encodes; were it not so, silence is an answer, too.
        reply.to_vec().unwrap_or_default()
    }
}

fn record(name: Name, ip: Address) -> Record {
    let data = match ip {
        IpAddr::V4(ip) => RData::A(A(ip)),
        IpAddr::V6(ip) => RData::AAAA(AAAA(ip)),
    };
    Record::from_rdata(name, TTL_SECONDS, data)
}

#[cfg(test)]
mod tests;
