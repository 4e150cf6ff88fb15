//! Bytes that wait in this process, by whom they wait for.
//!
//! ```text
//! Buffers (the node's) ◀── Budget (a workload's) ◀── Account (a tunnel's) ◀── Charge (a chunk, a stall)
//! ```
//! Who may buffer how much follows from how much is free: a workload as much as the node has free, a tunnel
//! as much as its workload may still take. So the first may have half of everything, the next half of the
//! rest, and whoever comes new finds something, without anybody having counted how many there are (dynamic
//! thresholds: Choudhury and Hahne, IEEE/ACM Transactions on Networking, 1998).
//!
//! Invariant: every charge is given back when its bytes have left, by being dropped.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

/// What a tunnel may always buffer, so that its work goes on whatever others hold.
const FLOOR: usize = 64 * 1024;

/// What all workloads may buffer together.
#[derive(Debug)]
pub struct Buffers {
    limit: usize,
    used: AtomicUsize,
}

impl Buffers {
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self {
            limit,
            used: AtomicUsize::new(0),
        })
    }

    pub fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    fn free(&self) -> usize {
        self.limit.saturating_sub(self.used())
    }
}

/// What a workload buffers.
#[derive(Debug)]
pub struct Budget {
    all: Arc<Buffers>,
    used: AtomicUsize,
}

impl Budget {
    pub fn new(all: &Arc<Buffers>) -> Arc<Self> {
        Arc::new(Self {
            all: all.clone(),
            used: AtomicUsize::new(0),
        })
    }

    pub fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    /// What it may take beside what it has.
    fn free(&self) -> usize {
        self.all.free().saturating_sub(self.used())
    }
}

/// What a tunnel buffers.
#[derive(Debug)]
pub struct Account {
    budget: Arc<Budget>,
    used: AtomicUsize,
}

impl Account {
    pub(crate) fn new(budget: &Arc<Budget>) -> Arc<Self> {
        Arc::new(Self {
            budget: budget.clone(),
            used: AtomicUsize::new(0),
        })
    }

    /// Whether more may be buffered.
    pub fn has_room(&self) -> bool {
        self.used.load(Ordering::Relaxed) <= self.budget.free().max(FLOOR)
    }

    /// Whether one more stream may begin: those of the tunnel hold at most half of what it may buffer.
    pub fn may_begin(&self) -> bool {
        self.used.load(Ordering::Relaxed) <= (self.budget.free() / 2).max(FLOOR)
    }

    /// Whether there is so little room left that nothing more shall be promised.
    pub fn is_pressed(&self) -> bool {
        self.used.load(Ordering::Relaxed) > self.budget.free() / 2 || self.budget.used() > self.budget.free()
    }

    fn add(&self, bytes: usize) {
        self.used.fetch_add(bytes, Ordering::Relaxed);
        self.budget.used.fetch_add(bytes, Ordering::Relaxed);
        self.budget.all.used.fetch_add(bytes, Ordering::Relaxed);
    }

    fn sub(&self, bytes: usize) {
        self.used.fetch_sub(bytes, Ordering::Relaxed);
        self.budget.used.fetch_sub(bytes, Ordering::Relaxed);
        self.budget.all.used.fetch_sub(bytes, Ordering::Relaxed);
    }
}

/// Bytes that wait.
#[derive(Debug)]
pub(crate) struct Charge {
    account: Arc<Account>,
    bytes: usize,
}

impl Charge {
    pub fn new(account: &Arc<Account>, bytes: usize) -> Self {
        account.add(bytes);
        Self {
            account: account.clone(),
            bytes,
        }
    }

    /// Now it is so many.
    pub fn set(&mut self, bytes: usize) {
        self.account.add(bytes);
        self.account.sub(self.bytes);
        self.bytes = bytes;
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.account.sub(self.bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tr8_nobody_buffers_everything_and_the_next_finds_room() {
        let all = Buffers::new(1200 * FLOOR);
        let workloads = [Budget::new(&all), Budget::new(&all), Budget::new(&all)];
        let mut charges = vec![];
        let mut fill = |budget: &Arc<Budget>, tunnels: usize| {
            let before = budget.used();
            for _ in 0..tunnels {
                let tunnel = Account::new(budget);
                while tunnel.has_room() && charges.len() < 10_000 {
                    charges.push(Charge::new(&tunnel, FLOOR));
                }
            }
            (budget.used() - before) / FLOOR
        };
        // A tunnel has a third of everything at most, a workload half, beside what every tunnel may have.
        assert_eq!(fill(&workloads[0], 1), 401);
        assert!((100..=210).contains(&fill(&workloads[0], 10)));
        assert!(fill(&workloads[1], 1) >= 150);
        assert!(fill(&workloads[1], 10) >= 50);
        assert!(fill(&workloads[2], 1) >= 50);
        assert!(all.used() < 1200 * FLOOR);
        charges.clear();
        assert_eq!((all.used(), workloads[0].used()), (0, 0));
    }

    #[test]
    fn work_goes_on_when_all_is_taken() {
        let all = Buffers::new(0);
        let tunnel = Account::new(&Budget::new(&all));
        assert!(tunnel.has_room() && tunnel.may_begin() && !tunnel.is_pressed());
        let mut charge = Charge::new(&tunnel, FLOOR + 1);
        assert!(!tunnel.has_room() && !tunnel.may_begin() && tunnel.is_pressed());
        charge.set(FLOOR);
        assert!(tunnel.has_room() && tunnel.may_begin());
    }

    #[test]
    fn f30_a_tunnel_takes_no_new_stream_while_its_own_buffer_and_others_do() {
        let all = Buffers::new(100 * FLOOR);
        let budget = Budget::new(&all);
        let (slow, quick) = (Account::new(&budget), Account::new(&budget));
        let mut held = Charge::new(&slow, 20 * FLOOR);
        assert!(slow.may_begin(), "a fifth of what there is");
        held.set(30 * FLOOR);
        assert!(!slow.may_begin() && slow.has_room(), "what is open goes on");
        assert!(quick.may_begin(), "another tunnel of the same workload");
        drop(held);
        assert!(slow.may_begin());
    }
}
