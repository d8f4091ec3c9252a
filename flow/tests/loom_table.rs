//! The table's index and slots under a model checker, which tries the interleavings of two threads and
//! what weak memory lets each of them see. The sources are the table's own, with the checker's atomics.
//!
//! `RUSTFLAGS="--cfg loom" cargo test -p flow --test loom_table --release`
//!
//! That the models can fail is part of the run: the same sources with every Release made Relaxed, and
//! with every Acquire made Relaxed, must be caught.
//!
//! What the checker can't see: the epoch, which it takes as given (what is retired is kept until the
//! readers are done, as a pin does); the tree over masks; overflow to neighbour buckets.
#![cfg(loom)]
#![allow(unsafe_code)] // the promise of `Zeroed`, which the sources under test ask for
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

/// What the sources call `crate::flow`.
pub mod flow {
    pub struct Flow {
        pub slot: u32,
        pub number: u32,
    }
}

macro_rules! table {
    ($name:ident, $acquire:ident, $release:ident, $both:ident) => {
        #[path = "."]
        #[allow(dead_code, unused_imports, unreachable_pub)]
        mod $name {
            pub mod atomic {
                #![allow(non_upper_case_globals)]
                use loom::sync::atomic::Ordering;
                pub use loom::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, AtomicUsize};

                pub const Relaxed: Ordering = Ordering::Relaxed;
                pub const Acquire: Ordering = Ordering::$acquire;
                pub const Release: Ordering = Ordering::$release;
                pub const AcqRel: Ordering = Ordering::$both;

                pub use loom::cell::UnsafeCell as SharedCell;
            }
            pub mod zeroed {
                use std::ops::Deref;

                /// # Safety
                /// None needed here: slices are made of defaults.
                pub unsafe trait Zeroed: Default {}
                // SAFETY: as above.
                unsafe impl Zeroed for super::index::Bucket {}

                pub struct ZeroedSlice<T>(Box<[T]>);
                impl<T: Zeroed> ZeroedSlice<T> {
                    pub fn new(len: usize) -> Self {
                        Self((0..len).map(|_| T::default()).collect())
                    }
                }
                impl<T> Deref for ZeroedSlice<T> {
                    type Target = [T];
                    fn deref(&self) -> &[T] {
                        &self.0
                    }
                }
            }
            pub mod reclaim {
                use std::any::Any;
                use std::sync::Arc;

                /// Kept until the model ends: the epoch is taken as given.
                pub struct Garbage(Arc<dyn Any>);
                impl Garbage {
                    pub fn new<T: Send + Sync + 'static>(last: Arc<T>) -> Self {
                        Self(last)
                    }
                }
            }
            #[path = "../src/table/index.rs"]
            pub mod index;
            #[path = "../src/table/prefetch.rs"]
            pub mod prefetch;
            #[path = "../src/table/protected.rs"]
            pub mod protected;
            #[path = "../src/table/slots.rs"]
            pub mod slots;

            use crate::flow::Flow;
            use index::Index;
            use loom::thread;
            use slots::Slots;
            use std::num::NonZeroU64;
            use std::sync::Arc;
            use std::sync::atomic::{AtomicUsize, Ordering};

            const HASH: u32 = 0x5500_0000;

            struct Table {
                slots: Arc<Slots>,
                index: Index,
            }

            impl Table {
                fn new() -> Arc<Self> {
                    Arc::new(Self {
                        slots: Arc::new(Slots::new()),
                        index: Index::new(),
                    })
                }

                /// Install flow `number`: as the table's writer does.
                fn insert(
                    &self,
                    number: u32,
                    hash: u32,
                    garbage: &mut Vec<reclaim::Garbage>,
                ) -> u32 {
                    let flow = Flow { slot: 0, number };
                    let birth = NonZeroU64::new(u64::from(number)).unwrap();
                    let slot = self.slots.insert(flow, birth).ok().unwrap().slot;
                    // The flow that is there before has the other hash.
                    let hash_of = |other| Some(if other == slot { hash } else { HASH });
                    self.index.insert(hash, slot, hash_of, garbage);
                    slot
                }

                /// The number of the flow that a packet with this hash finds, if it is one of these.
                fn find(&self, hash: u32, numbers: &[u32]) -> Option<u32> {
                    self.index.find(hash, |slot| {
                        let (_, flow) = self.slots.get(slot)?;
                        assert_eq!(flow.slot, slot, "a flow that is half written");
                        numbers.contains(&flow.number).then_some(flow.number)
                    })
                }
            }

            impl Table {
                /// As a dump sees it: slot after slot.
                fn walk(&self) -> Vec<u32> {
                    let slots =
                        (0..self.slots.high()).filter_map(|at| Some((at, self.slots.get(at)?)));
                    slots
                        .map(|(at, (birth, flow))| {
                            assert_eq!(flow.slot, at, "a flow that is half written");
                            assert_eq!(birth.get(), u64::from(flow.number), "another flow's birth");
                            flow.number
                        })
                        .collect()
                }
            }

            fn model(check: impl Fn() + Sync + Send + 'static) {
                let mut builder = loom::model::Builder::new();
                builder.preemption_bound = Some(3);
                let runs = Arc::new(AtomicUsize::new(0));
                let count = Arc::clone(&runs);
                builder.check(move || {
                    count.fetch_add(1, Ordering::Relaxed);
                    check();
                });
                let runs = runs.load(Ordering::Relaxed);
                println!("{runs} interleavings");
                assert!(
                    runs > 10,
                    "only {runs} interleavings: does the model share anything?"
                );
            }

            /// A flow that is being installed is found whole or not at all.
            pub fn publish() {
                model(|| {
                    let table = Table::new();
                    let reader = {
                        let table = Arc::clone(&table);
                        thread::spawn(move || (table.walk(), table.find(HASH, &[1])))
                    };
                    let mut garbage = Vec::new();
                    table.insert(1, HASH, &mut garbage);
                    assert_eq!(table.find(HASH, &[1]), Some(1), "seen when insert returns");
                    reader.join().unwrap();
                });
            }

            /// A flow that is there is found at any time while the index grows into another array.
            pub fn growth() {
                model(|| {
                    let (table, mut garbage) = (Table::new(), Vec::new());
                    table.insert(1, HASH, &mut garbage);
                    let reader = {
                        let table = Arc::clone(&table);
                        thread::spawn(move || table.find(HASH, &[1]))
                    };
                    table.insert(2, 0x6600_0000, &mut garbage);
                    assert_eq!(
                        reader.join().unwrap(),
                        Some(1),
                        "lost while the index grows"
                    );
                });
            }

            /// A flow is taken out while a reader may have it, and another one installed in its slot once
            /// that reader is done, while a second reader looks.
            pub fn reuse() {
                model(|| {
                    let (table, mut garbage) = (Table::new(), Vec::new());
                    let slot = table.insert(1, HASH, &mut garbage);
                    let first = {
                        let table = Arc::clone(&table);
                        thread::spawn(move || table.find(HASH, &[1]))
                    };
                    let vacated = {
                        let (_, flow) = table.slots.get(slot).unwrap();
                        let removed = table.index.remove(HASH, slot, |_| Some(HASH), &mut garbage);
                        assert!(removed);
                        table.slots.take(flow).unwrap()
                    };
                    // The end of the first reader's pin.
                    first.join().unwrap();
                    let second = {
                        let table = Arc::clone(&table);
                        thread::spawn(move || (table.find(HASH, &[1, 2]), table.walk()))
                    };
                    drop(vacated);
                    assert_eq!(
                        table.insert(2, HASH, &mut garbage),
                        slot,
                        "the slot is used again"
                    );
                    let (found, walked) = second.join().unwrap();
                    let mut seen = found.into_iter().chain(walked);
                    assert!(seen.all(|number| number == 2), "a flow that has gone");
                });
            }
        }
    };
}

table!(right, Acquire, Release, AcqRel);
table!(without_release, Acquire, Relaxed, Acquire);
table!(without_acquire, Relaxed, Release, Release);

#[test]
fn a_flow_is_found_whole_or_not_at_all() {
    right::publish();
}

#[test]
fn a_flow_is_found_while_the_index_grows() {
    right::growth();
}

#[test]
fn a_slot_is_used_again_only_unseen() {
    right::reuse();
}

#[test]
#[should_panic(expected = "Causality violation")]
fn publishing_without_release_is_caught() {
    without_release::publish();
}

#[test]
#[should_panic(expected = "Causality violation")]
fn publishing_without_acquire_is_caught() {
    without_acquire::publish();
}

#[test]
#[should_panic(expected = "Causality violation")]
fn growing_without_release_is_caught() {
    without_release::growth();
}

#[test]
#[should_panic(expected = "Causality violation")]
fn growing_without_acquire_is_caught() {
    without_acquire::growth();
}

#[test]
#[should_panic(expected = "Causality violation")]
fn reuse_without_release_is_caught() {
    without_release::reuse();
}
