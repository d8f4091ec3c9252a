//! Rings and deferred transmission under a model checker, which tries the interleavings of the threads and
//! what weak memory lets each of them see. The sources are the crate's own, with the checker's atomics.
//!
//! `RUSTFLAGS="--cfg loom" cargo test -p vport --test loom_ring --release`
//!
//! That the models can fail is part of the run: the same sources with one of the full fences weakened to
//! acquire and release, and with one of the second looks left out, must be caught, for each place that has
//! one (`ring/place.rs`). A lost wake-up shows as a deadlock.
//!
//! What the checker can't see: the counters, which are ordinary atomics here (each is written under a lock).
#![cfg(loom)]
#![allow(unsafe_code)] // that of the sources under test
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

macro_rules! rings {
    ($name:ident, weak: $weak:expr, blind: $blind:expr) => {
        #[path = "."]
        #[allow(dead_code, unused_imports, unreachable_pub)]
        mod $name {
            pub mod atomic {
                use super::place::Place;
                pub use loom::sync::atomic::AtomicBool;
                pub use loom::sync::atomic::AtomicU8;
                pub use loom::sync::{Condvar, Mutex, MutexGuard};
                pub use std::sync::Arc;
                pub use std::sync::atomic::AtomicU64;
                pub use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};

                pub use loom::cell::UnsafeCell as SharedCell;

                #[allow(clippy::redundant_locals)]
                const WEAK: Option<Place> = $weak;
                const BLIND: Option<Place> = $blind;

                pub fn full_fence(place: Place) {
                    let weak = WEAK == Some(place);
                    loom::sync::atomic::fence(if weak {
                        std::sync::atomic::Ordering::AcqRel
                    } else {
                        std::sync::atomic::Ordering::SeqCst
                    });
                }

                pub fn looks_again(place: Place) -> bool {
                    BLIND != Some(place)
                }
            }
            #[path = "../src/ring/bounded.rs"]
            pub mod bounded;
            #[path = "../src/ring/deferred.rs"]
            pub mod deferred;
            #[path = "../src/ring/feeder.rs"]
            pub mod feeder;
            #[path = "../src/ring/place.rs"]
            pub mod place;
            #[path = "../src/ring/slot.rs"]
            pub mod slot;

            use bounded::{Notify, Ring, Sleep};
            use deferred::{Deferred, Flushed, Sent, Sink};
            use feeder::Feeder;
            use loom::thread;
            use std::collections::VecDeque;
            use std::sync::Arc;
            use std::sync::atomic::{AtomicUsize, Ordering};

            /// Something to sleep on that never wakes of itself (the checker's own does).
            pub struct Signal {
                given: loom::sync::Mutex<bool>,
                wake: loom::sync::Condvar,
            }

            impl Signal {
                fn new() -> Self {
                    Self {
                        given: loom::sync::Mutex::new(false),
                        wake: loom::sync::Condvar::new(),
                    }
                }
                fn notify(&self) {
                    *self.given.lock().unwrap() = true;
                    self.wake.notify_one();
                }
                fn wait(&self) {
                    let mut given = self.given.lock().unwrap();
                    while !*given {
                        given = self.wake.wait(given).unwrap();
                    }
                    *given = false;
                }
            }

            /// Wakes a feeder, and a consumer, that wait.
            pub struct Ends {
                feeder: Arc<Feeder>,
                resume: Arc<Signal>,
                work: Signal,
            }

            impl Ends {
                fn new() -> Self {
                    Self {
                        feeder: Arc::new(Feeder::new()),
                        resume: Arc::new(Signal::new()),
                        work: Signal::new(),
                    }
                }
            }

            impl Notify for Ends {
                fn resume(&self) {
                    if self.feeder.wakes() {
                        self.resume.notify();
                    }
                }
                fn work(&self) {
                    self.work.notify();
                }
            }

            fn ring(size: usize, backpressure: bool) -> Arc<Ring<usize, Ends>> {
                Arc::new(Ring::new(size, backpressure, Ends::new()))
            }

            fn model(bound: usize, check: impl Fn() + Sync + Send + 'static) {
                let mut builder = loom::model::Builder::new();
                builder.preemption_bound = Some(bound);
                let runs = Arc::new(AtomicUsize::new(0));
                let count = Arc::clone(&runs);
                builder.check(move || {
                    count.fetch_add(1, Ordering::Relaxed);
                    check();
                });
                let runs = runs.load(Ordering::Relaxed);
                println!("{runs} interleavings");
                assert!(runs > 10, "only {runs}: does the model share anything?");
            }

            /// A ring is filled while it is consumed: nobody is left to wake one that is stopped and empty.
            pub fn stop(size: usize) {
                model(3, move || {
                    let ring = ring(size, true);
                    let consumer = {
                        let ring = Arc::clone(&ring);
                        thread::spawn(move || {
                            let mut got = Vec::new();
                            for _ in 0..2 {
                                ring.pop(size, |item| {
                                    got.push(item);
                                    true
                                });
                            }
                            got
                        })
                    };
                    let pushed = ring.push(0..size, |_| panic!("there was room"));
                    assert_eq!(pushed.taken, size);
                    let got = consumer.join().unwrap();
                    assert!(got.iter().copied().eq(0..got.len()), "in order: {got:?}");
                    let empty = ring.is_empty();
                    assert_eq!(empty, got.len() == size);
                    assert!(
                        !(empty && ring.is_stopped()),
                        "stopped, and nobody to wake it"
                    );
                    let counters = ring.counters();
                    assert_eq!(counters.produced, counters.consumed + ring.len() as u64);
                    assert_eq!(
                        counters.stops,
                        counters.wakes + u64::from(ring.is_stopped())
                    );
                });
            }

            /// A producer that pauses and a consumer that sleeps: all passes, in order.
            pub fn pause_and_sleep(size: usize, bound: usize) {
                model(bound, move || {
                    let ring = ring(size, true);
                    let items = size + 1;
                    let consumer = {
                        let ring = Arc::clone(&ring);
                        thread::spawn(move || {
                            let mut got = Vec::new();
                            while got.len() < items {
                                let taken = ring.pop(size, |item| {
                                    got.push(item);
                                    true
                                });
                                if taken == 0 && ring.announce_sleep() == Sleep::Sleep {
                                    ring.notify().work.wait();
                                }
                            }
                            assert!(got.into_iter().eq(0..items), "in order");
                        })
                    };
                    let ends = ring.notify();
                    for item in 0..items {
                        loop {
                            while ring.is_stopped() && ends.feeder.pause(|| ring.is_stopped()) {
                                ends.resume.wait();
                            }
                            // A wake by the sleeping consumer may come too early: then it stops again.
                            if ring.push([item], drop).taken == 1 {
                                break;
                            }
                        }
                    }
                    consumer.join().unwrap();
                    let counters = ring.counters();
                    assert_eq!(counters.produced, counters.consumed);
                    assert_eq!(
                        counters.stops,
                        counters.wakes + u64::from(ring.is_stopped())
                    );
                });
            }

            /// A consumer that goes to sleep while something comes.
            pub fn sleep() {
                model(3, || {
                    let ring = ring(1, false);
                    let consumer = {
                        let ring = Arc::clone(&ring);
                        thread::spawn(move || {
                            while ring.pop(1, |_| true) == 0 {
                                if ring.announce_sleep() == Sleep::Sleep {
                                    ring.notify().work.wait();
                                }
                            }
                        })
                    };
                    ring.push([1], |_| panic!("there was room"));
                    consumer.join().unwrap();
                });
            }

            /// Two producers at a ring of one place: one of them finds no room, and nothing is lost uncounted.
            pub fn race() {
                model(2, || {
                    let ring = ring(1, true);
                    let other = {
                        let ring = Arc::clone(&ring);
                        thread::spawn(move || ring.push([1], drop).taken)
                    };
                    let popped = ring.push([2], drop).taken + ring.pop(1, |_| true);
                    let _ = popped;
                    other.join().unwrap();
                    let counters = ring.counters();
                    assert_eq!(counters.produced + counters.dropped_full, 2);
                    assert_eq!(counters.produced, counters.consumed + ring.len() as u64);
                    let stopped = ring.is_stopped();
                    assert!(
                        !(stopped && ring.is_empty()),
                        "stopped, and nobody to wake it"
                    );
                    assert_eq!(counters.stops, counters.wakes + u64::from(stopped));
                });
            }

            /// A feeder pauses on two full rings while one of them is consumed. `look_at`: how many of them it
            /// looks at again.
            pub fn joint(size: usize, look_at: usize) {
                model(3, move || {
                    let feeder = Arc::new(Feeder::new());
                    let resume = Arc::new(Signal::new());
                    let ends = || Ends {
                        feeder: Arc::clone(&feeder),
                        resume: Arc::clone(&resume),
                        work: Signal::new(),
                    };
                    let rings =
                        Arc::new([Ring::new(size, true, ends()), Ring::new(size, true, ends())]);
                    for ring in rings.iter() {
                        ring.push(0..size, |_| panic!("there was room"));
                    }
                    let consumer = {
                        let rings = Arc::clone(&rings);
                        thread::spawn(move || {
                            rings[1].pop(size, |_| true);
                        })
                    };
                    // Both were seen to be stopped, or there is no pause.
                    if rings.iter().all(Ring::is_stopped)
                        && feeder.pause(|| rings[..look_at].iter().all(Ring::is_stopped))
                    {
                        resume.wait();
                    }
                    assert!(!rings[1].is_stopped());
                    consumer.join().unwrap();
                });
            }

            /// A closed, resized or tamed ring wakes what paused on it.
            pub fn force(how: fn(&Ring<usize, Ends>)) {
                model(3, move || {
                    let ring = ring(1, true);
                    ring.push([1], drop);
                    let other = {
                        let ring = Arc::clone(&ring);
                        thread::spawn(move || how(&ring))
                    };
                    let ends = ring.notify();
                    if ring.is_stopped() && ends.feeder.pause(|| ring.is_stopped()) {
                        ends.resume.wait();
                    }
                    other.join().unwrap();
                    let counters = ring.counters();
                    assert_eq!(counters.stops, counters.wakes);
                });
            }

            pub const BY_FORCE: [fn(&Ring<usize, Ends>); 3] = [
                |ring| ring.close(),
                |ring| ring.set_backpressure(false),
                |ring| ring.resize(2, drop),
            ];

            /// A far end that takes a message in two parts, and nothing in between.
            #[derive(Default)]
            struct Far {
                got: Vec<(usize, usize)>,
                blocked: bool,
            }

            impl Sink<usize> for Far {
                fn size(&self, _message: &usize) -> usize {
                    2
                }
                fn send(&mut self, messages: &VecDeque<usize>, offset: usize) -> Sent {
                    self.blocked = offset == 1 && !self.blocked;
                    if self.blocked {
                        return Sent::Blocked;
                    }
                    self.got.push((messages[0], offset));
                    Sent::Bytes(1)
                }
                fn recycle(&mut self, _message: usize) {}
            }

            fn flush(deferred: &Deferred<usize, Ends>, far: &mut Far) {
                loop {
                    match deferred.flush(far) {
                        Flushed::More => {}
                        Flushed::Blocked => assert!(deferred.writable()),
                        _ => return,
                    }
                }
            }

            /// Messages are queued while the flusher runs out of them: all are sent, whole, in order.
            pub fn flusher(size: usize, bound: usize) {
                model(bound, move || {
                    let ends = Ends::new();
                    let deferred = Arc::new(Deferred::new(Ring::new(size, false, ends)));
                    let flusher = {
                        let deferred = Arc::clone(&deferred);
                        thread::spawn(move || {
                            let mut far = Far::default();
                            loop {
                                deferred.ring().notify().work.wait();
                                flush(&deferred, &mut far);
                                let counters = deferred.counters();
                                // Both were queued or dropped, and nothing waits.
                                if counters.sent + counters.dropped_full == 2 {
                                    break;
                                }
                            }
                            let parts = far.got.chunks(2);
                            assert!(parts.clone().all(|p| p.len() == 2 && p[0].0 == p[1].0));
                            assert!(far.got.is_sorted(), "in order: {:?}", far.got);
                        })
                    };
                    for message in 0..2 {
                        let pushed = deferred.enqueue([message], drop);
                        if pushed.full != 0 {
                            // The count above is looked at after a flush.
                            deferred.ring().notify().work.notify();
                        }
                    }
                    flusher.join().unwrap();
                    let counters = deferred.counters();
                    assert_eq!(counters.enqueued, counters.sent + counters.dropped_full);
                });
            }

            /// Where messages arrived, in what order.
            #[derive(Clone, Default)]
            struct Arrived(Arc<std::sync::Mutex<Vec<usize>>>);

            impl Sink<usize> for Arrived {
                fn size(&self, _message: &usize) -> usize {
                    1
                }
                fn send(&mut self, messages: &VecDeque<usize>, _offset: usize) -> Sent {
                    self.0.lock().unwrap().extend(messages);
                    Sent::Bytes(messages.len())
                }
                fn recycle(&mut self, _message: usize) {}
            }

            /// What is sent past an idle queue doesn't overtake what the same thread queued before.
            pub fn past() {
                model(4, || {
                    let deferred = Arc::new(Deferred::new(Ring::new(2, false, Ends::new())));
                    let mut arrived = Arrived::default();
                    deferred.enqueue([1], drop);
                    let flusher = {
                        let (deferred, mut arrived) = (Arc::clone(&deferred), arrived.clone());
                        thread::spawn(move || deferred.flush(&mut arrived))
                    };
                    deferred.enqueue([2], drop);
                    if deferred.is_idle() {
                        arrived.0.lock().unwrap().push(3);
                    }
                    flusher.join().unwrap();
                    deferred.flush(&mut arrived);
                    let order = arrived.0.lock().unwrap();
                    assert!(order.is_sorted(), "overtaken: {order:?}");
                });
            }

            /// Two threads that both could flush: one does, at a time.
            pub fn one_flusher() {
                model(3, || {
                    let deferred = Arc::new(Deferred::new(Ring::new(2, false, Ends::new())));
                    let other = {
                        let deferred = Arc::clone(&deferred);
                        thread::spawn(move || {
                            let mut far = Far::default();
                            deferred.enqueue([1], drop);
                            flush(&deferred, &mut far);
                            far.got.len()
                        })
                    };
                    let mut far = Far::default();
                    deferred.enqueue([2], drop);
                    flush(&deferred, &mut far);
                    let sent = far.got.len() + other.join().unwrap();
                    assert_eq!(sent, 4, "each message in two parts");
                    assert!(deferred.is_idle());
                });
            }

            /// A queue is closed while it is flushed: everything is accounted for.
            pub fn close() {
                model(3, || {
                    let deferred = Arc::new(Deferred::new(Ring::new(1, false, Ends::new())));
                    let flusher = {
                        let deferred = Arc::clone(&deferred);
                        thread::spawn(move || {
                            deferred.enqueue([1], drop);
                            let mut far = Far::default();
                            deferred.flush(&mut far)
                        })
                    };
                    deferred.close(drop);
                    let at_close = deferred.counters();
                    flusher.join().unwrap();
                    let counters = deferred.counters();
                    assert_eq!(counters.sent, at_close.sent, "sent after the close");
                    assert_eq!(counters.enqueued, 1);
                    assert_eq!(
                        counters.enqueued,
                        counters.sent + counters.dropped_full + counters.dropped_close
                    );
                });
            }
        }
    };
}

