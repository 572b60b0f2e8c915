//! Loads a model, feeds a prompt, shows tokens as they come and tells how long each took.
use decode_graph::checkpoint::{Checkpoint, SyntheticSpec};
use decode_graph::error::Result;
use decode_graph::session::{DecodeSession, SessionOptions};
use std::ops::ControlFlow;
use std::time::Instant;

fn main() -> Result<()> {
    let model = match std::env::args().nth(1) {
        Some(path) => Checkpoint::open(path.as_ref())?,
        None => Checkpoint::synthetic(&SyntheticSpec::parse("tiny")?)?,
    };
    let options = SessionOptions { capacity: 64, ..SessionOptions::default() };
    let mut session = DecodeSession::new(&model, &options, &mut |_, _| {})?;
    let mut last = Instant::now();
    session.decode(&[1, 2, 3], 16, &mut |chosen| {
        let ms = last.elapsed().as_secs_f64() * 1e3;
        println!("position {:>2}  token {:>6}  {ms:.3} ms", chosen.position, chosen.token);
        last = Instant::now();
        ControlFlow::Continue(())
    })?;
    Ok(())
}
