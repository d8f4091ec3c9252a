//! The ring itself. See the module above for the contract and the synchronization.

use std::sync::PoisonError;

use super::atomic::{
    AcqRel, Acquire, Arc, AtomicBool, AtomicU64, Mutex, MutexGuard, Relaxed, Release, full_fence,
    looks_again,
};
use super::place::Place;
use super::slot::Slot;

/// How a ring reaches those at its ends. Called without any of the ring's locks held.
pub trait Notify {
    /// The ring was stopped and isn't any more: what feeds it may go on.
    fn resume(&self);
    /// The consumer said that it sleeps, and there is something for it.
    fn work(&self);
}

/// What a ring has counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Items that found a place.
    pub produced: u64,
    /// Items that were taken out.
    pub consumed: u64,
    /// Items handed back since all places were taken.
    pub dropped_full: u64,
    /// Items handed back since the ring was closed.
    pub dropped_close: u64,
    /// How often it told its producers to pause.
    pub stops: u64,
    /// How often it told them to go on. At rest as often.
    pub wakes: u64,
}

/// How a push ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pushed {
    /// Items that found a place.
    pub taken: usize,
    /// Items handed back: no place was free.
    pub full: usize,
    /// Items handed back: the ring is closed.
    pub closed: usize,
}

/// What a consumer that wants to sleep is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sleep {
    /// [`Notify::work`] will wake it.
    Sleep,
    /// There is something: it has to look again.
    Stay,
}

struct Producer<T> {
    slots: Arc<[Slot<T>]>,
    next: usize,
    closed: bool,
}

struct Consumer<T> {
    slots: Arc<[Slot<T>]>,
    next: usize,
    /// Places freed since the ring was stopped.
    freed: usize,
}

/// A bounded ring of `T`. See the module.
pub struct Ring<T, N> {
    producer: Mutex<Producer<T>>,
    consumer: Mutex<Consumer<T>>,
    /// XOFF: whoever feeds it shall pause. Set under the producer's lock only.
    stopped: AtomicBool,
    /// The consumer sleeps, or is about to.
    asleep: AtomicBool,
    /// Whether it stops at all. Changed under the producer's lock.
    backpressure: AtomicBool,
    closed: AtomicBool,
    // Written under the producer's lock ...
    produced: AtomicU64,
    dropped_full: AtomicU64,
    dropped_close: AtomicU64,
    stops: AtomicU64,
    // ... the consumer's, ...
    consumed: AtomicU64,
    // ... and by whoever clears `stopped`.
    wakes: AtomicU64,
    notify: N,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn slots<T>(size: usize) -> Arc<[Slot<T>]> {
    let slots: Vec<_> = (0..size.max(1)).map(|_| Slot::new()).collect();
    Arc::from(slots)
}

/// Clears a flag; true for the one who did.
fn clear(flag: &AtomicBool) -> bool {
    flag.compare_exchange(true, false, AcqRel, Relaxed).is_ok()
}

/// By the count's only writer.
fn add(count: &AtomicU64, n: usize) {
    if n != 0 {
        // Release: whoever sees that items were consumed sees that somebody was about to (`deferred`).
        count.store(count.load(Relaxed) + n as u64, Release);
    }
}

impl<T> Producer<T> {
    fn next_is_taken(&self) -> bool {
        self.slots.get(self.next).is_none_or(Slot::is_taken)
    }
}

impl<T> Consumer<T> {
    fn next_is_taken(&self) -> bool {
        self.slots.get(self.next).is_some_and(Slot::is_taken)
    }
}

impl<T: Send, N: Notify> Ring<T, N> {
    /// A ring of `size` places (at least one), which pauses what feeds it if `backpressure` is set.
    pub fn new(size: usize, backpressure: bool, notify: N) -> Self {
        let slots = slots(size);
        Self {
            producer: Mutex::new(Producer {
                slots: Arc::clone(&slots),
                next: 0,
                closed: false,
            }),
            consumer: Mutex::new(Consumer {
                slots,
                next: 0,
                freed: 0,
            }),
            stopped: AtomicBool::new(false),
            asleep: AtomicBool::new(false),
            backpressure: AtomicBool::new(backpressure),
            closed: AtomicBool::new(false),
            produced: AtomicU64::new(0),
            dropped_full: AtomicU64::new(0),
            dropped_close: AtomicU64::new(0),
            stops: AtomicU64::new(0),
            consumed: AtomicU64::new(0),
            wakes: AtomicU64::new(0),
            notify,
        }
    }