rings!(right, weak: None, blind: None);
rings!(weak_producer, weak: Some(Place::Producer), blind: None);
rings!(weak_consumer, weak: Some(Place::Consumer), blind: None);
rings!(weak_sleeper, weak: Some(Place::Sleeper), blind: None);
rings!(weak_feeder, weak: Some(Place::Feeder), blind: None);
rings!(weak_waker, weak: Some(Place::Waker), blind: None);
rings!(weak_flusher, weak: Some(Place::Flusher), blind: None);
rings!(weak_closer, weak: Some(Place::Closer), blind: None);
rings!(blind_producer, weak: None, blind: Some(Place::Producer));
rings!(blind_sleeper, weak: None, blind: Some(Place::Sleeper));
rings!(blind_feeder, weak: None, blind: Some(Place::Feeder));
rings!(blind_flusher, weak: None, blind: Some(Place::Flusher));

#[test]
fn a_stopped_ring_always_has_somebody_to_wake_it() {
    for size in 1..=3 {
        right::stop(size);
    }
}

#[test]
fn a_producer_that_pauses_and_a_consumer_that_sleeps_wake_each_other() {
    right::pause_and_sleep(1, 3);
    right::pause_and_sleep(2, 2);
    right::pause_and_sleep(3, 2);
}

#[test]
fn a_consumer_that_goes_to_sleep_misses_nothing() {
    right::sleep();
}

