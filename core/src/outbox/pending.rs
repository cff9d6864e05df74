//! What waits to be sent: ranges that are kept apart while they can be, one FlushAll when they cannot.
//!
//! ```text
//!                     push                       push: more than max_pending entries
//!             +-----------------+  pop    +--------------------------------------------+
//!             v                 |         |                                            v
//!         +--------------------------------------+                        +----------------------+
//!         | Ranges: entries, in the order of pop |                        | FlushAll: joins all  |
//!         +--------------------------------------+                        +----------------------+
//!                            ^                       pop                            |
//!                            +------------------------------------------------------+
//! ```
//!
//! # Order
//!
//! Entries lie in two lanes. In the *flush* lane, everything that takes something from the device:
//! such entries commute, since a flush is idempotent and asks nothing of the one before it. A merged
//! one therefore keeps the *earliest* place of those it merges. In the *end* lane, the RangeEnd hints,
//! which do not commute with flushes:
//!
//! * A RangeEnd never goes out before the invalidation of its bracket. Its place is after everything
//!   that was pushed before it, and a merged RangeEnd takes the *latest* place: a hint may be late.
//! * An invalidation that opens a bracket over pages of a pending RangeEnd takes these pages out of
//!   the RangeEnd: merged into an entry ahead of it, the device would take the new bracket for closed.
//!   Nothing is lost: the bracket over these pages is open again, and its own end follows. What is
//!   left of the RangeEnd stays.

use std::collections::BTreeMap;

use super::Pushed;
use crate::event::{Cause, Event, Method};
use crate::id::{AddressSpaceId, OwnerTag, Seq};
use crate::notice::{FlushReason, NoticeKind, Scope};
use crate::range::AddrRange;

/// A token and the range of its event: young and dirty bits are told to a token only where its own
/// range was used, however wide the notice that carries it became.
#[derive(Debug)]
pub(super) struct Waiter<T> {
    pub(super) token: T,
    pub(super) range: AddrRange,
}

/// A notice without its number.
#[derive(Debug)]
pub(super) struct Draft<T> {
    pub(super) kind: NoticeKind,
    pub(super) scope: Scope,
    pub(super) seq: Option<Seq>,
    pub(super) cause: Cause,
    pub(super) owner: Option<OwnerTag>,
    pub(super) flush_reason: Option<FlushReason>,
    pub(super) waiters: Vec<Waiter<T>>,
}

/// What waits to be sent; at most `max` entries.
#[derive(Debug)]
pub(super) struct Pending<T> {
    max: usize,
    state: State<T>,
}

#[derive(Debug)]
enum State<T> {
    Ranges(Ranges<T>),
    FlushAll(FlushAll<T>),
}

impl<T> Pending<T> {
    pub(super) fn new(max: usize) -> Self {
        Self { max, state: State::Ranges(Ranges::new()) }
    }

    pub(super) fn len(&self) -> usize {
        match &self.state {
            State::Ranges(ranges) => ranges.order.len(),
            State::FlushAll(_) => 1,
        }
    }

    pub(super) fn push(&mut self, event: &Event, token: Option<T>) -> Pushed {
        let ranges = match &mut self.state {
            State::FlushAll(all) => {
                all.join(event.cause, event.owner, waiters_of(event, token));
                return Pushed::Widened;
            }
            State::Ranges(ranges) => ranges,
        };
        let pushed = ranges.push(event, token);
        if ranges.order.len() <= self.max {
            return pushed;
        }
        let ranges = std::mem::replace(ranges, Ranges::new());
        self.state = State::FlushAll(ranges.into_flush_all());
        Pushed::Widened
    }

    /// The entry whose turn it is.
    pub(super) fn pop(&mut self) -> Option<Draft<T>> {
        match &mut self.state {
            State::Ranges(ranges) => ranges.pop(),
            State::FlushAll(_) => match std::mem::replace(&mut self.state, State::Ranges(Ranges::new())) {
                State::FlushAll(all) => Some(all.into_draft()),
                State::Ranges(_) => None,
            },
        }
    }
}

