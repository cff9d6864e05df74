//! One frame shows every hole of a file: what is taken away for one hole is not another's.

use std::sync::Arc;

use shootdown_core::{Access, AddressSpaceId, Cause};
use shootdown_server::source::memory::{MemoryError, MemoryFile, StoreOutcome};
use tokio::task::JoinHandle;

use crate::file::{opened, showing};
use crate::recorder::{Answer, Method, Recorder, Source, source, until};
use crate::{PAGE, get, pages, put};

struct Stage {
    source: Source,
    recorder: Arc<Recorder>,
    file: MemoryFile,
    reader: AddressSpaceId,
    writer: AddressSpaceId,
}

type Store = JoinHandle<Result<StoreOutcome, MemoryError>>;

impl Stage {
    /// Stores into two holes are under way. The reader showed the first, which was taken from it; then it unmapped
    /// that and mapped the second in its place, and that was taken from it too. The two rounds are answered so.
    async fn set(answers: [Answer; 2]) -> (Self, [Store; 2]) {
        let (source, recorder) = source(16);
        let file = opened(&source, &tempfile::tempfile().unwrap(), 4);
        let (reader, writer) = (showing(&source, &file, 1), showing(&source, &file, 4));
        let stage = Self { source, recorder, file, reader, writer };
        assert_eq!(get(&stage.source, reader, 0).await, 0);
        stage.recorder.answer([answers[0], Answer::Quiesced, answers[1]]);
        let first = stage.store(0);
        until(|| stage.recorder.calls().len() == 1).await;
        stage.source.unmap(reader, pages(0, 1)).await.unwrap();
        stage.source.map_file(reader, pages(0, 1), Access::Write, &stage.file, PAGE).unwrap();
        assert_eq!(get(&stage.source, reader, 0).await, 0);
        stage.recorder.forget_calls();
        let second = stage.store(1);
        until(|| stage.recorder.calls().len() == 1).await;
        (stage, [first, second])
    }

    fn store(&self, page: u64) -> Store {
        let (source, writer) = (self.source.clone(), self.writer);
        tokio::spawn(async move { source.store(writer, page * PAGE, &[page as u8 + 5; 8]).await })
    }

    async fn end(self) {
        for space in [self.reader, self.writer] {
            self.source.exit(space).await.unwrap();
        }
        drop(self.file);
        assert_eq!(self.source.stats(), Default::default());
    }
}

#[tokio::test]
async fn a_placeholder_that_comes_back_for_one_hole_does_not_come_back_for_another() {
    let (stage, [first, second]) = Stage::set([Answer::HeldNotQuiesced, Answer::HeldLonger]).await;
    stage.recorder.open_gate();
    assert!(matches!(first.await.unwrap(), Err(MemoryError::NotQuiesced { .. })));
    assert_eq!(stage.source.generation(stage.reader, 0), None, "it is on its way still");
    stage.recorder.open_last_gate();
    second.await.unwrap().unwrap();
    assert_eq!(get(&stage.source, stage.reader, 0).await, 6, "what was stored, and no placeholder");
    stage.end().await;
}

#[tokio::test]
async fn a_placeholder_that_has_gone_for_one_hole_has_not_gone_for_another() {
    let (stage, [first, second]) = Stage::set([Answer::Held, Answer::HeldLongerNotQuiesced]).await;
    stage.recorder.open_gate();
    first.await.unwrap().unwrap();
    stage.recorder.open_last_gate();
    assert!(matches!(second.await.unwrap(), Err(MemoryError::NotQuiesced { .. })));
    assert!(stage.source.generation(stage.reader, 0).is_some(), "a device may have it still");
    stage.recorder.forget_calls();
    put(&stage.source, stage.writer, 1, 7).await;
    assert_eq!(stage.recorder.methods(), [Method::Page(Cause::Clear)], "the next store tells of it");
    assert_eq!(get(&stage.source, stage.reader, 0).await, 7);
    stage.end().await;
}
