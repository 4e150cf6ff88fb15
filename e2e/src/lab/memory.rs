//! What a process has in memory, searched for private keys.
//!
//! ```text
//! /proc/PID/maps ──writable──▶ /proc/PID/pagemap ──present──▶ /proc/PID/mem ──▶ Memory ──▶ keys, traces
//! ```
//! Invariant: every writable page that the process has touched and that is not shared with the kernel alone is
//! looked at, stacks and freed heap included; a page that goes away meanwhile is skipped.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result};
use memchr::memmem::find_iter;

use super::Process;

const PAGE: usize = 4096;
/// Of a page's entry in `pagemap`: it is in memory, or swapped out.
const PRESENT: u64 = 0b11 << 62;

/// How the private part begins in a PKCS#8 key on P-256 (RFC 5915), up to its 32 bytes.
const EC_PRIVATE: [u8; 7] = [0x30, 0x6b, 0x02, 0x01, 0x01, 0x04, 0x20];
const SCALAR: usize = 32;

/// A copy of a process's memory.
pub struct Memory(Vec<Piece>);

/// Pages that follow one another.
struct Piece {
    /// The mapping's line.
    of: String,
    at: usize,
    bytes: Vec<u8>,
}

/// The secret number of a key on P-256.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct PrivateKey([u8; SCALAR]);

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PrivateKey")
    }
}

impl Memory {
    /// Reads all that `process` can write to.
    pub fn of(process: &Process) -> Result<Self> {
        let file = |name: &str| format!("/proc/{}/{name}", process.pid());
        let maps = fs::read_to_string(file("maps")).context("maps")?;
        let pagemap = File::open(file("pagemap")).context("pagemap")?;
        let memory = File::open(file("mem")).context("mem")?;
        let mut pieces = Vec::new();
        for line in maps.lines() {
            let Some((from, to)) = writable(line) else {
                continue;
            };
            let mut entries = vec![0; (to - from) / PAGE * 8];
            if pagemap
                .read_exact_at(&mut entries, (from / PAGE * 8) as u64)
                .is_err()
            {
                continue;
            }
            let (entries, _) = entries.as_chunks::<8>();
            let there: Vec<bool> = entries
                .iter()
                .map(|entry| u64::from_ne_bytes(*entry) & PRESENT != 0)
                .collect();
            let mut at = from;
            for run in there.chunk_by(|a, b| a == b) {
                let mut bytes = vec![0; run.len() * PAGE];
                if run[0] && memory.read_exact_at(&mut bytes, at as u64).is_ok() {
                    let of = line.to_owned();
                    pieces.push(Piece { of, at, bytes });
                }
                at += run.len() * PAGE;
            }
        }
        Ok(Self(pieces))
    }

    /// Every private key on P-256 that is there whole, as PKCS#8.
    pub fn private_keys(&self) -> BTreeSet<PrivateKey> {
        let mut found = BTreeSet::new();
        for piece in &self.0 {
            for at in find_iter(&piece.bytes, &EC_PRIVATE) {
                let from = at + EC_PRIVATE.len();
                let scalar = piece.bytes.get(from..from + SCALAR);
                found.extend(scalar.and_then(|bytes| bytes.try_into().ok()).map(PrivateKey));
            }
        }
        found
    }

    /// Where a key is, or half of it: as in DER, as the words of a number, or as text.
    pub fn traces(&self, key: &PrivateKey) -> Vec<String> {
        let number: Vec<u8> = key.0.iter().rev().copied().collect();
        // In PEM the number begins at byte 36, and so at a whole group of text; the line ends after 12 bytes.
        let text = base64(&key.0[..12]);
        let halves = [("DER", &key.0[..16]), ("DER", &key.0[16..])].into_iter();
        let halves = halves.chain([("number", &number[..16]), ("number", &number[16..])]);
        let forms: Vec<_> = halves.chain([("PEM", text.as_bytes())]).collect();
        let mut found = Vec::new();
        for piece in &self.0 {
            for (form, bytes) in &forms {
                let here = find_iter(&piece.bytes, bytes);
                found.extend(here.map(|at| format!("{form} at {:x} of {}", piece.at + at, piece.of)));
            }
        }
        found
    }
}

/// The range of a line of `maps` that the process may write to; the kernel's own pages are not its memory.
fn writable(line: &str) -> Option<(usize, usize)> {
    let mut words = line.split_whitespace();
    let (range, rights) = (words.next()?, words.next()?);
    if !rights.starts_with("rw") || line.contains("[v") {
        return None;
    }
    let (from, to) = range.split_once('-')?;
    let number = |text| usize::from_str_radix(text, 16).ok();
    Some((number(from)?, number(to)?))
}

/// Whole groups of three bytes, as PEM has them.
fn base64(bytes: &[u8]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let (groups, _) = bytes.as_chunks::<3>();
    let letters = groups.iter().flat_map(|[a, b, c]| {
        let bits = u32::from_be_bytes([0, *a, *b, *c]);
        [18, 12, 6, 0].map(|shift| char::from(LETTERS[(bits >> shift) as usize & 63]))
    });
    letters.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tr1_a_key_is_found_in_every_form_that_it_is_held_in() {
        let key = PrivateKey(std::array::from_fn(|at| at as u8 * 7 + 1));
        let der = [&EC_PRIVATE[..], &key.0].concat();
        let mut number = key.0;
        number.reverse();
        let text = format!("{}\n", base64(&key.0[..12]));
        for (form, bytes, traces) in [
            ("nothing", &[0; 64][..], 0),
            ("DER", &der, 2),
            ("its second half", &key.0[16..], 1),
            ("number", &number, 2),
            ("PEM", text.as_bytes(), 1),
        ] {
            let piece = Piece {
                of: "heap".into(),
                at: 0x1000,
                bytes: [&[7; 13], bytes, &[9; 40]].concat(),
            };
            let memory = Memory(vec![piece]);
            assert_eq!(memory.traces(&key).len(), traces, "{form}");
            assert_eq!(memory.private_keys().contains(&key), form == "DER", "{form}");
        }
        assert_eq!(base64(b"canary"), "Y2FuYXJ5");
    }
}
