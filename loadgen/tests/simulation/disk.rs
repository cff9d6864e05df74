//! The disk of the host agent's machine. Of what was written only what was synced survives a power loss for sure: the
//! rest is kept, lost or torn, file by file, and so is each name whose folder was not synced.
//!
//! The files lie in a real folder, where the journal's own code reads and writes them; this is what it syncs by. When
//! the power goes it settles what the disk has, and before the machine is started again it makes the folder that.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use rand::RngExt as _;
use rand::rngs::StdRng;
use shootdown_server::embed::Medium;

use crate::process::Standstill;
use crate::trace::{Lost, Trace, What};

/// A folder on it.
#[derive(Debug)]
pub struct Disk {
    folder: PathBuf,
    /// What stops with the power.
    processes: Vec<Arc<Standstill>>,
    trace: Trace,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    rng: StdRng,
    power: Power,
    synced: Synced,
    /// It says that it has what it is to sync, and has not.
    lies: bool,
}

#[derive(Debug, PartialEq, Eq)]
enum Power {
    On,
    /// It goes in the middle of a write, which has begun and was not synced: that many come before.
    GoesInWrite(u64),
    /// It has gone; that is what the disk has.
    Off(BTreeMap<String, Vec<u8>>),
}

/// What survives a power loss for sure.
#[derive(Debug, Default)]
struct Synced {
    /// By the number of the file, which is held open so that no other gets it.
    files: HashMap<u64, (File, Vec<u8>)>,
    names: BTreeMap<String, u64>,
}

impl Disk {
    pub fn new(folder: &Path, processes: Vec<Arc<Standstill>>, trace: Trace, rng: StdRng) -> Self {
        let state = State { rng, power: Power::On, synced: Synced::of(folder).unwrap(), lies: false };
        Self { folder: folder.to_owned(), processes, trace, state: Mutex::new(state) }
    }

    /// All that is there by now is taken for synced.
    pub fn take_for_synced(&self) {
        self.state.lock().synced = Synced::of(&self.folder).unwrap();
    }

    /// No file is synced from now on until the power returns. See [`crate::plan::Broken::SessionsNotSynced`].
    pub fn lie(&self) {
        self.state.lock().lies = true;
    }

    pub fn is_off(&self) -> bool {
        matches!(self.state.lock().power, Power::Off(_))
    }

    /// The power goes in the middle of a write, when as many as `before` are done.
    pub fn power_goes_in_write(&self, before: u64) {
        let power = &mut self.state.lock().power;
        if *power == Power::On {
            *power = Power::GoesInWrite(before);
        }
    }

    /// The power goes, if it has not gone in the middle of a write by now.
    pub fn power_goes(&self) {
        if !self.is_off() {
            self.switch_off(&mut self.state.lock());
        }
    }

    /// Nothing that uses the folder is running any more, and the machine is about to be started again.
    pub fn power_returns(&self) {
        let mut state = self.state.lock();
        let Power::Off(found) = std::mem::replace(&mut state.power, Power::On) else { return };
        for name in names_in(&self.folder).unwrap().keys() {
            fs::remove_file(self.folder.join(name)).unwrap();
        }
        for (name, bytes) in found {
            fs::write(self.folder.join(name), bytes).unwrap();
        }
        (state.synced, state.lies) = (Synced::of(&self.folder).unwrap(), false);
        self.processes.iter().for_each(|process| process.light());
    }

    /// Whether the power is there for a sync. If it goes now, what is about to be synced is not.
    fn is_powered(&self) -> bool {
        let mut state = self.state.lock();
        match &mut state.power {
            Power::On => true,
            Power::GoesInWrite(0) => {
                self.trace.record(What::DiskLost(Lost::PowerInWrite));
                self.switch_off(&mut state);
                false
            }
            Power::GoesInWrite(before) => {
                *before -= 1;
                true
            }
            Power::Off(_) => false,
        }
    }

    fn switch_off(&self, state: &mut State) {
        state.power = Power::Off(self.settle(state));
        self.processes.iter().for_each(|process| process.darken());
    }

    /// What the disk has of what is there.
    fn settle(&self, state: &mut State) -> BTreeMap<String, Vec<u8>> {
        let State { rng, synced, .. } = state;
        let lost = |what| self.trace.record(What::DiskLost(what));
        let there = names_in(&self.folder).unwrap();
        let of_either: BTreeSet<_> = there.iter().chain(&synced.names).collect();
        let mut found = BTreeMap::new();
        for (name, inode) in of_either {
            let is = |names: &BTreeMap<String, u64>| names.get(name) == Some(inode);
            match (is(&there), is(&synced.names)) {
                (true, true) => {}
                (true, false) if rng.random_bool(0.5) => {
                    lost(Lost::Name);
                    continue;
                }
                (true, false) => {}
                _ if rng.random_bool(0.5) => lost(Lost::Removal),
                _ => continue,
            }
            // One that was never synced is still there.
            let (now, kept) = match synced.files.get(inode) {
                Some((file, kept)) => (bytes_of(file).unwrap(), kept.as_slice()),
                None => (fs::read(self.folder.join(name)).unwrap(), &[][..]),
            };
            // What is not as it was synced is what was not synced.
            let kept = now.iter().zip(kept).take_while(|(now, kept)| now == kept).count();
            let mut bytes = now;
            if kept < bytes.len() {
                let whole = bytes.len();
                match rng.random_range(0..4) {
                    0 => {}
                    1 => {
                        bytes.truncate(kept);
                        lost(Lost::Bytes);
                    }
                    // At any place; its length is kept with what was not lost, or before it.
                    how => {
                        bytes.truncate(rng.random_range(kept..whole));
                        bytes.resize(if how == 2 { bytes.len() } else { whole }, 0);
                        lost(Lost::Tail);
                    }
                }
            }
            found.insert(name.clone(), bytes);
        }
        found
    }
}