    /// Puts items in, in order; those without a place are given to `refuse`.
    pub fn push(&self, items: impl IntoIterator<Item = T>, mut refuse: impl FnMut(T)) -> Pushed {
        let mut pushed = Pushed::default();
        let mut side = lock(&self.producer);
        for item in items {
            if side.closed {
                pushed.closed += 1;
                refuse(item);
                continue;
            }
            match Self::put(&side, item) {
                Ok(()) => {
                    pushed.taken += 1;
                    side.next = (side.next + 1) % side.slots.len();
                }
                Err(item) => {
                    pushed.full += 1;
                    refuse(item);
                }
            }
        }
        add(&self.produced, pushed.taken);
        add(&self.dropped_full, pushed.full);
        add(&self.dropped_close, pushed.closed);
        let full = !side.closed && self.backpressure.load(Relaxed) && side.next_is_taken();
        if full && !self.stopped.load(Relaxed) {
            self.stopped.store(true, Release);
            add(&self.stops, 1);
        }
        full_fence(Place::Producer);
        let lifted = full && looks_again(Place::Producer) && !side.next_is_taken() && self.lift();
        let work = pushed.taken != 0 && self.takes_awake();
        drop(side);
        if lifted {
            self.notify.resume();
        }
        if work {
            self.notify.work();
        }
        pushed
    }

    #[allow(unsafe_code)] // see `slot`
    fn put(side: &Producer<T>, item: T) -> Result<(), T> {
        match side.slots.get(side.next) {
            // SAFETY: the producer's lock is held, so no other `put` runs.
            Some(slot) => unsafe { slot.put(item) },
            None => Err(item),
        }
    }

    #[allow(unsafe_code)] // see `slot`
    fn take(side: &Consumer<T>) -> Option<T> {
        let slot = side.slots.get(side.next)?;
        // SAFETY: the consumer's lock is held, so no other `take` runs.
        unsafe { slot.take() }
    }

    /// Takes out up to `max` items, in order, as long as `take` says that it wants more. Gives how many.
    pub fn pop(&self, max: usize, mut take: impl FnMut(T) -> bool) -> usize {
        let mut side = lock(&self.consumer);
        let mut count = 0;
        while count < max
            && let Some(item) = Self::take(&side)
        {
            side.next = (side.next + 1) % side.slots.len();
            count += 1;
            if !take(item) {
                break;
            }
        }
        if count == 0 {
            return 0;
        }
        add(&self.consumed, count);
        full_fence(Place::Consumer);
        let mut lifted = false;
        if self.stopped.load(Relaxed) {
            side.freed += count;
            if side.freed >= side.slots.len().div_ceil(2) || !side.next_is_taken() {
                side.freed = 0;
                lifted = self.lift();
            }
        } else {
            side.freed = 0;
        }
        drop(side);
        if lifted {
            self.notify.resume();
        }
        count
    }

    /// The consumer is about to sleep: wakes what feeds the ring if it was stopped, announces the sleep, and
    /// looks again.
    pub fn announce_sleep(&self) -> Sleep {
        let side = lock(&self.consumer);
        self.asleep.store(true, Relaxed);
        full_fence(Place::Sleeper);
        if looks_again(Place::Sleeper) && side.next_is_taken() {
            self.asleep.store(false, Relaxed);
            return Sleep::Stay;
        }
        let stopped = self.stopped.load(Acquire);
        if stopped && side.next_is_taken() {
            // It was filled and stopped just now: there is nothing to be rescued.
            self.asleep.store(false, Relaxed);
            return Sleep::Stay;
        }
        let lifted = stopped && self.lift();
        drop(side);
        if lifted {
            self.notify.resume();
        }
        Sleep::Sleep
    }

    /// Whether whatever feeds the ring shall pause.
    #[inline]
    pub fn is_stopped(&self) -> bool {
        // Acquire: whoever sees that it goes on sees the places that were freed.
        self.stopped.load(Acquire)
    }

    /// Whether there is nothing to be taken out. For the consumer, after a fence of its own.
    pub fn is_empty(&self) -> bool {
        !lock(&self.consumer).next_is_taken()
    }

