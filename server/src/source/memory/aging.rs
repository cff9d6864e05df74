//! Was a page used? `page_referenced`, `page_referenced_one`, after the patch of 2012 to `mm/rmap.c`
//! ("invalidate_page outside PT lock", `page_referenced_one`); and `shrink_active_list`.
//!
//! ```text
//!   the page is isolated; its places are copied out under the rmap lock; unlock
//!   for each place:
//!       page-table lock: is it this page's entry?
//!           its VMA is locked in memory  --yes--> used; nobody is asked                 (mapcount = 1)
//!           test and clear young
//!       unlock
//!   for each place, all at once: clear_flush_young, and its answer counts as the bit does
//! ```
//!
//! A device that could not be asked may have used the page: it counts as used (YoungIsConservative).

use futures_util::future::join_all;
use shootdown_core::{AddrRange, PageSize};

use super::Inner;
use super::address_space::{AddressSpace, User};
use super::frame::FrameLife;
use super::lru::{Isolated, List};
use super::reclaim::Aged;
use super::rmap::places_of;
use super::twin::Twin;
use crate::source::{Notifier, RoundResult, Wait};

/// How devices are asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ask {
    /// `clear_flush_young`: the page is about to go, and a use after the answer takes a fault, which is seen.
    Flush,
    /// `clear_young`: the page may well stay, and asking should not cost devices their translations.
    Keep,
}

/// Whether a page was used since it was last asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Used {
    Yes,
    No,
}

/// What one place says.
enum Here {
    /// The entry is of another page.
    Elsewhere,
    Locked,
    Bit(Used),
}

/// The part of `shrink_active_list` that decides: those that were used go back to the active list, at its new
/// end, the others to the inactive one. All are asked for at once.
pub(super) async fn age<N: Notifier>(inner: &Inner<N>, pages: Vec<Isolated>) -> Aged {
    let looked_at = pages.len();
    let each = pages.into_iter().map(|page| async move {
        let used = page_referenced(inner, &page, Ask::Keep).await;
        page.put_back(match used {
            Used::Yes => List::Active,
            Used::No => List::Inactive,
        });
        usize::from(used == Used::Yes)
    });
    Aged { looked_at, young: join_all(each).await.into_iter().sum() }
}

/// `page_referenced`: the CPU's bits and the devices', of every place. They are clear afterwards.
pub(super) async fn page_referenced<N: Notifier>(inner: &Inner<N>, page: &Isolated, ask: Ask) -> Used {
    let mut places: Vec<(User, u64)> = Vec::new();
    let mut used = Used::No;
    for (user, address) in places_of(page) {
        match page_referenced_one(&user.space, address, page.life()) {
            Here::Elsewhere => {}
            Here::Locked => return Used::Yes,
            Here::Bit(bit) => {
                used = used.or(bit);
                places.push((user, address));
            }
        }
    }
    let ask_devices = places.iter().map(|(user, address)| ask_devices(inner, user, *address, ask));
    Twin::Aging.run(join_all(ask_devices)).await.into_iter().fold(used, Used::or)
}

/// `page_referenced_one`, up to the notifier.
fn page_referenced_one(space: &AddressSpace, address: u64, life: FrameLife) -> Here {
    let layout = space.layout.read();
    let Some(table) = space.tables.get(address) else { return Here::Elsewhere };
    let mut entries = table.lock();
    let Some(entry) = entries.get_mut(address).filter(|entry| entry.is_life(life)) else {
        return Here::Elsewhere;
    };
    let page = AddrRange::page_of(address, PageSize::BASE);
    if layout.vmas.overlapping(page).any(|vma| vma.flags.locked) {
        return Here::Locked;
    }
    Here::Bit(if std::mem::take(&mut entry.young) { Used::Yes } else { Used::No })
}

async fn ask_devices<N: Notifier>(inner: &Inner<N>, user: &User, address: u64, ask: Ask) -> Used {
    let (id, page) = (user.space.id, AddrRange::page_of(address, PageSize::BASE));
    let asked = match ask {
        Ask::Flush => inner.notifier.clear_flush_young(id, page, Wait::ForTargets).await,
        Ask::Keep => inner.notifier.clear_young(id, page, Wait::ForTargets).await,
    };
    let not_used = |round: &RoundResult| round.is_quiesced() && !round.young;
    if asked.as_ref().is_ok_and(not_used) { Used::No } else { Used::Yes }
}

impl Used {
    fn or(self, other: Self) -> Self {
        if self == Self::Yes { self } else { other }
    }
}
