//! What a journal is made of, in bytes: a header, then frames.
//!
//! ```text
//!   header  "SHOOTJNL" | version u32 | generation u64 | crc32c u32
//!   frame   FF "FR" FF | length u32 | number u64 | crc32c u32 | records (protobuf), `length` bytes
//! ```
//!
//! All numbers are little-endian. A frame's checksum covers its length, its number, its records and the
//! file's generation, so that no byte of another file, or of an earlier place, passes for a frame. A frame
//! is written at once and synced before the next, so a crash damages the last one at most: what does not
//! check and has nothing valid behind it is a torn tail, and anything else is a damage that no crash makes.

use std::time::Duration;

use prost::Message as _;
use shootdown_core::lease::LeaseTerms;
use shootdown_core::session::Enforcement;
use shootdown_core::{DeviceId, Epoch, Incarnation, Moment, SessionId};

use super::drained::Drained;

/// The device of a session whose record is torn.
pub(super) const UNNAMED: &str = "unnamed:torn-journal";

/// Whether that is its name. No device may call itself so: it would never have a fencer after a restart.
pub(crate) fn is_unnamed(device: &DeviceId) -> bool {
    device.as_str() == UNNAMED
}

const FILE_MAGIC: &[u8; 8] = b"SHOOTJNL";
/// No text holds it: a name that somebody chose, in a frame that is torn, is never taken for a frame behind it.
const FRAME_MAGIC: &[u8; 4] = b"\xffFR\xff";

/// Of the format: a reader of another version refuses the file.
pub(super) const VERSION: u32 = 1;

pub(super) const HEADER_BYTES: usize = 24;
const FRAME_HEADER_BYTES: usize = 20;

/// A session that may hold a lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SessionRecord {
    pub(crate) id: SessionId,
    pub(crate) device: DeviceId,
    /// Of the device.
    pub(crate) incarnation: Incarnation,
    pub(crate) epoch: Epoch,
    /// What the device was granted.
    pub(crate) terms: LeaseTerms,
    /// Whether the device stops by itself when its lease ends.
    pub(crate) enforces_lease: bool,
    /// When the first run began that could not renew its lease any more: it is counted from then, however often
    /// the host agent is started again. `None`: this run may.
    pub(crate) unrenewed_since: Option<BootMoment>,
}

/// A moment, and the boot of the machine that it is of: those of another boot tell nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BootMoment {
    pub(crate) boot_id: String,
    pub(crate) at: Moment,
}

impl BootMoment {
    /// Whether it is of that boot. Where the kernel does not tell (an empty id) it is not.
    pub(crate) fn is_of(&self, boot_id: &str) -> bool {
        is_same_boot(&self.boot_id, boot_id)
    }
}

/// Whether two ids are of the same boot; an empty one is of none that is known.
pub(super) fn is_same_boot(one: &str, other: &str) -> bool {
    !one.is_empty() && one == other
}

impl SessionRecord {
    /// Whether it stands for whatever was in a torn record.
    pub(crate) fn is_unnamed(&self) -> bool {
        is_unnamed(&self.device)
    }

    pub(crate) fn enforcement(&self) -> Enforcement {
        match self.enforces_lease {
            true => Enforcement::ByDevice,
            false => Enforcement::ByNobody,
        }
    }
}

/// A run of the host agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Run {
    /// 0, 1, 2 …: counts the runs on this journal. Each numbers what it names from a block of its own.
    pub(crate) number: u64,
    pub(crate) incarnation: Incarnation,
    /// No session of the run is granted a longer lease.
    pub(crate) terms: LeaseTerms,
}

impl Run {
    /// Names that a run has for each kind of thing: a million a second last for twelve days, ten thousand
    /// for three years; and there may be sixteen million runs.
    pub(crate) const NUMBERS: u64 = 1 << 40;

    /// The first of its names: none of them was given out by an earlier run.
    pub(crate) const fn first_number(&self) -> u64 {
        self.number.saturating_mul(Self::NUMBERS).saturating_add(1)
    }
}