fn waiters_of<T>(event: &Event, token: Option<T>) -> Vec<Waiter<T>> {
    token.map(|token| Waiter { token, range: covered(event) }).into_iter().collect()
}

/// What an event covers: the end of an address space covers all of it, whatever its range says.
fn covered(event: &Event) -> AddrRange {
    match event.method {
        Method::Release => AddrRange::ALL,
        _ => event.range,
    }
}

/// Moves the shorter list behind the longer one, so that a chain of merges moves a waiter log(n) times.
fn join_waiters<T>(into: &mut Vec<Waiter<T>>, mut from: Vec<Waiter<T>>) {
    if from.len() > into.len() {
        std::mem::swap(into, &mut from);
    }
    into.append(&mut from);
}

fn join_owner(a: Option<OwnerTag>, b: Option<OwnerTag>) -> Option<OwnerTag> {
    if a == b { a } else { None }
}

/// The one entry that is left when there were too many. `kind` is always Invalidate: a Release among
/// the events would say of every address space that it is gone.
#[derive(Debug)]
struct FlushAll<T> {
    cause: Cause,
    owner: Option<OwnerTag>,
    waiters: Vec<Waiter<T>>,
}

impl<T> FlushAll<T> {
    fn join(&mut self, cause: Cause, owner: Option<OwnerTag>, waiters: Vec<Waiter<T>>) {
        self.cause = self.cause.max(cause);
        self.owner = join_owner(self.owner, owner);
        join_waiters(&mut self.waiters, waiters);
    }

    fn into_draft(self) -> Draft<T> {
        Draft {
            kind: NoticeKind::Invalidate,
            scope: Scope::FlushAll,
            seq: None,
            cause: self.cause,
            owner: self.owner,
            flush_reason: Some(FlushReason::OutboxFull),
            waiters: self.waiters,
        }
    }
}

/// An entry's place in the queue.
type Place = u64;
/// An address space and the first address of a range of it.
type Key = (AddressSpaceId, u64);
/// Entries of one lane. No two of them overlap.
type LaneMap<T> = BTreeMap<Key, Entry<T>>;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Lane {
    Flush,
    End,
}

/// An entry, its keys in both maps, and as much again for nodes that are half empty.
#[cfg(test)]
pub(super) const BYTES_AN_ENTRY: usize =
    2 * (size_of::<Key>() + size_of::<Entry<u64>>() + size_of::<Place>() + size_of::<(Lane, Key)>());

#[derive(Debug)]
struct Ranges<T> {
    flushes: LaneMap<T>,
    ends: LaneMap<T>,
    order: BTreeMap<Place, (Lane, Key)>,
    next_place: Place,
}

impl<T> Ranges<T> {
    fn new() -> Self {
        Self { flushes: BTreeMap::new(), ends: BTreeMap::new(), order: BTreeMap::new(), next_place: 0 }
    }

    fn push(&mut self, event: &Event, token: Option<T>) -> Pushed {
        let id = event.address_space;
        let mut entry = Entry {
            place: self.new_place(),
            range: covered(event),
            kind: kind_of(event.method),
            seq: event.seq,
            cause: event.cause,
            owner: event.owner,
            waiters: waiters_of(event, token),
        };
        let (lane, opens_bracket) = match event.method {
            Method::RangeEnd => (Lane::End, false),
            Method::ClearYoung | Method::ClearFlushYoung => (Lane::Flush, false),
            Method::Invalidate | Method::ChangePte(_) | Method::Release => (Lane::Flush, true),
        };
        if opens_bracket {
            self.reopen(id, &mut entry);
        }
        let pushed = self.merge_into(lane, id, &mut entry);
        self.insert(lane, id, entry);
        pushed
    }

