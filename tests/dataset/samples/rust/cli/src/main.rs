use std::io::{self, Read};

use word_core::count::Counter;

fn main() -> io::Result<()> {
    let mut text = String::new();
    io::stdin().read_to_string(&mut text)?;
    let mut counter = Counter::default();
    println!("{}", counter.add(&text));
    Ok(())
}