/// One entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Record {
    /// A run began.
    Began(Run),
    /// A session may hold a lease from here on.
    Opened(SessionRecord),
    /// A session's device has certainly stopped.
    Over(SessionId),
    /// Everything that the files before this one say is said above.
    Complete,
    /// A run ended as planned: its sessions may be resumed.
    Drained(Drained),
    /// From here on a session may be of a device that does not stop by itself when its lease ends. Durable before the
    /// first such session of a run is written, so that a torn record tells whether it may be one.
    Unenforced,
}

impl Record {
    pub(super) fn is_of_unenforced(&self) -> bool {
        matches!(self, Self::Opened(session) if !session.enforces_lease)
    }
}

/// Why bytes are not what a crash may leave of a journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Damage {
    /// The head of the file.
    #[error("the file's header does not check")]
    Header,
    /// Written by another version of this program.
    #[error("the file has version {0}, and this program reads version 1")]
    Version(u32),
    /// A frame with a good one behind it.
    #[error("a record does not check, and there are good ones behind it")]
    Frame,
    /// The checksum is right and the content is not.
    #[error("a record checks and makes no sense")]
    Record,
    /// The file goes on from one that is not there.
    #[error("the file goes on from an earlier one, which is missing")]
    Incomplete,
}

/// What could be read of a file.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Contents {
    pub(super) records: Vec<Record>,
    /// Bytes behind the last good frame.
    pub(super) torn: usize,
}

pub(super) fn header(generation: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER_BYTES);
    bytes.extend_from_slice(FILE_MAGIC);
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    bytes.extend_from_slice(&generation.to_le_bytes());
    bytes.extend_from_slice(&crc32c::crc32c(&bytes).to_le_bytes());
    bytes
}

/// One frame of records.
pub(super) fn frame(generation: u64, number: u64, records: &[Record]) -> Vec<u8> {
    let payload = wire::Batch { records: records.iter().map(wire::Record::from).collect() }.encode_to_vec();
    let length = u32::try_from(payload.len()).expect("records are bounded by the sessions there may be");
    let mut bytes = Vec::with_capacity(FRAME_HEADER_BYTES + payload.len());
    bytes.extend_from_slice(FRAME_MAGIC);
    bytes.extend_from_slice(&length.to_le_bytes());
    bytes.extend_from_slice(&number.to_le_bytes());
    bytes.extend_from_slice(&checksum(generation, length, number, &payload).to_le_bytes());
    bytes.extend_from_slice(&payload);
    bytes
}

fn checksum(generation: u64, length: u32, number: u64, payload: &[u8]) -> u32 {
    let crc = crc32c::crc32c(&generation.to_le_bytes());
    let crc = crc32c::crc32c_append(crc, &length.to_le_bytes());
    let crc = crc32c::crc32c_append(crc, &number.to_le_bytes());
    crc32c::crc32c_append(crc, payload)
}

/// Reads a file from its beginning to its end, or to where it is torn.
///
/// # Errors
/// The offset of the damage, in bytes, and what it is.
pub(super) fn read(bytes: &[u8], generation: u64) -> Result<Contents, (usize, Damage)> {
    let head = bytes.get(..HEADER_BYTES).ok_or((0, Damage::Header))?;
    let version = u32_at(head, 8).ok_or((0, Damage::Header))?;
    if !head.starts_with(FILE_MAGIC) || u32_at(head, 20) != Some(crc32c::crc32c(&head[..20])) {
        return Err((0, Damage::Header));
    }
    if version != VERSION {
        return Err((8, Damage::Version(version)));
    }
    if u64_at(head, 12) != Some(generation) {
        return Err((12, Damage::Header));
    }
    let mut contents = Contents { records: Vec::new(), torn: 0 };
    let (mut at, mut number) = (HEADER_BYTES, 0);
    while at < bytes.len() {
        let Some(payload) = frame_at(&bytes[at..], generation, |found| found == number) else {
            if is_any_frame_behind(&bytes[at..], generation, number) {
                return Err((at, Damage::Frame));
            }
            contents.torn = bytes.len() - at;
            break;
        };
        let batch = wire::Batch::decode(payload).map_err(|_| (at, Damage::Record))?;
        for record in batch.records {
            contents.records.push(Record::try_from(record).map_err(|Nonsense| (at, Damage::Record))?);
        }
        at += FRAME_HEADER_BYTES + payload.len();
        number += 1;
    }
    Ok(contents)
}