impl Medium for Disk {
    fn sync_file(&self, file: &File) -> io::Result<()> {
        if !self.is_powered() {
            return Err(io::Error::other("the power has gone"));
        }
        let state = &mut *self.state.lock();
        if state.lies { Ok(()) } else { state.synced.keep(file) }
    }

    fn sync_folder(&self, folder: &OwnedFd) -> io::Result<()> {
        if !self.is_powered() {
            return Err(io::Error::other("the power has gone"));
        }
        assert_eq!(File::from(folder.try_clone()?).metadata()?.ino(), fs::metadata(&self.folder)?.ino());
        self.state.lock().synced.names = names_in(&self.folder)?;
        Ok(())
    }
}

impl Synced {
    /// All that there is.
    fn of(folder: &Path) -> io::Result<Self> {
        let mut synced = Self { names: names_in(folder)?, ..Self::default() };
        for name in synced.names.clone().keys() {
            synced.keep(&File::open(folder.join(name))?)?;
        }
        Ok(synced)
    }

    fn keep(&mut self, file: &File) -> io::Result<()> {
        // Opened anew: the journal's lock on the one that it has ends with its process.
        let held = File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
        let bytes = bytes_of(&held)?;
        self.files.insert(file.metadata()?.ino(), (held, bytes));
        Ok(())
    }
}

fn bytes_of(file: &File) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(file.metadata()?.len()).expect("it is short")];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}

/// The files of a folder by name.
fn names_in(folder: &Path) -> io::Result<BTreeMap<String, u64>> {
    let mut names = BTreeMap::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let (name, metadata) = (entry.file_name().into_string(), entry.metadata()?);
        if metadata.is_file() {
            names.insert(name.expect("the journal's names are text"), metadata.ino());
        }
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use rand::SeedableRng as _;

    use super::*;

    const SYNCED: &[u8] = b"synced";
    const WRITTEN: &[u8] = b"synced, and not";

    /// What is found after a power loss of a file that was synced in part, of one whose name was not, and of one that
    /// was removed.
    fn found(seed: u64) -> [Option<Vec<u8>>; 3] {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::write(path("removed"), SYNCED).unwrap();
        let rng = StdRng::seed_from_u64(seed);
        let disk = Disk::new(folder.path(), Vec::new(), Trace::default(), rng);
        let mut file = File::create(path("kept")).unwrap();
        file.write_all(SYNCED).unwrap();
        disk.sync_file(&file).unwrap();
        disk.sync_folder(&File::open(folder.path()).unwrap().into()).unwrap();
        file.write_all(&WRITTEN[SYNCED.len()..]).unwrap();
        let unnamed = File::create(path("unnamed")).unwrap();
        disk.sync_file(&unnamed).unwrap();
        fs::remove_file(path("removed")).unwrap();
        disk.power_goes();
        assert!(disk.sync_file(&file).is_err() && disk.is_off());
        // What is written from here on is written to nothing.
        file.write_all(b", and later").unwrap();
        disk.power_returns();
        ["kept", "unnamed", "removed"].map(|name| fs::read(path(name)).ok())
    }

    #[test]
    fn a_disk_keeps_what_was_synced_and_may_lose_or_tear_the_rest() {
        let all = (0..200).map(found).collect::<Vec<_>>();
        for [kept, unnamed, removed] in &all {
            let kept = kept.as_ref().expect("its name was synced");
            assert!(kept.starts_with(SYNCED) && kept.len() <= WRITTEN.len(), "{kept:?}");
            let last = kept.iter().rposition(|byte| *byte != 0).expect("some of it was synced");
            assert!(WRITTEN.starts_with(&kept[..=last]), "{kept:?}");
            assert!(unnamed.as_ref().is_none_or(Vec::is_empty));
            assert!(removed.as_ref().is_none_or(|bytes| bytes == SYNCED));
        }
        let kept: BTreeSet<_> = all.iter().flat_map(|[kept, ..]| kept).collect();
        // Whole, or cut at any place: with its length, and without.
        assert_eq!(kept.len(), 1 + 2 * (WRITTEN.len() - SYNCED.len()));
        for of in [1, 2] {
            assert!(
                all.iter().any(|found| found[of].is_some()) && all.iter().any(|found| found[of].is_none())
            );
        }
    }
}
