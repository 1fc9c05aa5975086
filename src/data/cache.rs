//! Resized pictures in memory, up to a bound; beyond it they are made again each time.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use crate::Result;

/// Bytes of all pictures that are kept.
const MAX_BYTES: usize = 1 << 30;

/// What was made of each picture, by its index and resolution.
#[derive(Debug)]
pub(super) struct Cache<T>(Mutex<CacheEntry<T>>);

#[derive(Debug)]
struct CacheEntry<T> {
    values: HashMap<(usize, u32), Arc<T>>,
    bytes: usize,
}

impl<T> Default for Cache<T> {
    fn default() -> Self {
        Self(Mutex::new(CacheEntry { values: HashMap::new(), bytes: 0 }))
    }
}

impl<T> Cache<T> {
    /// What is kept under `key`, or what `make` makes, which has so many bytes.
    pub(super) fn get(&self, key: (usize, u32), make: impl FnOnce() -> Result<(T, usize)>) -> Result<Arc<T>> {
        let kept = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = kept().values.get(&key) {
            return Ok(Arc::clone(known));
        }
        // Not under the lock: other threads make theirs meanwhile.
        let (value, bytes) = make()?;
        let value = Arc::new(value);
        let mut kept = kept();
        if kept.bytes + bytes <= MAX_BYTES && kept.values.insert(key, Arc::clone(&value)).is_none() {
            kept.bytes += bytes;
        }
        Ok(value)
    }
}
