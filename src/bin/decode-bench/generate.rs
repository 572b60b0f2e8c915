//! `generate`: a prompt's continuation, as text while it comes or as one JSON object.

use crate::args::GenerateArgs;
use crate::environment::Environment;
use crate::output::print;
use crate::stop::StopStrings;
use crate::top::top;
use crate::{Outcome, interrupt, load};
use decode_graph::checkpoint::Checkpoint;
use decode_graph::error::{Error, Result};
use decode_graph::ops::Sampling;
use decode_graph::session::{DebugLevel, DecodeSession, Finish, Look, StepFilter};
use decode_graph::tokenizer::{Message, StreamDecoder, Tokenizer};
use decode_graph::verify::logsumexp;
use serde_json::{Value, json};
use std::ops::ControlFlow;
use std::time::{SystemTime, UNIX_EPOCH};

pub(crate) fn run(args: &GenerateArgs, environment: &Environment) -> Result<Outcome> {
    let sampling = sampling(args)?;
    let checkpoint = load::required(&args.model)?;
    let (tokenizer, prompt) = prompt(args, &checkpoint)?;
    let capacity = match args.capacity {
        Some(capacity) => capacity,
        None => capacity(&checkpoint, prompt.len(), args.n_gen)?,
    };
    let look = args
        .debug_steps
        .as_deref()
        .map(|labels| Look { steps: StepFilter::parse(labels), dump: args.dump.clone() });
    let debug =
        if look.is_some() { environment.debug.max(DebugLevel::Print) } else { environment.debug };
    let environment = &Environment { debug, ..*environment };
    let (checkpoint, mut session) =
        load::sampling_session(Some(checkpoint), &args.engine, capacity, sampling, environment)?;
    if let Some(look) = look {
        if !session.plan().steps.iter().any(|step| look.steps.selects(&step.label)) {
            let labels = args.debug_steps.as_deref().unwrap_or_default();
            let what = format!("--debug-steps {labels}: no step of that name; `graph` lists them");
            return Err(Error::Usage(what));
        }
        session.look(look);
    }
    let vocab = session.plan().vocab;
    if let Some(id) = prompt.iter().find(|id| **id >= vocab) {
        return Err(Error::Usage(format!("token {id} is outside the vocabulary of {vocab}")));
    }

    interrupt::watch();
    let mut text = Continuation::new(args, tokenizer.as_ref());
    let finish = match args.top {
        None => in_one_run(&mut session, &prompt, &mut text)?,
        Some(n) => by_logits(&mut session, &prompt, n, &mut text)?,
    };
    text.end()?;
    let finish_reason = text.reason(finish);
    if args.output.is_some() {
        let mut result = json!({
            "model": checkpoint.path().display().to_string(),
            "backend": session.backend(),
            "mode": session.mode(),
            "prompt_ids": prompt,
            "ids": text.ids,
            "text": text.text,
            "finish_reason": finish_reason,
        });
        if args.top.is_some() {
            result["steps"] = Value::Array(text.steps);
        }
        print(&format!("{result}\n"))?;
    }
    Ok(if interrupt::requested() { Outcome::Interrupted } else { Outcome::Done })
}

/// What the flags ask for; `None` for the most probable token.
fn sampling(args: &GenerateArgs) -> Result<Option<Sampling>> {
    if args.temp == 0.0 {
        return Ok(None);
    }
    let GenerateArgs { temp: temperature, top_k, top_p, min_p, seed, .. } = *args;
    Sampling { temperature, top_k, top_p, min_p, seed }.checked().map(Some)
}

/// Ids of the prompt, and the tokenizer: ids can do without one.
fn prompt(args: &GenerateArgs, checkpoint: &Checkpoint) -> Result<(Option<Tokenizer>, Vec<u32>)> {
    let (tokenizer, ids) = match (&args.prompt_ids, &args.prompt) {
        (Some(ids), _) => (Tokenizer::of(checkpoint).ok(), ids.clone()),
        (None, prompt) => {
            let prompt = prompt.as_deref().unwrap_or_default();
            let tokenizer = match Tokenizer::of(checkpoint) {
                Err(_) if args.model.synthetic.is_some() => {
                    let what = "synthetic weights understand no text: give --prompt-ids 1,2,3";
                    return Err(Error::Usage(what.to_owned()));
                }
                tokenizer => tokenizer?,
            };
            let ids = if args.chat {
                let system = args.system.iter().map(|text| Message::new("system", text));
                let turns: Vec<_> = system.chain([Message::new("user", prompt)]).collect();
                let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
                tokenizer.encode_chat(&turns, now)?
            } else {
                tokenizer.encode(prompt, true)?
            };
            (Some(tokenizer), ids)
        }
    };
    if ids.is_empty() {
        return Err(Error::Usage("the prompt has no tokens".to_owned()));
    }
    Ok((tokenizer, ids))
}

