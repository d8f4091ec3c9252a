//! Names of the places where a full fence and a second look are needed.

/// Where the fences and second looks are; models leave one of them out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// After a push, before the second look at the next place, at `asleep`, and at the flusher's
    /// role (`deferred`).
    Producer,
    /// After places were freed, before the look at `stopped`.
    Consumer,
    /// After the consumer said that it sleeps, before its second look.
    Sleeper,
    /// After a feeder said that it pauses, before its second look.
    Feeder,
    /// After `stopped` was cleared, before the look at the feeders.
    Waker,
    /// After the flusher's role was given up, before its last look (`deferred`).
    Flusher,
    /// After a queue was closed, before the look whether somebody flushes it (`deferred`).
    Closer,
}
