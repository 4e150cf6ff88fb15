//! Finds fields that we do not know (settled D19).
//!
//! Decoding drops them silently, and a policy without one of its conditions is another policy. The walker
//! reads the same bytes before the decoder does and knows only field numbers and wire types.

/// The fields of a message: number and, for messages, the shape inside.
pub struct Shape(&'static [(u32, Option<&'static Shape>)]);

macro_rules! shape {
    ($name:ident: $($number:literal $(=> $inner:ident)?),* $(,)?) => {
        static $name: Shape = Shape(&[$(($number, shape!(@inner $($inner)?))),*]);
    };
    (@inner) => { None };
    (@inner $inner:ident) => { Some(&$inner) };
}

shape!(EMPTY: );
shape!(ADDRESS: 1, 2);
shape!(ACCOUNT: 1, 2);
shape!(STRING_MATCH: 1, 2, 3, 4 => EMPTY);
shape!(MATCH:
    1 => STRING_MATCH, 2 => STRING_MATCH, 3 => STRING_MATCH, 4 => STRING_MATCH,
    5 => ADDRESS, 6 => ADDRESS, 7 => ADDRESS, 8 => ADDRESS,
    9, 10, 11 => ACCOUNT, 12 => ACCOUNT,
);
shape!(CLAUSE: 2 => MATCH);
shape!(RULE: 1 => CLAUSE);
shape!(POLICY: 1, 2, 3, 4, 5 => RULE, 6);
shape!(OUTBOUND_RULE:
    1 => STRING_MATCH, 2 => STRING_MATCH, 3 => STRING_MATCH, 4 => STRING_MATCH,
    5 => ADDRESS, 6 => ADDRESS, 7, 8,
);
shape!(OUTBOUND: 1, 2, 3, 4, 5 => OUTBOUND_RULE, 6);

/// `istio.security.Authorization`, without extensions: none is understood.
pub static AUTHORIZATION: &Shape = &POLICY;
/// `culvert.mesh.v1.OutboundPolicy`.
pub static OUTBOUND_POLICY: &Shape = &OUTBOUND;

/// The first field of `bytes` that `shape` does not know, as its path of field numbers, or what is wrong
/// with the encoding.
pub fn unknown_field(bytes: &[u8], shape: &Shape) -> Option<String> {
    walk(bytes, shape, String::new()).err()
}

fn walk(mut bytes: &[u8], shape: &Shape, path: String) -> Result<(), String> {
    while !bytes.is_empty() {
        let key = varint(&mut bytes).ok_or_else(|| format!("cut short in {path:?}"))?;
        let (number, kind) = (key >> 3, key & 7);
        let here = format!("{path}/{number}");
        let known = shape.0.iter().find(|(known, _)| u64::from(*known) == number);
        let Some((_, inner)) = known else {
            return Err(format!("unknown field {here}"));
        };
        let cut = || format!("cut short in field {here}");
        match kind {
            0 => {
                varint(&mut bytes).ok_or_else(cut)?;
            }
            1 => bytes = bytes.get(8..).ok_or_else(cut)?,
            5 => bytes = bytes.get(4..).ok_or_else(cut)?,
            2 => {
                let length = varint(&mut bytes)
                    .and_then(|n| usize::try_from(n).ok())
                    .ok_or_else(cut)?;
                let (content, rest) = bytes.split_at_checked(length).ok_or_else(cut)?;
                if let Some(inner) = inner {
                    walk(content, inner, here)?;
                }
                bytes = rest;
            }
            _ => return Err(format!("field {here} has an unknown wire type")),
        }
    }
    Ok(())
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0u64;
    for shift in (0..70).step_by(7) {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(byte & 0x7f).checked_shl(shift).unwrap_or(0);
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use culvert_proto::security::{
        Address, Authorization, Clause, Match, Rule, ServiceAccountMatch, StringMatch,
        string_match::MatchType,
    };
    use prost::Message;

    fn full() -> Authorization {
        let text = || {
            vec![StringMatch {
                match_type: Some(MatchType::Presence(())),
            }]
        };
        let address = || {
            vec![Address {
                address: vec![10, 0, 0, 1],
                length: 32,
            }]
        };
        let account = || {
            vec![ServiceAccountMatch {
                namespace: "a".into(),
                service_account: "b".into(),
            }]
        };
        let one = Match {
            namespaces: text(),
            not_namespaces: text(),
            principals: text(),
            not_principals: text(),
            source_ips: address(),
            not_source_ips: address(),
            destination_ips: address(),
            not_destination_ips: address(),
            destination_ports: vec![1],
            not_destination_ports: vec![2],
            service_accounts: account(),
            not_service_accounts: account(),
            extensions: vec![],
        };
        Authorization {
            name: "n".into(),
            namespace: "ns".into(),
            scope: 1,
            action: 1,
            rules: vec![Rule {
                clauses: vec![Clause { matches: vec![one] }],
            }],
            dry_run: true,
            extensions: vec![],
        }
    }

    #[test]
    fn t06_every_known_field_passes_and_an_unknown_one_is_named_at_every_level() {
        let bytes = full().encode_to_vec();
        assert_eq!(unknown_field(&bytes, AUTHORIZATION), None);
        // Field 99, a varint, appended to the message at each level.
        let unknown = [0x98, 0x06, 0x01];
        let wrap = |number: u8, inner: &[u8]| {
            let mut outer = vec![number << 3 | 2, u8::try_from(inner.len()).unwrap()];
            outer.extend_from_slice(inner);
            outer
        };
        let in_match = wrap(5, &wrap(1, &wrap(2, &unknown)));
        for (level, bytes) in [
            ("/99", unknown.to_vec()),
            ("/5/99", wrap(5, &unknown)),
            ("/5/1/99", wrap(5, &wrap(1, &unknown))),
            ("/5/1/2/99", in_match),
            ("/5/1/2/3/99", wrap(5, &wrap(1, &wrap(2, &wrap(3, &unknown))))),
        ] {
            assert_eq!(
                unknown_field(&bytes, AUTHORIZATION),
                Some(format!("unknown field {level}"))
            );
        }
    }

    #[test]
    fn cut_and_odd_encodings_are_named_and_never_panic() {
        let bytes = full().encode_to_vec();
        for length in 1..bytes.len() {
            let _ = unknown_field(&bytes[..length], AUTHORIZATION);
        }
        for odd in [
            &[0x0a][..],
            &[0x0a, 0xff],
            &[0xff; 11],
            &[0x0b],
            &[0x0a, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1],
        ] {
            assert!(unknown_field(odd, AUTHORIZATION).is_some(), "{odd:?}");
        }
    }
}
