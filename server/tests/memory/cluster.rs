//! try_to_unmap_cluster.

use shootdown_core::{Access, Cause};
use shootdown_server::source::memory::ClusterUnmapped;

use crate::file::{filled, on_disk, opened, showing};
use crate::recorder::{Answer, Method, source};
use crate::{PAGE, get, mapped, pages, put};

#[tokio::test]
async fn young_entries_stay_and_the_others_go_inside_one_bracket() {
    let (source, recorder) = source(64);
    let disk = filled(40);
    let file = opened(&source, &disk, 40);
    let space = showing(&source, &file, 40);
    for page in 0..40 {
        put(&source, space, page, 90).await;
    }
    let first = source.unmap_cluster(space, 5 * PAGE).await.unwrap();
    assert_eq!(first, ClusterUnmapped { unmapped: 0, kept: 32 }, "all were used; now none is young");
    assert_eq!(recorder.calls()[0].range, pages(0, 32), "a cluster is aligned");
    for page in [3, 30] {
        get(&source, space, page).await;
    }
    recorder.grant(space, 9 * PAGE, Access::Read).await.unwrap();
    recorder.forget_calls();
    let second = source.unmap_cluster(space, 5 * PAGE + 7).await.unwrap();
    assert_eq!(second, ClusterUnmapped { unmapped: 29, kept: 3 });
    assert_eq!(recorder.methods(), [Method::RangeStart(Cause::Clear), Method::RangeEnd]);
    let [start, end] = &recorder.calls()[..] else { panic!("one bracket") };
    assert_eq!((start.stats.mapped_pages, end.stats.mapped_pages), (40, 11));
    assert_eq!((file.cached_pages(), source.stats().frames_in_use), (40, 40), "the pages stay in memory");
    assert!(source.generation(space, 3 * PAGE).is_some() && source.generation(space, 4 * PAGE).is_none());
    assert_eq!(source.write_back(&file).await.unwrap().written, 40);
    assert_eq!((on_disk(&disk, 4), get(&source, space, 4).await), (90, 90));
}

#[tokio::test]
async fn a_refused_bracket_and_memory_without_a_file_are_left_alone() {
    let (source, recorder) = source(64);
    let file = opened(&source, &filled(2), 2);
    let space = showing(&source, &file, 2);
    source.map(space, pages(2, 4), Access::Write).unwrap();
    get(&source, space, 0).await;
    put(&source, space, 2, 1).await;
    source.unmap_cluster(space, 0).await.unwrap();
    recorder.forget_calls();
    assert_eq!(source.unmap_cluster(space, 2 * PAGE).await.unwrap(), ClusterUnmapped::default());
    assert_eq!(source.unmap_cluster(space, 9 * PAGE).await.unwrap(), ClusterUnmapped::default());
    let other = mapped(&source, pages(0, 1));
    assert_eq!(source.unmap_cluster(other, 0).await.unwrap(), ClusterUnmapped::default());
    assert_eq!(recorder.methods(), []);
    recorder.answer([Answer::Refused]);
    assert!(source.unmap_cluster(space, 0).await.is_err());
    assert!(source.generation(space, 0).is_some());
    assert_eq!(source.unmap_cluster(space, 0).await.unwrap().unmapped, 1);
    assert_eq!(recorder.calls().last().unwrap().range, pages(0, 2), "its own mapping alone");
    assert_eq!((get(&source, space, 2).await, get(&source, space, 0).await), (1, 1));
}