/// The payload of the frame that `bytes` begin with.
fn frame_at(bytes: &[u8], generation: u64, is_wanted: impl Fn(u64) -> bool) -> Option<&[u8]> {
    if !bytes.starts_with(FRAME_MAGIC) {
        return None;
    }
    let (length, number, crc) = (u32_at(bytes, 4)?, u64_at(bytes, 8)?, u32_at(bytes, 16)?);
    let payload = bytes.get(FRAME_HEADER_BYTES..)?.get(..usize::try_from(length).ok()?)?;
    (is_wanted(number) && checksum(generation, length, number, payload) == crc).then_some(payload)
}

/// The length of a frame that does not check cannot be relied on, so every offset is tried.
fn is_any_frame_behind(bytes: &[u8], generation: u64, number: u64) -> bool {
    (1..bytes.len()).any(|at| frame_at(&bytes[at..], generation, |found| found > number).is_some())
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..)?.get(..4)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..)?.get(..8)?.try_into().ok()?))
}

/// A record whose bytes are as they were written, and which nobody writes.
#[derive(Debug)]
pub(super) struct Nonsense;

/// The records' bytes. Numbers of fields are for ever; a change that an older reader would get wrong
/// raises [`VERSION`].
pub(super) mod wire {
    #[derive(Clone, PartialEq, prost::Message)]
    pub(in crate::journal) struct Batch {
        #[prost(message, repeated, tag = "1")]
        pub(in crate::journal) records: Vec<Record>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(in crate::journal) struct Record {
        #[prost(oneof = "Entry", tags = "1, 2, 3, 4, 5, 6")]
        pub(in crate::journal) entry: Option<Entry>,
    }

    #[derive(Clone, PartialEq, prost::Oneof)]
    pub(in crate::journal) enum Entry {
        #[prost(message, tag = "1")]
        Began(Began),
        #[prost(message, tag = "2")]
        Opened(Session),
        #[prost(uint64, tag = "3")]
        Over(u64),
        #[prost(message, tag = "4")]
        Complete(Complete),
        #[prost(message, tag = "5")]
        Drained(crate::journal::drained::wire::Drained),
        #[prost(message, tag = "6")]
        Unenforced(Unenforced),
    }

    #[derive(Clone, Copy, PartialEq, prost::Message)]
    pub(in crate::journal) struct Complete {}

    #[derive(Clone, Copy, PartialEq, prost::Message)]
    pub(in crate::journal) struct Unenforced {}

