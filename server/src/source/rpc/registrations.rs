//! Registrations that are tried again: who does not know whether its address space was made asks by the same
//! id, and is told its name instead of being given another.

use std::collections::{HashMap, VecDeque};

use parking_lot::Mutex;
use shootdown_core::AddressSpaceId;
use shootdown_proto::message::CallId;

use super::retries::IdReused;
use crate::source::{NotifyError, Strictness};

/// Registrations whose outcome is remembered, of one host agent.
const MOST_KEPT: usize = 1024;

/// What is asked for. Two that are equal are the same request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ToRegister {
    pub(crate) name: String,
    pub(crate) strictness: Strictness,
    /// The name of an earlier run that is to be taken back.
    pub(crate) taken_back: Option<AddressSpaceId>,
}

/// A refusal is one for want of room: who is told so goes on without an address space, and no late try makes one.
type Outcome = Result<AddressSpaceId, NotifyError>;

/// A call, what it asked for, and what became of it.
pub(crate) type Registered = (CallId, ToRegister, Outcome);

/// Registrations by their ids.
#[derive(Debug, Default)]
pub(crate) struct Registrations {
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    by_call: HashMap<CallId, (ToRegister, Outcome)>,
    /// The oldest first.
    kept: VecDeque<CallId>,
}

impl Registrations {
    /// Registers, unless an earlier try has. `register` never waits, so it is called under the lock: a
    /// repetition that runs beside it finds it done.
    pub(crate) fn once(
        &self,
        call: CallId,
        asked: ToRegister,
        register: impl FnOnce(&ToRegister) -> Outcome,
    ) -> Result<Outcome, IdReused> {
        let mut table = self.table.lock();
        match table.by_call.get(&call) {
            Some((known, outcome)) if *known == asked => return Ok(outcome.clone()),
            Some(_) => return Err(IdReused),
            None => {}
        }
        let outcome = register(&asked);
        if outcome.as_ref().map_or_else(NotifyError::is_for_want_of_room, |_| true) {
            table.keep(call, asked, outcome.clone());
        }
        Ok(outcome)
    }

    /// Those that may be tried again in the next run, the oldest first. Not of an address space that is left out: the
    /// next run does not know it.
    pub(crate) fn to_try_again(&self, is_left_out: impl Fn(AddressSpaceId) -> bool) -> Vec<Registered> {
        let table = self.table.lock();
        let registered = |call: &CallId| {
            let (asked, outcome) = table.by_call.get(call)?;
            let is_left_out = outcome.as_ref().is_ok_and(|id| is_left_out(*id));
            (!is_left_out).then(|| (call.clone(), asked.clone(), outcome.clone()))
        };
        table.kept.iter().filter_map(registered).collect()
    }

    /// A registration of the run before.
    pub(crate) fn restore(&self, (call, asked, outcome): Registered) {
        self.table.lock().keep(call, asked, outcome);
    }
}

impl Table {
    fn keep(&mut self, call: CallId, asked: ToRegister, outcome: Outcome) {
        self.by_call.insert(call.clone(), (asked, outcome));
        self.kept.push_back(call);
        if self.kept.len() > MOST_KEPT
            && let Some(oldest) = self.kept.pop_front()
        {
            self.by_call.remove(&oldest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_registrations_are_forgotten_first_and_their_number_is_bounded() {
        let registrations = Registrations::default();
        let asked = ToRegister { name: String::new(), strictness: Strictness::Strict, taken_back: None };
        let register = |call: usize| {
            let id = shootdown_proto::convert::call_id(&call.to_string()).unwrap().unwrap();
            let mut made = false;
            let name = registrations.once(id, asked.clone(), |_| {
                made = true;
                Ok(AddressSpaceId::FIRST)
            });
            name.unwrap().unwrap();
            made
        };
        assert!((0..=MOST_KEPT).all(register), "each is new");
        assert!(!register(MOST_KEPT) && !register(1), "these are known");
        assert!(register(0), "the oldest is not");
        assert_eq!(registrations.table.lock().by_call.len(), MOST_KEPT);
    }

    #[test]
    fn a_registration_that_was_refused_for_want_of_room_is_refused_to_each_try_of_it() {
        let registrations = Registrations::default();
        let asked = ToRegister { name: String::new(), strictness: Strictness::Strict, taken_back: None };
        let by = |id, outcome: Outcome| {
            let id = shootdown_proto::convert::call_id(id).unwrap().unwrap();
            registrations.once(id, asked.clone(), |_| outcome).unwrap()
        };
        let full = NotifyError::TooManyAddressSpaces { most: 1 };
        assert_eq!(by("a", Err(full.clone())), Err(full.clone()));
        assert_eq!(by("a", Ok(AddressSpaceId::FIRST)), Err(full), "there is room now, and nobody asks");
        assert_eq!(by("b", Err(NotifyError::Stopping)), Err(NotifyError::Stopping));
        assert_eq!(by("b", Ok(AddressSpaceId::FIRST)), Ok(AddressSpaceId::FIRST));
    }
}
