use std::collections::HashMap;

use crate::split::words;

/// How often each word was met.
#[derive(Default)]
pub struct Counter {
    seen: HashMap<String, usize>,
}

impl Counter {
    pub fn add(&mut self, text: &str) -> usize {
        let mut added = 0;
        for word in words(text) {
            *self.seen.entry(word.to_string()).or_insert(0) += 1;
            added += 1;
        }
        added
    }

    pub fn get(&self, word: &str) -> usize {
        match self.seen.get(word) {
            Some(count) => *count,
            None => 0,
        }
    }
}
