//! Walks of page tables that outlive them: the broken order of `free_pgtables`.
//!
//! The kernel unlinks a VMA before it frees its page tables, and frees them when nobody walks them any more: neither
//! a fault, nor a device that walks page tables itself and caches what it finds on its way. Here a walk holds the
//! layout of its address space for reading, and tables are freed under its write lock. Broken, a fault goes on in
//! a table that was freed and finds what was in it.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use shootdown_client::{Access, AddrRange, AddressSpaceId, PageSize, Translation};
use shootdown_server::source::{FaultError, Translate};

/// What walks have found, and which of it is of tables that were freed. A clone is the same.
#[derive(Debug, Clone, Default)]
pub(super) struct Walks(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    found: HashMap<(AddressSpaceId, u64), Translation>,
    freed: HashMap<(AddressSpaceId, u64), Translation>,
}

/// A source whose page tables are walked after they were freed.
struct Outlived {
    source: Arc<dyn Translate>,
    walks: Walks,
}

impl Walks {
    /// The page tables over `range` were freed.
    pub(super) fn on_freed(&self, address_space: AddressSpaceId, range: AddrRange) {
        let State { found, freed } = &mut *self.0.lock();
        freed.extend(found.extract_if(|(id, page), _| *id == address_space && range.contains_address(*page)));
    }

    /// `source`, with its faults answered from tables that were freed.
    pub(super) fn through(&self, source: Arc<dyn Translate>) -> Arc<dyn Translate> {
        Arc::new(Outlived { source, walks: self.clone() })
    }

    fn on_found(&self, address_space: AddressSpaceId, translations: &[Translation]) {
        let mut state = self.0.lock();
        for translation in translations {
            let page = (address_space, translation.range.start());
            state.found.insert(page, *translation);
            // Another table is there by now.
            state.freed.remove(&page);
        }
    }

    /// What was in freed tables, where every page of `range` was in one.
    fn in_freed(
        &self,
        address_space: AddressSpaceId,
        range: AddrRange,
        access: Access,
    ) -> Option<Vec<Translation>> {
        let state = self.0.lock();
        let of_page = |page| {
            let found = state.freed.get(&(address_space, page))?;
            Some(Translation { access, ..*found })
        };
        range.pages(PageSize::BASE).map(of_page).collect()
    }
}

impl Translate for Outlived {
    fn source(&self) -> &'static str {
        self.source.source()
    }

    fn fault(
        &self,
        address_space: AddressSpaceId,
        range: AddrRange,
        access: Access,
    ) -> BoxFuture<'_, Result<Vec<Translation>, FaultError>> {
        Box::pin(async move {
            match self.source.fault(address_space, range, access).await {
                Ok(translations) => {
                    self.walks.on_found(address_space, &translations);
                    Ok(translations)
                }
                Err(error) => self.walks.in_freed(address_space, range, access).ok_or(error),
            }
        })
    }

    fn bytes(&self, translations: &[Translation]) -> Result<Bytes, FaultError> {
        self.source.bytes(translations)
    }
}
