//! One direction of a TCP connection, put back in order.
//!
//! Invariant: each byte is looked at once and in order, but for those that the capture missed.

use std::collections::BTreeMap;

use memchr::memmem::Finder;

use super::packet::Segment;

/// Kept of the start: enough for a TLS server's first flight.
const HEAD_BYTES: usize = 16 << 10;

/// Segments ahead of a hole wait for it this long; then the hole counts as missed.
const WAITING_BYTES: usize = 4 << 20;

#[derive(Debug)]
pub struct Stream {
    /// Sequence number of the next byte, once known.
    next: Option<u32>,
    opened_by: Option<u32>,
    head: Vec<u8>,
    bytes: u64,
    missed: u64,
    /// Ahead of a hole: distance from `next` is not kept, sequence numbers wrap.
    waiting: BTreeMap<u32, Vec<u8>>,
    waiting_bytes: usize,
    /// The end of what was searched: a canary may lie across two segments.
    seam: Vec<u8>,
    seen: Vec<bool>,
}

impl Stream {
    pub fn new(canaries: usize) -> Self {
        Self {
            next: None,
            opened_by: None,
            head: Vec::new(),
            bytes: 0,
            missed: 0,
            waiting: BTreeMap::new(),
            waiting_bytes: 0,
            seam: Vec::new(),
            seen: vec![false; canaries],
        }
    }

    pub fn head(&self) -> &[u8] {
        &self.head
    }

    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    pub fn missed(&self) -> u64 {
        self.missed
    }

    /// Whether a SYN with `sequence` is a repetition of the one that opened this stream.
    pub fn is_opened_by(&self, sequence: u32) -> bool {
        self.opened_by == Some(sequence)
    }

    /// Takes a segment; returns the canaries that came into view with it, by their index.
    pub fn segment(&mut self, segment: &Segment<'_>, canaries: &[Finder<'_>]) -> Vec<usize> {
        let mut sequence = segment.sequence;
        if segment.syn {
            self.opened_by = Some(sequence);
            sequence = sequence.wrapping_add(1);
            self.next.get_or_insert(sequence);
        }
        let mut found = Vec::new();
        if segment.payload.is_empty() || segment.rst {
            return found;
        }
        let next = *self.next.get_or_insert(sequence);
        if ahead(next, sequence) > 0 {
            self.hold(sequence, segment.payload);
            if self.waiting_bytes > WAITING_BYTES {
                self.give_up_hole();
            }
        } else {
            self.take(sequence, segment.payload, canaries, &mut found);
        }
        self.take_waiting(canaries, &mut found);
        found
    }

    fn hold(&mut self, sequence: u32, payload: &[u8]) {
        let known = self.waiting.get(&sequence).map_or(0, Vec::len);
        if payload.len() > known {
            self.waiting_bytes += payload.len() - known;
            self.waiting.insert(sequence, payload.to_vec());
        }
    }

    /// The nearest segment behind the hole is next.
    fn give_up_hole(&mut self) {
        let Some(next) = self.next else { return };
        if let Some(distance) = self.waiting.keys().map(|&sequence| ahead(next, sequence)).min()
            && let Ok(distance) = u32::try_from(distance)
        {
            self.missed += u64::from(distance);
            self.next = Some(next.wrapping_add(distance));
            self.seam.clear();
        }
    }

    fn take_waiting(&mut self, canaries: &[Finder<'_>], found: &mut Vec<usize>) {
        while let Some(next) = self.next {
            let ready = self
                .waiting
                .keys()
                .copied()
                .find(|&sequence| ahead(next, sequence) <= 0);
            let Some(sequence) = ready else { return };
            let payload = self.waiting.remove(&sequence).unwrap_or_default();
            self.waiting_bytes -= payload.len();
            self.take(sequence, &payload, canaries, found);
        }
    }

    /// Takes what is new of a payload that starts at or before `next`.
    fn take(&mut self, sequence: u32, payload: &[u8], canaries: &[Finder<'_>], found: &mut Vec<usize>) {
        let Some(next) = self.next else { return };
        let known = next.wrapping_sub(sequence) as usize;
        let Some(new) = payload.get(known..).filter(|new| !new.is_empty()) else {
            return;
        };
        self.next = Some(next.wrapping_add(new.len() as u32));
        self.bytes += new.len() as u64;
        let room = HEAD_BYTES.saturating_sub(self.head.len()).min(new.len());
        self.head.extend_from_slice(&new[..room]);
        let longest = canaries
            .iter()
            .map(|canary| canary.needle().len())
            .max()
            .unwrap_or(0);
        if longest == 0 {
            return;
        }
        // The seam and as much of the new bytes as a canary across the border can need.
        let border = new.len().min(longest);
        let mut across = std::mem::take(&mut self.seam);
        across.extend_from_slice(&new[..border]);
        for (index, canary) in canaries.iter().enumerate() {
            if !self.seen[index] && (canary.find(&across).is_some() || canary.find(new).is_some()) {
                self.seen[index] = true;
                found.push(index);
            }
        }
        if border < new.len() {
            across.clear();
            across.extend_from_slice(&new[new.len() - longest..]);
        }
        across.drain(..across.len().saturating_sub(longest));
        self.seam = across;
    }
}

/// How far `sequence` is ahead of `next`; negative when it is behind (RFC 9293 §3.4: modulo 2^32).
fn ahead(next: u32, sequence: u32) -> i32 {
    sequence.wrapping_sub(next) as i32
}