/// Positions for the prompt and all that is generated, within what the model was trained for.
fn capacity(checkpoint: &Checkpoint, prompt: usize, n_gen: u32) -> Result<u32> {
    let prompt = u32::try_from(prompt)
        .map_err(|_| Error::Usage("the prompt has too many tokens".to_owned()))?;
    let key = format!("{}.context_length", checkpoint.architecture()?);
    let trained = checkpoint.u64_key(&key)?.and_then(|n| u32::try_from(n).ok());
    let most = trained.unwrap_or(u32::MAX).max(prompt.saturating_add(1));
    Ok(prompt.saturating_add(n_gen).min(most))
}

/// The loop that is benchmarked: the device chooses, the host looks on.
fn in_one_run(
    session: &mut DecodeSession,
    prompt: &[u32],
    text: &mut Continuation<'_>,
) -> Result<Finish> {
    let last_input = session.position() + prompt.len() as u32 - 1;
    let mut failure = None;
    let finish = session.decode(prompt, text.args.n_gen, &mut |chosen| {
        if interrupt::requested() {
            return ControlFlow::Break(());
        }
        if chosen.position < last_input {
            return ControlFlow::Continue(());
        }
        text.push(chosen.token).unwrap_or_else(|e| {
            failure = Some(e);
            ControlFlow::Break(())
        })
    })?;
    failure.map_or(Ok(finish), Err)
}

/// Step by step, with the `n` largest logits of each.
fn by_logits(
    session: &mut DecodeSession,
    prompt: &[u32],
    n: usize,
    text: &mut Continuation<'_>,
) -> Result<Finish> {
    let mut inputs = prompt.iter().copied();
    let mut next = inputs.next();
    let mut generated = 0;
    while let Some(token) = next {
        if session.position() >= session.capacity() {
            return Ok(Finish::Capacity);
        }
        let id = session.feed(token)?;
        if interrupt::requested() {
            return Ok(Finish::Stopped);
        }
        next = inputs.next();
        if next.is_some() {
            continue;
        }
        text.look(id, n, &session.logits()?);
        generated += 1;
        if text.push(id)?.is_break() {
            return Ok(Finish::Stopped);
        }
        next = (generated < text.args.n_gen).then_some(id);
    }
    Ok(Finish::Done)
}

/// What was generated so far.
struct Continuation<'a> {
    args: &'a GenerateArgs,
    tokenizer: Option<&'a Tokenizer>,
    stream: Option<StreamDecoder<'a>>,
    stop: StopStrings,
    ids: Vec<u32>,
    text: String,
    steps: Vec<Value>,
    /// By the token that ends a text.
    ended: bool,
    /// By a stop string.
    stopped: bool,
}

impl<'a> Continuation<'a> {
    fn new(args: &'a GenerateArgs, tokenizer: Option<&'a Tokenizer>) -> Self {
        let stream = tokenizer.map(Tokenizer::stream);
        let stop = StopStrings::new(&args.stop);
        let (ids, text, steps) = Default::default();
        Self { args, tokenizer, stream, stop, ids, text, steps, ended: false, stopped: false }
    }

    /// Takes a token; the one that ends the text is not part of it.
    fn push(&mut self, id: u32) -> Result<ControlFlow<()>> {
        let ends = |t: &Tokenizer| t.is_end_of_generation(id);
        if !self.args.ignore_eos && self.tokenizer.is_some_and(ends) {
            self.ended = true;
            return Ok(ControlFlow::Break(()));
        }
        let gap = if self.ids.is_empty() { "" } else { " " };
        self.ids.push(id);
        let piece = match &mut self.stream {
            Some(stream) => stream.push(id),
            None if self.args.output.is_none() => format!("{gap}{id}"),
            None => String::new(),
        };
        let (shown, stopped) = self.stop.push(&piece);
        self.emit(&shown)?;
        self.stopped = stopped;
        Ok(if stopped { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
    }

    /// Keeps what `--top` asks of a step.
    fn look(&mut self, id: u32, n: usize, logits: &[f32]) {
        let top: Vec<Value> = top(logits, n).iter().map(|(id, x)| json!([id, x])).collect();
        self.steps.push(json!({"id": id, "top": top, "logsumexp": logsumexp(logits)}));
    }

    fn emit(&mut self, piece: &str) -> Result<()> {
        self.text.push_str(piece);
        if self.args.output.is_none() && !piece.is_empty() { print(piece) } else { Ok(()) }
    }

    /// The last bytes, and the end of the line.
    fn end(&mut self) -> Result<()> {
        if let Some(stream) = self.stream.take().filter(|_| !self.stopped) {
            let (shown, stopped) = self.stop.push(&stream.finish());
            self.emit(&shown)?;
            self.stopped = stopped;
        }
        let held = self.stop.finish();
        self.emit(&held)?;
        if self.args.output.is_none() { print("\n") } else { Ok(()) }
    }

    fn reason(&self, finish: Finish) -> &'static str {
        match finish {
            _ if self.ended || self.stopped => "stop",
            _ if interrupt::requested() => "interrupted",
            Finish::Capacity => "capacity",
            Finish::Done | Finish::Stopped => "length",
        }
    }
}
