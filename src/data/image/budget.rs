//! Memory that threads share while they read pictures: who would take more than is left waits.

use std::sync::{Condvar, Mutex, PoisonError};

/// A number of bytes of which each reader takes its part.
#[derive(Debug)]
pub(super) struct MemoryBudget {
    total: u64,
    free: Mutex<u64>,
    freed: Condvar,
}

/// A part of a [`MemoryBudget`], given back when dropped.
#[derive(Debug)]
pub(super) struct MemoryShare {
    of: &'static MemoryBudget,
    bytes: u64,
}

impl MemoryBudget {
    pub(super) const fn new(total: u64) -> Self {
        Self { total, free: Mutex::new(total), freed: Condvar::new() }
    }

    /// Waits until so many bytes are free and takes them; for more than there are in all, until nobody else has any.
    ///
    /// Whoever holds a part must take no other of the same budget, or two may wait for each other.
    pub(super) fn take(&'static self, bytes: u64) -> MemoryShare {
        let bytes = bytes.min(self.total);
        let free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let too_few = |free: &mut u64| *free < bytes;
        let mut free = self.freed.wait_while(free, too_few).unwrap_or_else(PoisonError::into_inner);
        *free -= bytes;
        MemoryShare { of: self, bytes }
    }
}

impl Drop for MemoryShare {
    fn drop(&mut self) {
        *self.of.free.lock().unwrap_or_else(PoisonError::into_inner) += self.bytes;
        self.of.freed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};

    #[test]
    fn threads_together_never_hold_more_than_there_is_and_all_come_to_their_turn() {
        static BUDGET: MemoryBudget = MemoryBudget::new(100);
        let (held, most, turns) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
        std::thread::scope(|scope| {
            for bytes in [30, 40, 60, 100, 1000, 1] {
                let (held, most, turns) = (&held, &most, &turns);
                scope.spawn(move || {
                    for _ in 0..200 {
                        let part = BUDGET.take(bytes);
                        let now = held.fetch_add(bytes.min(100), Ordering::SeqCst) + bytes.min(100);
                        most.fetch_max(now, Ordering::SeqCst);
                        std::thread::yield_now();
                        held.fetch_sub(bytes.min(100), Ordering::SeqCst);
                        turns.fetch_add(1, Ordering::SeqCst);
                        drop(part);
                    }
                });
            }
        });
        assert_eq!(turns.into_inner(), 6 * 200);
        let most = most.into_inner();
        assert!((60..=100).contains(&most), "{most}");
        assert_eq!(*BUDGET.free.lock().unwrap(), 100);
    }
}