#[test]
fn of_two_producers_one_finds_no_room_and_is_counted() {
    right::race();
}

#[test]
fn a_pause_on_two_rings_ends_with_either() {
    for size in 1..=3 {
        right::joint(size, 2);
    }
}

#[test]
fn resize_close_and_tail_drop_wake_what_paused() {
    for how in right::BY_FORCE {
        right::force(how);
    }
}

#[test]
fn the_flusher_leaves_no_message() {
    right::flusher(1, 2);
    right::flusher(2, 3);
}

#[test]
fn nothing_overtakes_what_its_sender_queued() {
    right::past();
}

#[test]
fn there_is_one_flusher_at_a_time() {
    right::one_flusher();
}

#[test]
fn a_close_awaits_the_flusher_and_accounts_for_all() {
    right::close();
}

macro_rules! caught {
    ($($test:ident: $model:expr, $expected:literal;)*) => {$(
        #[test]
        #[should_panic(expected = $expected)]
        fn $test() {
            $model;
        }
    )*};
}

caught! {
    stop_without_the_producers_fence_1: weak_producer::stop(1), "nobody to wake it";
    stop_without_the_producers_fence_2: weak_producer::stop(2), "nobody to wake it";
    stop_without_the_producers_fence_3: weak_producer::stop(3), "nobody to wake it";
    stop_without_the_consumers_fence_1: weak_consumer::stop(1), "nobody to wake it";
    stop_without_the_consumers_fence_2: weak_consumer::stop(2), "nobody to wake it";
    stop_without_the_consumers_fence_3: weak_consumer::stop(3), "nobody to wake it";
    stop_without_the_second_look_1: blind_producer::stop(1), "nobody to wake it";
    stop_without_the_second_look_2: blind_producer::stop(2), "nobody to wake it";
    stop_without_the_second_look_3: blind_producer::stop(3), "nobody to wake it";
    sleep_without_the_producers_fence: weak_producer::sleep(), "deadlock";
    sleep_without_the_sleepers_fence: weak_sleeper::sleep(), "deadlock";
    sleep_without_the_second_look: blind_sleeper::sleep(), "deadlock";
    pause_without_the_feeders_fence_1: weak_feeder::joint(1, 2), "deadlock";
    pause_without_the_feeders_fence_2: weak_feeder::joint(2, 2), "deadlock";
    pause_without_the_feeders_fence_3: weak_feeder::joint(3, 2), "deadlock";
    pause_without_the_wakers_fence: weak_waker::joint(1, 2), "deadlock";
    pause_without_the_second_look: blind_feeder::joint(1, 2), "deadlock";
    pause_with_a_look_at_one_ring_only: right::joint(1, 1), "deadlock";
    flush_without_the_enqueuers_fence: weak_producer::flusher(2, 3), "deadlock";
    flush_without_the_flushers_fence: weak_flusher::flusher(2, 3), "deadlock";
    flush_without_the_last_look: blind_flusher::flusher(2, 3), "deadlock";
    close_without_the_closers_fence: weak_closer::close(), "deadlock";
    close_without_the_flushers_fence: weak_flusher::close(), "deadlock";
}
