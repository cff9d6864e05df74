//! The read side: begin and end of a section against the locks that could stand in its place.
//!
//! `cargo bench -p srcu --bench read`. Each group runs alone and beside one other thread that does the same without
//! pause. The std and parking_lot guards borrow their lock; those marked `owned` are `'static`, as a section is.
#![allow(clippy::unwrap_used, reason = "nobody poisons the lock")]
#![allow(missing_docs, reason = "criterion's macros make public functions")]
#![allow(
    clippy::disallowed_types,
    clippy::disallowed_methods,
    reason = "the price of atomics is what is measured"
)]

use arc_swap::ArcSwap;
use criterion::{BenchmarkGroup, Criterion, criterion_group, criterion_main, measurement::WallTime};
use srcu::{Ages, Domain, Srcu};
use std::{
    hint::black_box,
    pin::pin,
    sync::{
        Arc, Barrier,
        atomic::{AtomicBool, AtomicU64, Ordering, fence},
    },
    task::{Context, Poll, Waker},
    thread,
    time::Instant,
};

#[derive(Clone, Copy)]
enum Beside {
    Nobody,
    OneReader,
}

fn measure(group: &mut BenchmarkGroup<'_, WallTime>, beside: Beside, name: &str, read: impl Fn() + Sync) {
    group.bench_function(name, |bencher| match beside {
        Beside::Nobody => bencher.iter(&read),
        Beside::OneReader => bencher.iter_custom(|iterations| {
            let (stop, both) = (AtomicBool::new(false), Barrier::new(2));
            thread::scope(|scope| {
                scope.spawn(|| {
                    both.wait();
                    while !stop.load(Ordering::Relaxed) {
                        read();
                    }
                });
                both.wait();
                let begin = Instant::now();
                for _ in 0..iterations {
                    read();
                }
                let elapsed = begin.elapsed();
                stop.store(true, Ordering::Relaxed);
                elapsed
            })
        }),
    });
}

/// Locks that nobody writes are ready at the first poll.
fn ready<R>(future: impl Future<Output = R>) -> R {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(result) => result,
        Poll::Pending => unreachable!("nobody writes"),
    }
}

fn readers(criterion: &mut Criterion, name: &str, beside: Beside) {
    let mut group = criterion.benchmark_group(name);

    let domain = Domain::new("bench");
    measure(&mut group, beside, "srcu Domain::read", || drop(black_box(domain.read())));
    let exact = Domain::builder().ages(Ages::Exact).build();
    measure(&mut group, beside, "srcu Domain::read, exact ages", || drop(black_box(exact.read())));
    let value = Srcu::new(Domain::new("bench"), 5);
    measure(&mut group, beside, "srcu Srcu::read", || {
        black_box(*value.read());
    });

    let std = std::sync::RwLock::new(5);
    measure(&mut group, beside, "std RwLock", || {
        black_box(*std.read().unwrap());
    });
    let parking_lot = Arc::new(parking_lot::RwLock::new(5));
    measure(&mut group, beside, "parking_lot RwLock", || {
        black_box(*parking_lot.read());
    });
    measure(&mut group, beside, "parking_lot RwLock, owned", || {
        black_box(*parking_lot.read_arc());
    });
    let tokio = Arc::new(tokio::sync::RwLock::new(5));
    measure(&mut group, beside, "tokio RwLock", || {
        black_box(*ready(tokio.read()));
    });
    measure(&mut group, beside, "tokio RwLock, owned", || {
        black_box(*ready(Arc::clone(&tokio).read_owned()));
    });
    let swapped = ArcSwap::from_pointee(5);
    measure(&mut group, beside, "ArcSwap load", || {
        black_box(**swapped.load());
    });
    measure(&mut group, beside, "ArcSwap load_full", || {
        black_box(*swapped.load_full());
    });
    group.finish();
}

fn alone(criterion: &mut Criterion) {
    readers(criterion, "alone", Beside::Nobody);
}

fn beside_one_reader(criterion: &mut Criterion) {
    readers(criterion, "beside one reader", Beside::OneReader);
}

/// What a counter costs when it is ordered by its own read-modify-write, and when by a fence after it.
fn fences(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("fence");
    let counter = AtomicU64::new(0);
    group.bench_function("add", |bencher| bencher.iter(|| counter.fetch_add(1, Ordering::Acquire)));
    group.bench_function("add and fence", |bencher| {
        bencher.iter(|| {
            counter.fetch_add(1, Ordering::Relaxed);
            fence(Ordering::SeqCst);
        });
    });
    group.finish();
}

/// A grace period that has nothing to wait for.
fn grace_periods(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("grace period");
    for stripes in [1, 8, 64] {
        let domain = Domain::builder().stripes(stripes).build();
        group.bench_function(format!("{stripes} stripes"), |bencher| {
            bencher.iter(|| ready(domain.synchronize()));
        });
    }
    group.finish();
}

criterion_group!(benches, alone, beside_one_reader, fences, grace_periods);
criterion_main!(benches);
