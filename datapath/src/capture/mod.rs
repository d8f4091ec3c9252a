//! Captures: copies of packets for whoever looks on, taken without making any packet wait.
//!
//! # Contract
//! While nobody captures, an executor does one relaxed load a batch. While somebody does, it copies the
//! packets asked for and offers them, batch by batch, to a queue of [`HELD`] bytes; what doesn't fit is
//! counted as lost by the capture, and never copied once the queue is full. Packets of a batch that are
//! counted as dropped say so, with the reason. Those of one executor come in order.
//!
//! # Thread safety
//! Executors see the list of captures as a snapshot, taken once a batch; one more or one less is a new
//! list. A capture may get records for a moment after it was asked for; none after it ended.

mod tap;

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use frame::GsoKind;
use serde::{Deserialize, Serialize};

use crate::drop_reason::DropReason;

pub use tap::Tap;

/// Captures at a time.
pub const MOST: usize = 8;
/// Bytes that wait for a capture's reader.
pub const HELD: usize = 16 << 20;
/// Batches that wait for a capture's reader.
const BATCHES: usize = 16 * 1024;
/// What a record takes besides its bytes, about.
const OVERHEAD: usize = 128;

/// What somebody wants to see.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wish {
    /// Of which port, by its device's name; None: of all.
    pub port: Option<String>,
    /// What comes out of the port.
    pub received: bool,
    /// What is given to the port.
    pub transmitted: bool,
    /// What is dropped on the way from the port, or because the port doesn't take it.
    pub dropped: bool,
    /// Bytes of each packet, at most.
    pub snaplen: u32,
}

/// Where a copy was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// As it came out of the port.
    Received,
    /// As it was given to the port.
    Transmitted,
    /// As it was dropped on its way.
    Dropped,
}

/// A port, as records name it.
#[derive(Debug, PartialEq, Eq)]
pub struct PortLabel {
    /// The datapath's name.
    pub datapath: String,
    /// The device's name; `-` for packets that were executed without a port.
    pub name: String,
    /// The datapath's number of it.
    pub number: u32,
    /// The driver.
    pub driver: &'static str,
}

/// A copy of a packet.
#[derive(Debug)]
pub struct Record {
    /// Where.
    pub event: Event,
    /// Which port's.
    pub port: Arc<PortLabel>,
    /// Nanoseconds since 1970, of the batch.
    pub time_ns: u64,
    /// Why it was dropped, if it was dropped.
    pub reason: Option<DropReason>,
    /// Length in bytes, tags included; of a packet to be segmented, the whole's.
    pub length: usize,
    /// The first of them, with an Ethernet header in front in any case.
    pub bytes: Box<[u8]>,
    /// The Ethernet header is ours: the packet had none.
    pub headless: bool,
    /// Its TCP or UDP checksum is to be filled in by who sends it on.
    pub partial_checksum: bool,
    /// It stands for several: of what kind, with so many bytes of payload each.
    pub gso: Option<(GsoKind, u16)>,
}

/// All captures of a daemon.
#[derive(Debug, Default)]
pub struct Captures {
    /// Whether there are any: what executors look at.
    active: AtomicBool,
    sessions: ArcSwap<Vec<Arc<Session>>>,
    change: Mutex<()>,
}

/// What a capture and the executors share.
#[derive(Debug)]
struct Session {
    wish: Wish,
    queue: SyncSender<Vec<Arc<Record>>>,
    held: AtomicUsize,
    lost: AtomicU64,
}

/// A capture in progress. Ends when dropped.
#[derive(Debug)]
pub struct Capture {
    captures: Arc<Captures>,
    session: Arc<Session>,
    queue: Receiver<Vec<Arc<Record>>>,
}

/// There are [`MOST`] captures already.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{MOST} captures are in progress, and that is the most there can be")]
pub struct TooMany;

impl Captures {
    /// Begins a capture.
    ///
    /// # Errors
    /// There are too many.
    pub fn begin(self: &Arc<Self>, wish: Wish) -> Result<Capture, TooMany> {
        let (queue, reader) = sync_channel(BATCHES);
        let session = Arc::new(Session {
            wish,
            queue,
            held: AtomicUsize::new(0),
            lost: AtomicU64::new(0),
        });
        let _one_at_a_time = self.change.lock().unwrap_or_else(PoisonError::into_inner);
        let mut sessions = Vec::clone(&self.sessions.load());
        if sessions.len() >= MOST {
            return Err(TooMany);
        }
        sessions.push(Arc::clone(&session));
        self.replace(sessions);
        Ok(Capture {
            captures: Arc::clone(self),
            session,
            queue: reader,
        })
    }

