//! What takes pages out of an address space: munmap, MADV_DONTNEED, mremap.

use std::ops::Range;

use super::cells::Content;
use super::space::{Space, may_also};
use super::world::WorkloadError;
use crate::check::floor::Zeros;
use crate::path::Path;

impl Space {
    /// The part of `pages` from its first on that is mapped.
    pub(super) fn mapped_part(&self, pages: Range<usize>) -> Range<usize> {
        let length = pages.clone().take_while(|page| self.is_mapped(*page)).count();
        pages.start..pages.start + length
    }

    /// MADV_DONTNEED of `pages`, up to the first hole, and new stamps.
    pub(super) async fn dont_need(&self, pages: Range<usize>) -> Result<(), WorkloadError> {
        let pages = self.mapped_part(pages);
        if pages.is_empty() {
            return Ok(());
        }
        self.drop_pages(pages.clone()).await?;
        for page in pages {
            self.refill(page).await?;
        }
        Ok(())
    }

    /// MADV_DONTNEED of pages of anonymous memory that are mapped: they read as zeros.
    pub(super) async fn drop_pages(&self, pages: Range<usize>) -> Result<(), WorkloadError> {
        for page in pages.clone() {
            self.cells.on_zap(&self.world, page)?;
        }
        let released = self.world.source.dont_need(self.id, self.range_of(pages.clone())?).await;
        let released = released.map_err(self.failed(Path::Dontneed))?;
        let floor = self.world.next_version();
        for page in pages {
            self.cells.on_zapped(&self.world, page, floor, Path::Dontneed)?;
            self.world.on_done(self.at(page), "dontneed", released.rounds.first(), Some(floor));
        }
        self.world.on_released(Path::Dontneed, &released);
        Ok(())
    }

    /// MADV_DONTNEED of pages of the file: they are the file's, and what was written to them is kept.
    pub(super) async fn dont_need_file(&self, pages: Range<usize>) -> Result<(), WorkloadError> {
        let marked = self.marked(pages.clone())?;
        let released = self.world.source.dont_need(self.id, self.range_of(pages.clone())?).await;
        let released = released.map_err(self.failed(Path::Dontneed))?;
        for page in pages {
            self.file.cells.on_touched(&self.world, page, Path::Dontneed)?;
            self.world.on_done(self.at(page), "dontneed", released.rounds.first(), None);
        }
        self.world.on_released(Path::Dontneed, &released);
        self.check_marked(&marked, Path::Dontneed).await
    }

    /// munmap. The hole is filled by a later operation.
    pub(super) async fn unmap(&self, pages: Range<usize>) -> Result<(), WorkloadError> {
        for page in pages.clone() {
            self.cells.on_zap(&self.world, page)?;
        }
        let range = self.range_of(pages.clone())?;
        let released = self.world.source.unmap(self.id, range).await;
        let released = released.map_err(self.failed(Path::Munmap))?;
        let floor = self.world.next_version();
        for page in pages {
            self.cells.on_zapped(&self.world, page, floor, Path::Munmap)?;
            self.cells.set(page, Content::Hole);
            self.world.on_done(self.at(page), "munmap", released.rounds.first(), Some(floor));
        }
        if released.tables > 0 {
            self.world.walks.on_freed(self.id, range);
        }
        self.world.on_released(Path::Munmap, &released);
        Ok(())
    }

    /// mremap of pages that are stamped. What is mapped at the new place goes.
    pub(super) async fn remap(&self, old: Range<usize>, new: Range<usize>) -> Result<(), WorkloadError> {
        let (world, range) = (&self.world, self.range_of(new.clone())?);
        let _moving = world.moving.begin(self.id, range);
        // A record has room for one stamp of another place: what is there, or what is to come.
        if new.clone().any(|page| self.has_another(page)) {
            self.unmap(new.clone()).await?;
        }
        for (from, to) in old.clone().zip(new.clone()) {
            let Content::Stamped(stamp) = self.cell(from).content else { continue };
            self.cells.publish(world, to, |record| {
                may_also(record, stamp);
                record.zaps += 1;
            })?;
            self.cells.on_zap(world, from)?;
        }
        let moved = world.source.remap(self.id, self.range_of(old.clone())?, range.start()).await;
        let released = moved.map_err(self.failed(Path::Mremap))?;
        let floor = world.next_version();
        for (from, to) in old.zip(new) {
            let Content::Stamped(stamp) = self.cell(from).content else { continue };
            self.cells.on_zapped(world, from, floor, Path::Mremap)?;
            self.cells.set(from, Content::Hole);
            self.cells.publish(world, to, |record| {
                record.floor = floor;
                record.copy_floor = floor;
                record.zeros = Zeros::Forbidden;
                record.copy_zeros = Zeros::Forbidden;
                record.zaps += 1;
                record.path = Path::Mremap;
            })?;
            self.cells.set(to, Content::Stamped(stamp));
            world.on_done(self.at(from), "mremap from", released.rounds.first(), Some(floor));
            world.on_done(self.at(to), "mremap to", released.rounds.last(), Some(floor));
        }
        world.on_released(Path::Mremap, &released);
        Ok(())
    }

    fn has_another(&self, page: usize) -> bool {
        let record = self.cell(page).record;
        record.also_in_frame || record.also_in_copies
    }
}
