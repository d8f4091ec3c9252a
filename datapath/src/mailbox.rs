//! Messages to a thread that sleeps in epoll or poll: a queue, and a descriptor that becomes readable.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::mpsc::{Receiver, Sender, channel};

use rustix::event::{EventfdFlags, eventfd};

/// The writing end; any number of them, each for one thread at a time.
#[derive(Debug)]
pub struct Sending<T> {
    queue: Sender<T>,
    wake: OwnedFd,
}

/// The reading end.
#[derive(Debug)]
pub struct Mailbox<T> {
    queue: Receiver<T>,
    wake: OwnedFd,
}

/// Both ends.
///
/// # Errors
/// No descriptor to be had.
pub fn mailbox<T>() -> std::io::Result<(Sending<T>, Mailbox<T>)> {
    let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    let (sender, receiver) = channel();
    let writing = Sending {
        queue: sender,
        wake: wake.try_clone()?,
    };
    Ok((
        writing,
        Mailbox {
            queue: receiver,
            wake,
        },
    ))
}

impl<T> Sending<T> {
    /// Sends, and wakes the reader. False: the reader is gone.
    pub fn send(&self, message: T) -> bool {
        // An eventfd refuses only at 2^64 - 1 unread wakes, and is readable then.
        let sent = self.queue.send(message).is_ok();
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
        sent
    }

    /// Another writing end.
    ///
    /// # Errors
    /// No descriptor to be had.
    pub fn try_clone(&self) -> std::io::Result<Self> {
        Ok(Self {
            queue: self.queue.clone(),
            wake: self.wake.try_clone()?,
        })
    }
}

impl<T> Mailbox<T> {
    /// The next message, if there is one.
    pub fn next(&self) -> Option<T> {
        self.queue.try_recv().ok()
    }

    /// Makes the descriptor unreadable until the next message. To be called before the messages are
    /// taken, so that none is missed.
    pub fn acknowledge(&self) {
        let mut count = [0; 8];
        // EAGAIN: nothing to acknowledge.
        let _ = rustix::io::read(&self.wake, &mut count);
    }
}

impl<T> AsFd for Mailbox<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}
