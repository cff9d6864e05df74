//! What a session asks its owner to do.

use super::Phase;
use crate::ack::FlushReport;
use crate::notice::Scope;
use crate::round::Resolution;

/// One thing to do.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Effect<T> {
    /// Tell the round that the token stands for. Each token comes once.
    Resolve {
        /// The token that [`Session::on_event`](super::Session::on_event) was given.
        token: T,
        /// What became of the target.
        how: Resolution,
    },
    /// A flush brought young or dirty bits back. Comes before the Resolve of the same ack: the source
    /// has them before it releases a page.
    Reported {
        /// The scope of the notice; the report's ranges are in its address space. After a FlushAll
        /// they may be in any address space of the session.
        scope: Scope,
        /// What the device said.
        report: FlushReport,
    },
    /// The phase changed. Comes before what follows from it.
    Phase {
        /// What it was.
        from: Phase,
        /// What it is.
        to: Phase,
    },
    /// End the stream, and tell the device why.
    EndStream(EndReason),
    /// Ask the device's fencer, if it has one, until it confirms or
    /// [`Session::wants_fencer`](super::Session::wants_fencer) says that there is no reason any more. Comes
    /// once while there is.
    AskFencer,
}

/// Why a session's stream is ended by the host agent.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum EndReason {
    /// An administrator evicted the session.
    Evicted,
    /// The session is fenced.
    Fenced,
}

/// The one sink of a session's outputs. The owner drains it after each input, in order; a dropped
/// effect is a round that never completes.
#[derive(Clone, PartialEq, Eq, Debug)]
#[must_use = "each effect must be carried out: a dropped one is a round that never completes"]
pub struct Effects<T>(Vec<Effect<T>>);

impl<T> Effects<T> {
    /// An empty sink. Keep one and drain it: its memory is used again.
    pub const fn new() -> Self {
        Self(Vec::new())
    }

    /// Takes out everything, in order.
    pub fn drain(&mut self) -> impl Iterator<Item = Effect<T>> + '_ {
        self.0.drain(..)
    }

    /// Whether there is nothing to do.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many things there are to do.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// What there is to do, left in place.
    pub fn iter(&self) -> impl Iterator<Item = &Effect<T>> {
        self.0.iter()
    }

    pub(super) fn push(&mut self, effect: Effect<T>) {
        self.0.push(effect);
    }

    pub(super) fn extend(&mut self, effects: impl IntoIterator<Item = Effect<T>>) {
        self.0.extend(effects);
    }
}

impl<T> Default for Effects<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T> IntoIterator for Effects<T> {
    type Item = Effect<T>;
    type IntoIter = std::vec::IntoIter<Effect<T>>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}
