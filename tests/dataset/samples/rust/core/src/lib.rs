//! Counts words.
pub mod count;
mod split;

pub use crate::count::Counter;
