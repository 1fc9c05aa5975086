//! Stub.
use crate::results::{CellRecord, Plan};
/// Stub.
pub struct BestRate { /// m
 pub method: String, /// r
 pub rate: f64 }
/// Stub.
pub fn best_rates(_plan: &Plan, _records: &[CellRecord]) -> Vec<BestRate> { Vec::new() }