    /// How many are in progress.
    pub fn len(&self) -> usize {
        self.sessions.load().len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn end(&self, session: &Arc<Session>) {
        let _one_at_a_time = self.change.lock().unwrap_or_else(PoisonError::into_inner);
        let mut sessions = Vec::clone(&self.sessions.load());
        sessions.retain(|other| !Arc::ptr_eq(other, session));
        self.replace(sessions);
    }

    fn replace(&self, sessions: Vec<Arc<Session>>) {
        let any = !sessions.is_empty();
        self.sessions.store(Arc::new(sessions));
        // A hint: who reads it too early or too late misses the first packets, or finds an empty list.
        self.active.store(any, Relaxed);
    }
}

impl Session {
    /// Whether the reader has let the queue fill up.
    fn is_full(&self) -> bool {
        self.held.load(Relaxed) >= HELD
    }

    fn offer(&self, records: Vec<Arc<Record>>) {
        if records.is_empty() {
            return;
        }
        let (count, size) = (records.len() as u64, size(&records));
        self.held.fetch_add(size, Relaxed);
        if self.queue.try_send(records).is_err() {
            self.held.fetch_sub(size, Relaxed);
            self.lost.fetch_add(count, Relaxed);
        }
    }
}

fn size(records: &[Arc<Record>]) -> usize {
    let sizes = records.iter().map(|record| record.bytes.len() + OVERHEAD);
    sizes.sum()
}

impl Capture {
    /// What was asked for.
    pub fn wish(&self) -> &Wish {
        &self.session.wish
    }

    /// The next records, or none within that time.
    pub fn next(&self, patience: Duration) -> Vec<Arc<Record>> {
        match self.queue.recv_timeout(patience) {
            Ok(records) => {
                self.session.held.fetch_sub(size(&records), Relaxed);
                records
            }
            // The other end is ours too, so it can't be gone.
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => Vec::new(),
        }
    }

    /// Takes no more; what was taken can still be read.
    pub fn stop(&self) {
        self.captures.end(&self.session);
    }

    /// Packets that the reader was too slow for.
    pub fn lost(&self) -> u64 {
        self.session.lost.load(Relaxed)
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.stop();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wish() -> Wish {
        Wish {
            port: None,
            received: true,
            transmitted: true,
            dropped: true,
            snaplen: 64,
        }
    }

    fn record(len: usize) -> Arc<Record> {
        Arc::new(Record {
            event: Event::Received,
            port: Arc::new(PortLabel {
                datapath: "dp".to_owned(),
                name: "p".to_owned(),
                number: 1,
                driver: "tap",
            }),
            time_ns: 0,
            reason: None,
            length: len,
            bytes: vec![0; len].into(),
            headless: false,
            partial_checksum: false,
            gso: None,
        })
    }

    #[test]
    fn captures_are_counted_and_bounded() {
        let captures = Arc::new(Captures::default());
        let mut all: Vec<_> = (0..MOST).map(|_| captures.begin(wish()).unwrap()).collect();
        assert_eq!(captures.begin(wish()).unwrap_err(), TooMany);
        assert!(captures.active.load(Relaxed));
        all.pop();
        assert_eq!(captures.len(), MOST - 1);
        all.clear();
        assert!(captures.is_empty() && !captures.active.load(Relaxed));
    }

    #[test]
    fn what_a_reader_is_too_slow_for_is_lost_and_counted() {
        let captures = Arc::new(Captures::default());
        let capture = captures.begin(wish()).unwrap();
        let session = Arc::clone(&capture.session);
        for _ in 0..BATCHES + 5 {
            session.offer(vec![record(1), record(2)]);
        }
        assert_eq!(capture.lost(), 10);
        let mut read = 0;
        loop {
            let records = capture.next(Duration::ZERO);
            if records.is_empty() {
                break;
            }
            read += records.len();
        }
        assert_eq!(read, 2 * BATCHES);
        assert_eq!(session.held.load(Relaxed), 0);
        session.offer(vec![record(HELD)]);
        assert!(session.is_full());
    }
}
