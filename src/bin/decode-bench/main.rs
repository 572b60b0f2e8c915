//! decode-bench
fn main() {}
