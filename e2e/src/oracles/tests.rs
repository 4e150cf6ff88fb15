//! The judges judge: each goes red for what it is to find.

use std::io::ErrorKind;
use std::net::SocketAddr;

use super::*;

const RESET: Failure = Failure::Lost(ErrorKind::ConnectionReset);

fn at(start: Instant, seconds: u64) -> Instant {
    start + Duration::from_secs(seconds)
}

fn fault(start: Instant, any: bool) -> Forgiven {
    Forgiven {
        from: at(start, 10),
        until: at(start, 12),
        any,
    }
}

#[test]
fn o1_only_what_a_fault_can_have_cost_is_forgiven() {
    let start = Instant::now();
    let broken = Failure::Connect(ErrorKind::ConnectionRefused);
    for (case, from, until, failure, cut, outage) in [
        ("open at the fault", 1, 11, RESET, true, true),
        ("begun within it", 11, 13, RESET, true, true),
        ("ended before it", 1, 9, RESET, false, false),
        ("begun after it", 13, 14, RESET, false, false),
        ("no connection came about", 11, 12, broken, false, true),
        ("silent", 11, 31, Failure::Silence, false, true),
        (
            "an end as if all were well",
            1,
            11,
            Failure::Lost(ErrorKind::UnexpectedEof),
            false,
            true,
        ),
        ("other bytes", 1, 11, Failure::Differs, false, false),
    ] {
        for (any, want) in [(false, cut), (true, outage)] {
            let all = Tally {
                streams: vec![StreamEnd {
                    kind: "a stream",
                    opened: at(start, from),
                    ended: at(start, until),
                    blocks: 3,
                    failure: Some(failure),
                }],
                ..Tally::default()
            };
            let lost = nothing_lost(&all, &[fault(start, any)]);
            assert_eq!(lost.is_ok(), want, "{case}, {any}: {lost:?}");
        }
    }
}

#[test]
fn o2_a_refused_caller_that_hears_anything_but_a_reset_is_an_error() {
    let start = Instant::now();
    let to: SocketAddr = ([10, 0, 0, 1], VAULT).into();
    for (case, end, want) in [
        ("reset", Some(RESET), true),
        ("answered", None, false),
        ("other bytes", Some(Failure::Differs), false),
        (
            "a clean end",
            Some(Failure::Lost(ErrorKind::UnexpectedEof)),
            false,
        ),
        ("silence", Some(Failure::Silence), false),
    ] {
        let tried = Intrusion {
            from: to,
            to,
            started: start,
            took: Duration::from_secs(1),
            end,
        };
        assert_eq!(refused(&[tried], &[]).is_ok(), want, "{case}");
        // A fault excuses silence, and never an answer.
        let excused = refused(
            &[tried],
            &[Forgiven {
                from: start,
                until: at(start, 1),
                any: true,
            }],
        );
        assert_eq!(
            excused.is_ok(),
            !matches!(end, None | Some(Failure::Differs)),
            "{case}"
        );
    }
    assert!(
        refused(&[], &[]).is_err(),
        "an intruder that never tried proves nothing"
    );
}