    /// Whether all that this thread has put in is out again. Takes no lock.
    #[inline]
    pub fn is_drained(&self) -> bool {
        // In this order: what is produced meanwhile makes it false, never true.
        self.consumed.load(Acquire) == self.produced.load(Acquire)
    }

    /// Items in it. Exact at rest.
    pub fn len(&self) -> usize {
        let consumed = self.consumed.load(Acquire);
        let produced = self.produced.load(Acquire);
        usize::try_from(produced.saturating_sub(consumed)).unwrap_or(usize::MAX)
    }

    /// Places, taken or not.
    pub fn size(&self) -> usize {
        lock(&self.producer).slots.len()
    }

    /// Places that are free at least, for the only producer of a ring.
    pub fn room(&self) -> usize {
        let side = lock(&self.producer);
        if side.next_is_taken() {
            return 0;
        }
        side.slots.len().saturating_sub(self.len()).max(1)
    }

    /// Whether it stops what feeds it.
    pub fn has_backpressure(&self) -> bool {
        self.backpressure.load(Relaxed)
    }

    /// Turns back-pressure on or off; off, whatever paused goes on.
    pub fn set_backpressure(&self, on: bool) {
        let side = lock(&self.producer);
        self.backpressure.store(on, Relaxed);
        drop(side);
        self.force_wake();
    }

    /// Gives the ring `size` places (at least one). What it holds stays, in order; what doesn't fit into a
    /// smaller one is given to `refuse`, the newest first to go, and counts as
    /// [`dropped_full`](Counters::dropped_full). Whatever paused goes on.
    pub fn resize(&self, size: usize, mut refuse: impl FnMut(T)) {
        let mut producer = lock(&self.producer);
        let mut consumer = lock(&self.consumer);
        let mut held = Vec::new();
        while let Some(item) = Self::take(&consumer) {
            consumer.next = (consumer.next + 1) % consumer.slots.len();
            held.push(item);
        }
        let fresh = slots(size);
        producer.slots = Arc::clone(&fresh);
        producer.next = 0;
        consumer.slots = fresh;
        consumer.next = 0;
        consumer.freed = 0;
        let mut lost = 0;
        for item in held {
            match Self::put(&producer, item) {
                Ok(()) => producer.next = (producer.next + 1) % producer.slots.len(),
                Err(item) => {
                    lost += 1;
                    refuse(item);
                }
            }
        }
        // They were produced and never consumed: they become items that found no place.
        self.produced
            .store(self.produced.load(Relaxed).saturating_sub(lost), Relaxed);
        self.dropped_full
            .store(self.dropped_full.load(Relaxed) + lost, Relaxed);
        drop(consumer);
        drop(producer);
        self.force_wake();
    }

    /// Takes nothing any more. What it holds can still be taken out. Whatever paused goes on, and so does a
    /// consumer that sleeps.
    pub fn close(&self) {
        let mut side = lock(&self.producer);
        side.closed = true;
        self.closed.store(true, Release);
        drop(side);
        self.force_wake();
        if self.takes_awake() {
            self.notify.work();
        }
    }

    /// Whether [`close`](Self::close) was called.
    pub fn is_closed(&self) -> bool {
        self.closed.load(Acquire)
    }

    /// What it has counted.
    pub fn counters(&self) -> Counters {
        Counters {
            consumed: self.consumed.load(Acquire),
            produced: self.produced.load(Acquire),
            dropped_full: self.dropped_full.load(Relaxed),
            dropped_close: self.dropped_close.load(Relaxed),
            wakes: self.wakes.load(Acquire),
            stops: self.stops.load(Acquire),
        }
    }

    /// The ends' way out.
    pub fn notify(&self) -> &N {
        &self.notify
    }

    fn force_wake(&self) {
        if self.lift() {
            self.notify.resume();
        }
    }

    /// Clears the stop. True for one caller only, who then tells the feeders.
    fn lift(&self) -> bool {
        if !clear(&self.stopped) {
            return false;
        }
        self.wakes.fetch_add(1, Relaxed);
        full_fence(Place::Waker);
        true
    }

    /// Whether the consumer sleeps, and is now to be woken. True for one caller only.
    fn takes_awake(&self) -> bool {
        self.asleep.load(Relaxed) && clear(&self.asleep)
    }
}

impl<T, N> std::fmt::Debug for Ring<T, N> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring").finish_non_exhaustive()
    }
}