    #[derive(Clone, Copy, PartialEq, prost::Message)]
    pub(in crate::journal) struct Terms {
        #[prost(uint64, tag = "1")]
        pub(in crate::journal) duration_ns: u64,
        #[prost(uint32, tag = "2")]
        pub(in crate::journal) drift_ppm: u32,
        #[prost(uint64, tag = "3")]
        pub(in crate::journal) margin_ns: u64,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(in crate::journal) struct Began {
        #[prost(uint64, tag = "1")]
        pub(in crate::journal) number: u64,
        #[prost(uint64, tag = "2")]
        pub(in crate::journal) incarnation: u64,
        #[prost(message, optional, tag = "3")]
        pub(in crate::journal) terms: Option<Terms>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(in crate::journal) struct Session {
        #[prost(uint64, tag = "1")]
        pub(in crate::journal) id: u64,
        #[prost(string, tag = "2")]
        pub(in crate::journal) device: String,
        #[prost(uint64, tag = "3")]
        pub(in crate::journal) incarnation: u64,
        #[prost(uint64, tag = "4")]
        pub(in crate::journal) epoch: u64,
        #[prost(message, optional, tag = "5")]
        pub(in crate::journal) terms: Option<Terms>,
        #[prost(bool, tag = "6")]
        pub(in crate::journal) enforces_lease: bool,
        #[prost(message, optional, tag = "7")]
        pub(in crate::journal) unrenewed_since: Option<BootMoment>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(in crate::journal) struct BootMoment {
        #[prost(string, tag = "1")]
        pub(in crate::journal) boot_id: String,
        #[prost(uint64, tag = "2")]
        pub(in crate::journal) at_ns: u64,
    }
}

impl From<&Record> for wire::Record {
    fn from(record: &Record) -> Self {
        let entry = match record {
            Record::Began(run) => wire::Entry::Began(wire::Began {
                number: run.number,
                incarnation: run.incarnation.get(),
                terms: Some(wire_terms(&run.terms)),
            }),
            Record::Opened(session) => wire::Entry::Opened(wire_session(session)),
            Record::Over(id) => wire::Entry::Over(id.get()),
            Record::Complete => wire::Entry::Complete(wire::Complete {}),
            Record::Drained(drained) => wire::Entry::Drained(drained.into()),
            Record::Unenforced => wire::Entry::Unenforced(wire::Unenforced {}),
        };
        Self { entry: Some(entry) }
    }
}

impl TryFrom<wire::Record> for Record {
    type Error = Nonsense;

    fn try_from(record: wire::Record) -> Result<Self, Nonsense> {
        Ok(match record.entry.ok_or(Nonsense)? {
            wire::Entry::Began(run) => Self::Began(Run {
                number: run.number,
                incarnation: Incarnation::new(run.incarnation).ok_or(Nonsense)?,
                terms: terms(run.terms)?,
            }),
            wire::Entry::Opened(opened) => Self::Opened(session(&opened)?),
            wire::Entry::Over(id) => Self::Over(SessionId::new(id).ok_or(Nonsense)?),
            wire::Entry::Complete(wire::Complete {}) => Self::Complete,
            wire::Entry::Drained(drained) => Self::Drained(drained.try_into()?),
            wire::Entry::Unenforced(wire::Unenforced {}) => Self::Unenforced,
        })
    }
}

pub(super) fn wire_session(session: &SessionRecord) -> wire::Session {
    wire::Session {
        id: session.id.get(),
        device: session.device.as_str().to_owned(),
        incarnation: session.incarnation.get(),
        epoch: session.epoch.get(),
        terms: Some(wire_terms(&session.terms)),
        enforces_lease: session.enforces_lease,
        unrenewed_since: session
            .unrenewed_since
            .as_ref()
            .map(|since| wire::BootMoment { boot_id: since.boot_id.clone(), at_ns: since.at.as_nanos() }),
    }
}

pub(super) fn session(session: &wire::Session) -> Result<SessionRecord, Nonsense> {
    Ok(SessionRecord {
        id: SessionId::new(session.id).ok_or(Nonsense)?,
        device: DeviceId::new(&session.device).map_err(|_| Nonsense)?,
        incarnation: Incarnation::new(session.incarnation).ok_or(Nonsense)?,
        epoch: Epoch::new(session.epoch).ok_or(Nonsense)?,
        terms: terms(session.terms)?,
        enforces_lease: session.enforces_lease,
        unrenewed_since: session
            .unrenewed_since
            .as_ref()
            .map(|since| BootMoment { boot_id: since.boot_id.clone(), at: Moment::from_nanos(since.at_ns) }),
    })
}

fn wire_terms(terms: &LeaseTerms) -> wire::Terms {
    // 584 years are enough.
    let nanos = |duration: Duration| u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
    wire::Terms {
        duration_ns: nanos(terms.duration),
        drift_ppm: terms.drift_ppm,
        margin_ns: nanos(terms.margin),
    }
}

fn terms(terms: Option<wire::Terms>) -> Result<LeaseTerms, Nonsense> {
    let terms = terms.ok_or(Nonsense)?;
    Ok(LeaseTerms {
        duration: Duration::from_nanos(terms.duration_ns),
        drift_ppm: terms.drift_ppm,
        margin: Duration::from_nanos(terms.margin_ns),
    })
}
