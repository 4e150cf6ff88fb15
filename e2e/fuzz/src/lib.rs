//! Fuzzing of decoders without a fuzzer: a corpus, replayed and mutated, in any `cargo test`.
//!
//! ```text
//! corpus/NAME/* ──▶ replay ──▶ mutate (seeded) ──▶ target ──▶ outcome, a new one joins the pool
//!                                                    └─ panic ─▶ the input is kept and named
//! ```
//! A target is a plain function that decodes its bytes, asserts what must hold of the result and says in a
//! word what became of it. Those of public decoders are this crate's tests; a program's private decoder is
//! a target beside it, in its own tests.
//!
//! Invariant: without `CULVERT_FUZZ_SECONDS` a run is the same every time and takes seconds. With it, each
//! target runs for so long from a seed of its own, which is printed.
#![forbid(unsafe_code)]

use std::collections::HashSet;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

/// Inputs kept beside the corpus because they led somewhere new.
const POOL: usize = 2_000;
/// Longest input that mutation makes.
const LONGEST: usize = 4 << 10;
/// Values at which lengths, numbers and text change their meaning.
const BYTES: [u8; 16] = [
    0, 1, 0x0a, 0x20, 0x22, 0x25, 0x2c, 0x2f, 0x3a, 0x3b, 0x3d, 0x5b, 0x7f, 0x80, 0xc0, 0xff,
];

/// Runs `target` on the corpus called `name` and on `rounds` mutations of it; returns how many different
/// outcomes there were.
///
/// # Panics
/// When the target does, after keeping the input and printing where; and when there is no corpus.
pub fn fuzz(name: &str, rounds: u64, target: impl Fn(&[u8]) -> String) -> usize {
    let corpus = corpus(name);
    assert!(!corpus.is_empty(), "{} holds no corpus", folder(name).display());
    let mut run = Run {
        name,
        target,
        pool: Vec::new(),
        seen: HashSet::new(),
    };
    for input in corpus {
        run.once(&input);
        run.pool.push(input);
    }
    let long = std::env::var("CULVERT_FUZZ_SECONDS")
        .ok()
        .and_then(|seconds| seconds.parse().ok())
        .map(Duration::from_secs);
    match long {
        None => {
            let mut random = Random(digest(name.as_bytes()));
            for _ in 0..rounds {
                run.mutated(&mut random);
            }
        }
        Some(length) => {
            let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
            let seed = now.map_or(0, |now| now.as_nanos() as u64);
            eprintln!("{name}: {length:?} from seed {seed}");
            let (mut random, end) = (Random(seed), Instant::now() + length);
            while Instant::now() < end {
                run.mutated(&mut random);
            }
        }
    }
    run.seen.len()
}

/// Writes `bytes` to the corpus when `CULVERT_REGENERATE` is set: for seeds that no editor can write.
pub fn seed(name: &str, file: &str, bytes: &[u8]) {
    if std::env::var_os("CULVERT_REGENERATE").is_some() {
        let folder = folder(name);
        let written = fs::create_dir_all(&folder).and_then(|()| fs::write(folder.join(file), bytes));
        written.unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    }
}

/// A kind of error: its text without what differs from input to input.
pub fn kind(error: &impl std::fmt::Display) -> String {
    let text = error.to_string();
    let head: String = text
        .chars()
        .take_while(|c| *c != '"' && *c != '\'')
        .filter(|c| !c.is_ascii_digit())
        .collect();
    head.chars().take(60).collect()
}

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(name)
}

fn corpus(name: &str) -> Vec<Vec<u8>> {
    let mut files: Vec<PathBuf> = fs::read_dir(folder(name))
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .collect();
    files.sort();
    files
        .iter()
        .map(|file| fs::read(file).unwrap_or_else(|e| panic!("{}: {e}", file.display())))
        .collect()
}

struct Run<'n, T> {
    name: &'n str,
    target: T,
    pool: Vec<Vec<u8>>,
    seen: HashSet<String>,
}

impl<T: Fn(&[u8]) -> String> Run<'_, T> {
    fn mutated(&mut self, random: &mut Random) {
        let input = mutate(&self.pool, random);
        if self.once(&input) && self.pool.len() < POOL {
            self.pool.push(input);
        }
    }

    /// Whether the outcome was new.
    fn once(&mut self, input: &[u8]) -> bool {
        match catch_unwind(AssertUnwindSafe(|| (self.target)(input))) {
            Ok(outcome) => self.seen.insert(outcome),
            Err(panic) => {
                let kept = keep(self.name, input);
                eprintln!(
                    "{}: {} bytes at {kept} fail; mend it, and add the file to {}",
                    self.name,
                    input.len(),
                    folder(self.name).display()
                );
                resume_unwind(panic)
            }
        }
    }
}

fn keep(name: &str, input: &[u8]) -> String {
    let file = std::env::temp_dir().join(format!("culvert-fuzz-{name}-{:016x}", digest(input)));
    match fs::write(&file, input) {
        Ok(()) => file.display().to_string(),
        Err(error) => format!("({error}) {input:02x?}"),
    }
}

fn digest(bytes: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    hasher.finish()
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    }

    /// Below `end`, which may be 0 and then gives 0.
    fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }
}

fn mutate(pool: &[Vec<u8>], random: &mut Random) -> Vec<u8> {
    let mut input = pool[random.below(pool.len())].clone();
    for _ in 0..=random.below(4) {
        step(&mut input, pool, random);
    }
    input.truncate(LONGEST);
    input
}

/// One change, as a bug or an enemy would make it.
fn step(input: &mut Vec<u8>, pool: &[Vec<u8>], random: &mut Random) {
    let at = random.below(input.len());
    let length = 1 + random.below(8.min(input.len()));
    let end = (at + length).min(input.len());
    match random.below(9) {
        0 if at < input.len() => input[at] ^= 1 << random.below(8),
        1 if at < input.len() => input[at] = BYTES[random.below(BYTES.len())],
        2 if at < input.len() => input[at] = input[at].wrapping_add(random.next() as u8),
        3 => input.insert(at, BYTES[random.below(BYTES.len())]),
        4 => {
            input.drain(at..end);
        }
        5 => input.truncate(at),
        // Said twice, or many times.
        6 => {
            let part = input[at..end].to_vec();
            for _ in 0..=random.below(20) {
                input.splice(at..at, part.iter().copied());
            }
        }
        // The beginning of one and the end of another.
        7 => {
            let other = &pool[random.below(pool.len())];
            input.truncate(at);
            input.extend_from_slice(&other[random.below(other.len())..]);
        }
        _ => {
            let other = &pool[random.below(pool.len())];
            let from = random.below(other.len());
            let part = &other[from..(from + length).min(other.len())];
            input.splice(at..at, part.iter().copied());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fuzz_finds_what_a_corpus_is_a_few_steps_away_from() {
        let (mut random, pool) = (Random(1), vec![b"abc=1;def=2".to_vec()]);
        let found = (0..20_000).any(|_| {
            let input = mutate(&pool, &mut random);
            input.windows(2).any(|pair| pair == b"==") && input.contains(&0)
        });
        assert!(found);
        for _ in 0..20_000 {
            assert!(mutate(&[Vec::new()], &mut random).len() <= LONGEST);
        }
    }
}