    /// Takes the pages of `entry` out of the pending RangeEnds; see "Order" in the module's head.
    fn reopen(&mut self, id: AddressSpaceId, entry: &mut Entry<T>) {
        let open = entry.range;
        while let Some(key) = last_overlapping(&self.ends, id, open) {
            let Some(mut end) = self.remove(Lane::End, key) else { break };
            // Nobody waits for a hint; a token that was given all the same must not be lost.
            join_waiters(&mut entry.waiters, std::mem::take(&mut end.waiters));
            let closed = end.range;
            if let Some(below) = below(closed, open) {
                self.insert(Lane::End, id, end.hint(below, end.place));
            }
            if let Some(above) = above(closed, open) {
                let place = self.new_place();
                self.insert(Lane::End, id, end.hint(above, place));
            }
        }
    }

    /// Merges into `entry` every entry of its lane that overlaps it, and the one on each side that
    /// lies next to it where nothing precise is lost by that.
    fn merge_into(&mut self, lane: Lane, id: AddressSpaceId, entry: &mut Entry<T>) -> Pushed {
        let mut pushed = Pushed::Queued;
        while let Some(key) = last_overlapping(self.lane(lane), id, entry.range) {
            let Some(old) = self.remove(lane, key) else { break };
            entry.merge(old, lane);
            pushed = Pushed::Merged;
        }
        for key in beside(self.lane(lane), id, entry).into_iter().flatten() {
            let Some(old) = self.remove(lane, key) else { continue };
            entry.merge(old, lane);
            pushed = Pushed::Merged;
        }
        pushed
    }

    fn pop(&mut self) -> Option<Draft<T>> {
        let (_, &(lane, key)) = self.order.first_key_value()?;
        let entry = self.remove(lane, key)?;
        Some(Draft {
            kind: entry.kind,
            scope: Scope::Range(key.0, entry.range),
            seq: Some(entry.seq),
            cause: entry.cause,
            owner: entry.owner,
            flush_reason: None,
            waiters: entry.waiters,
        })
    }

    /// Every entry in one.
    fn into_flush_all(self) -> FlushAll<T> {
        let mut entries = self.flushes.into_values().chain(self.ends.into_values());
        let first =
            entries.next().expect("only more entries than max_pending, which is at least 1, are widened");
        let mut all = FlushAll { cause: first.cause, owner: first.owner, waiters: first.waiters };
        for entry in entries {
            all.join(entry.cause, entry.owner, entry.waiters);
        }
        all
    }

    fn new_place(&mut self) -> Place {
        self.next_place += 1;
        self.next_place
    }

    fn lane(&self, lane: Lane) -> &LaneMap<T> {
        match lane {
            Lane::Flush => &self.flushes,
            Lane::End => &self.ends,
        }
    }

    fn lane_mut(&mut self, lane: Lane) -> &mut LaneMap<T> {
        match lane {
            Lane::Flush => &mut self.flushes,
            Lane::End => &mut self.ends,
        }
    }

    fn insert(&mut self, lane: Lane, id: AddressSpaceId, entry: Entry<T>) {
        let key = (id, entry.range.start());
        self.order.insert(entry.place, (lane, key));
        self.lane_mut(lane).insert(key, entry);
    }

    fn remove(&mut self, lane: Lane, key: Key) -> Option<Entry<T>> {
        let entry = self.lane_mut(lane).remove(&key)?;
        self.order.remove(&entry.place);
        Some(entry)
    }
}

/// One notice to be, of one address space.
#[derive(Debug)]
struct Entry<T> {
    place: Place,
    range: AddrRange,
    kind: NoticeKind,
    seq: Seq,
    cause: Cause,
    owner: Option<OwnerTag>,
    waiters: Vec<Waiter<T>>,
}

impl<T> Entry<T> {
    /// MergeIsUnion.
    fn merge(&mut self, other: Self, lane: Lane) {
        self.place = match lane {
            Lane::Flush => self.place.min(other.place),
            Lane::End => self.place.max(other.place),
        };
        self.range = self.range.hull(other.range);
        self.kind = merge_kinds(self.kind, other.kind);
        self.seq = self.seq.max(other.seq);
        self.cause = self.cause.max(other.cause);
        self.owner = join_owner(self.owner, other.owner);
        join_waiters(&mut self.waiters, other.waiters);
    }

