//! How much the host agent has to do at once, as its only caller knows it: whether a call may have waited for room.
//!
//! The bound of a round is counted from when its notices were sent, and the host agent's measure of it from the call:
//! in between a call may have waited, for as long as its deadline, for a place or for room in the quarantine.

use parking_lot::Mutex;

use crate::chaos::plan::Limits;

/// Calls that have no outcome yet. Those that the host agent has in hand are among them: it has done with a round
/// before its caller hears of it.
#[derive(Debug)]
pub(super) struct Room {
    limits: Option<Limits>,
    taken: Mutex<Taken>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Taken {
    calls: usize,
    pages: usize,
}

/// A call until its outcome; dropped, it has left.
#[derive(Debug)]
pub(super) struct Place<'a> {
    room: &'a Room,
    pages: usize,
}

impl Room {
    pub(super) fn new(limits: Option<Limits>) -> Self {
        Self { limits, taken: Mutex::default() }
    }

    pub(super) fn enter(&self, pages: usize) -> Place<'_> {
        let mut taken = self.taken.lock();
        taken.calls += 1;
        taken.pages += pages;
        Place { room: self, pages }
    }
}

impl Place<'_> {
    /// Whether the others that are there may be all that the host agent has room for.
    pub(super) fn may_have_to_wait(&self) -> bool {
        let Some(limits) = self.room.limits else { return false };
        let taken = *self.room.taken.lock();
        taken.calls > limits.rounds || taken.pages - self.pages >= limits.pages
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut taken = self.room.taken.lock();
        taken.calls -= 1;
        taken.pages -= self.pages;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_may_have_to_wait_where_the_others_fill_the_host_agent() {
        let room = Room::new(Some(Limits { rounds: 2, pages: 8 }));
        let first = room.enter(4);
        let second = room.enter(4);
        assert!(!first.may_have_to_wait() && !second.may_have_to_wait(), "each has a place");
        let third = room.enter(1);
        assert!(third.may_have_to_wait() && first.may_have_to_wait(), "one of them has none");
        drop(second);
        assert!(!first.may_have_to_wait() && !third.may_have_to_wait());
        drop(first);
        let many = room.enter(8);
        assert!(third.may_have_to_wait(), "the quarantine may be full of the other's pages");
        assert!(!many.may_have_to_wait(), "its own are not there before it");
        drop((third, many));
        assert_eq!(*room.taken.lock(), Taken::default());
    }

    #[test]
    fn nobody_waits_for_room_where_there_is_more_than_there_can_be_calls() {
        let room = Room::new(None);
        let places: Vec<Place<'_>> = (0..100).map(|_| room.enter(4)).collect();
        assert!(!places[0].may_have_to_wait());
    }
}
