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

/// Registrations by their ids.
#[derive(Debug, Default)]
pub(crate) struct Registrations {
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    by_call: HashMap<CallId, (ToRegister, AddressSpaceId)>,
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
        register: impl FnOnce(&ToRegister) -> Result<AddressSpaceId, NotifyError>,
    ) -> Result<Result<AddressSpaceId, NotifyError>, IdReused> {
        let mut table = self.table.lock();
        match table.by_call.get(&call) {
            Some((known, id)) if *known == asked => return Ok(Ok(*id)),
            Some(_) => return Err(IdReused),
            None => {}
        }
        let registered = register(&asked);
        if let Ok(id) = registered {
            table.keep(call, asked, id);
        }
        Ok(registered)
    }

    /// By which call an address space was registered.
    pub(crate) fn of(&self, address_space: AddressSpaceId) -> Option<(CallId, ToRegister)> {
        let table = self.table.lock();
        let (call, (asked, _)) = table.by_call.iter().find(|(_, (_, id))| *id == address_space)?;
        Some((call.clone(), asked.clone()))
    }

    /// A registration of the run before.
    pub(crate) fn restore(&self, call: CallId, asked: ToRegister, address_space: AddressSpaceId) {
        self.table.lock().keep(call, asked, address_space);
    }
}

impl Table {
    fn keep(&mut self, call: CallId, asked: ToRegister, id: AddressSpaceId) {
        self.by_call.insert(call.clone(), (asked, id));
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
}