    fn asks_the_same(&self, other: &Self) -> bool {
        (self.kind, self.cause, self.owner) == (other.kind, other.cause, other.owner)
    }

    /// The part `range` of this RangeEnd.
    fn hint(&self, range: AddrRange, place: Place) -> Self {
        Self { place, range, waiters: Vec::new(), ..*self }
    }
}

fn kind_of(method: Method) -> NoticeKind {
    match method {
        Method::Invalidate => NoticeKind::Invalidate,
        Method::ChangePte(translation) => NoticeKind::ChangePte(translation),
        Method::ClearFlushYoung => NoticeKind::ClearFlushYoung,
        Method::ClearYoung => NoticeKind::ClearYoung,
        Method::Release => NoticeKind::Release,
        Method::RangeEnd => NoticeKind::RangeEnd,
    }
}

/// The kind that does what both ask for. Every report of a flush carries the young bits of what it
/// flushed, so that Invalidate does all that ClearYoung and ClearFlushYoung ask for; a translation of
/// one page says nothing about the other pages, so that ChangePte becomes Invalidate.
fn merge_kinds(a: NoticeKind, b: NoticeKind) -> NoticeKind {
    use NoticeKind::{ChangePte, ClearFlushYoung, ClearYoung, Invalidate, RangeEnd, Release};
    match (a, b) {
        (Release, _) | (_, Release) => Release,
        (Invalidate | ChangePte(_), _) | (_, Invalidate | ChangePte(_)) => Invalidate,
        (ClearFlushYoung, _) | (_, ClearFlushYoung) => ClearFlushYoung,
        (ClearYoung, _) | (_, ClearYoung) => ClearYoung,
        (RangeEnd, RangeEnd) => RangeEnd,
    }
}

/// The highest entry that overlaps `range`. Entries do not overlap each other, so if the last one that
/// starts at or below the range's last address does not reach into it, none does.
fn last_overlapping<T>(lane: &LaneMap<T>, id: AddressSpaceId, range: AddrRange) -> Option<Key> {
    let (key, entry) = lane.range((id, 0)..=(id, range.last())).next_back()?;
    entry.range.overlaps(range).then_some(*key)
}

/// The entries directly below and above `entry` that may become one with it: only those that ask for
/// the same thing. A neighbour that is kept apart costs an entry; a flush where none was asked for, or
/// an owner that is forgotten, costs the device its translations. ChangePte translates one page, so it
/// never grows.
fn beside<T>(lane: &LaneMap<T>, id: AddressSpaceId, entry: &Entry<T>) -> [Option<Key>; 2] {
    if matches!(entry.kind, NoticeKind::ChangePte(_)) {
        return [None, None];
    }
    let joins = |(key, other): (&Key, &Entry<T>)| {
        (other.asks_the_same(entry) && other.range.touches(entry.range)).then_some(*key)
    };
    let start = entry.range.start();
    let below = lane.range((id, 0)..(id, start)).next_back().and_then(joins);
    let above =
        entry.range.last().checked_add(1).and_then(|next| lane.get_key_value(&(id, next))).and_then(joins);
    [below, above]
}

/// The part of `closed` below `open`.
fn below(closed: AddrRange, open: AddrRange) -> Option<AddrRange> {
    (closed.start() < open.start()).then(|| {
        AddrRange::new(closed.start(), open.start()).expect("it starts below its end, which is not 0")
    })
}

/// The part of `closed` above `open`.
fn above(closed: AddrRange, open: AddrRange) -> Option<AddrRange> {
    (open.last() < closed.last()).then(|| {
        AddrRange::new(open.last() + 1, closed.wire_end()).expect("an address above the open ones is left")
    })
}
