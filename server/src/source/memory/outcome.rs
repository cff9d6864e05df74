//! What an operation answers: which branch it took, what it released, and how long that took.

use std::time::Duration;

use crate::source::RoundResult;

/// What a store did.
#[derive(Debug, Clone)]
pub struct StoreOutcome {
    /// A row for each page that the data touches, lowest first.
    pub pages: Vec<StoredPage>,
}

/// What a store did on one page.
#[derive(Debug, Clone)]
pub struct StoredPage {
    /// The page's first address.
    pub page: u64,
    /// The branch that made it writable.
    pub branch: StoreBranch,
}

/// How a page became writable: the branches of `handle_pte_fault` and `do_wp_page`.
#[derive(Debug, Clone)]
pub enum StoreBranch {
    /// It was writable.
    InPlace,
    /// It was absent (`do_anonymous_page`).
    ZeroFill,
    /// It was write-protected and no longer shared: made writable where it is. Neither notifies nor frees.
    Reuse,
    /// It was shared: copied, and devices told before the old frame's reference went.
    Copied(CopiedPage),
    /// It was shared, and another writer had copied it when this one's copy was ready: only that copy was
    /// freed.
    LostRace,
}

/// A page that was copied because it was shared.
#[derive(Debug, Clone)]
pub struct CopiedPage {
    /// The generation of the frame that the page had before.
    pub old_generation: u64,
    /// The round that took the old frame away from devices.
    pub round: RoundResult,
    /// From the round's answer until the old frame was freed; `None` where it is still shared.
    pub release: Option<Duration>,
}

/// What unmap, dont_need and exit released.
#[derive(Debug, Clone, Default)]
pub struct Released {
    /// Pages that were mapped and are not any more.
    pub pages: usize,
    /// Frames whose last reference went with them.
    pub frames: usize,
    /// Blocks in which they were gathered.
    pub blocks: usize,
    /// Page tables that were freed afterwards.
    pub tables: usize,
    /// The rounds that had to end first; none where nothing was mapped.
    pub rounds: Vec<RoundResult>,
    /// From the last round's answer until the last frame was freed.
    pub release: Duration,
}

/// What a migration did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Migrated {
    /// Pages that are in other frames now.
    pub moved: usize,
    /// Pages that stayed, because something else was at work on them, or no frame was left.
    pub stayed: usize,
}

/// What the source holds. All but `frames_in_use` of a store that is shared are 0 when every address
/// space has exited.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MemoryStats {
    /// Address spaces.
    pub address_spaces: usize,
    /// Mappings, those that are leaving included.
    pub mappings: usize,
    /// Page table entries that are present.
    pub mapped_pages: usize,
    /// Page tables.
    pub page_tables: usize,
    /// References to frames that are kept because it is not known that devices have stopped. Freed when
    /// their address space exits.
    pub quarantined: usize,
    /// Operations in progress that change page tables and may notify.
    pub operations: usize,
    /// Frames of the store that are not free.
    pub frames_in_use: usize,
    /// Pages in the swap file, or slots of it that are about to hold one. Of a file that is shared: all of them.
    pub swapped_pages: usize,
    /// Pages on the list of those that are in use.
    pub active: usize,
    /// Pages on the list of those that are reclaimed next.
    pub inactive: usize,
    /// Pages on neither, because an operation has them to itself.
    pub isolated: usize,
}

/// How often a branch was taken since the source was made, of all address spaces, by the CPU and on devices'
/// behalf (`/proc/vmstat`). None of them ever falls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MemoryEvents {
    /// Pages that were write-protected, not shared any more, and made writable in place (`do_wp_page`).
    pub reused: u64,
    /// Shared pages that were copied, their devices told.
    pub copied: u64,
    /// Copies that came too late, because another writer had made his.
    pub lost_races: u64,
    /// Pages that came back from the swap file (`pswpin`).
    pub swapped_in: u64,
    /// Pages that stayed where they were because one of those who map them has locked them in memory
    /// (`SWAP_FAIL`): nobody was told.
    pub unmaps_failed: u64,
    /// Pages that stayed where they were because something else held them (`SWAP_AGAIN`): nobody was told.
    pub unmaps_busy: u64,
}

/// What one address space holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct AddressSpaceStats {
    /// Mappings, those that are leaving included.
    pub mappings: usize,
    /// Page table entries that are present.
    pub mapped_pages: usize,
    /// Page table entries whose page is in the swap file.
    pub swapped_pages: usize,
    /// Page tables.
    pub page_tables: usize,
    /// References to frames in quarantine.
    pub quarantined: usize,
    /// Operations in progress.
    pub operations: usize,
}

impl StoreOutcome {
    /// How many pages were copied because they were shared.
    #[must_use]
    pub fn pages_copied(&self) -> usize {
        self.pages.iter().filter(|page| matches!(page.branch, StoreBranch::Copied(_))).count()
    }
}
