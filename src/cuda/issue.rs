//! The one loop that puts a bound plan on a stream: run at once when eager, recorded when the
//! stream is capturing. The only kernel launches of the crate outside the driver layer.

#![allow(unsafe_code)]

use super::bind::BoundPlan;
use super::driver::{Attributes, Function, MAX_ARGS, Stream, launch};
use crate::error::{Error, Result};

/// A launch with its addresses resolved: nothing is looked up when it is issued.
#[derive(Clone, Debug)]
pub(crate) struct BoundStep {
    pub(super) function: Function,
    pub(super) grid: u32,
    pub(super) block: u32,
    pub(super) cluster: u32,
    pub(super) shared_bytes: u32,
    /// May start before its predecessor in the same graph has ended.
    pub(super) programmatic: bool,
    /// All its blocks run at the same time.
    pub(super) cooperative: bool,
    /// One slot a parameter.
    pub(super) args: Vec<u64>,
}

impl BoundStep {
    fn attributes(&self, first: bool) -> Attributes {
        Attributes {
            // The first step of a token follows the last one of the token before, which changes
            // the step state: it waits for its end.
            programmatic: self.programmatic && !first,
            cluster: (self.cluster > 1).then_some([self.cluster, 1, 1]),
            cooperative: self.cooperative,
        }
    }
}

/// Puts every step of `plan` on `stream`; `after` gets the index of each step that was queued.
/// Without `after`, a plan that has a program is put there as one launch.
///
/// The caller keeps `plan` until the stream has done the work or, when it is recorded, as long as
/// the graph or an executable of it exists.
///
/// # Errors
///
/// [`Error::Driver`] with the step's label; the error of `after`.
pub(super) fn issue(
    plan: &BoundPlan,
    stream: &Stream,
    after: Option<&mut dyn FnMut(usize) -> Result<()>>,
) -> Result<()> {
    if let (Some((_, token)), None) = (plan.token(), &after) {
        return queue(stream, token, true).map_err(|e| e.at("token"));
    }
    let mut after = after;
    for (i, step) in plan.bound().iter().enumerate() {
        queue(stream, step, i == 0).map_err(|e| e.at(plan.label(i)))?;
        if let Some(after) = &mut after {
            after(i)?;
        }
    }
    Ok(())
}

fn queue(stream: &Stream, step: &BoundStep, first: bool) -> Result<()> {
    let mut slots = [0u64; MAX_ARGS];
    let args = slots
        .get_mut(..step.args.len())
        .ok_or_else(|| Error::Internal(format!("{} parameters", step.args.len())))?;
    args.copy_from_slice(&step.args);
    // SAFETY: a `BoundStep` is made only where its arguments were compared with the entry's
    // parameter list, by number and width, and its addresses taken from memory that the maker
    // owns and keeps until the stream is done (`BoundPlan`, `ceiling`, `fill`).
    unsafe {
        launch(
            stream,
            &step.function,
            [step.grid, 1, 1],
            [step.block, 1, 1],
            step.shared_bytes,
            args,
            step.attributes(first),
        )
    }
}

/// Puts one step on `stream`, under the same conditions as [`issue`]: behind a full edge unless it
/// is programmatic itself.
///
/// # Errors
///
/// [`Error::Driver`].
pub(super) fn issue_one(step: &BoundStep, stream: &Stream) -> Result<()> {
    queue(stream, step, false)
}
