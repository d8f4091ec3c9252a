//! What went wrong with a port: an errno for the protocol, a sentence for people.

use std::fmt;

use rustix::io::Errno;

/// A refusal or failure of a port operation.
///
/// `errno` is what the requester of VPORT_NEW gets (`ENODEV`: no such device; `EINVAL`: a
/// loopback or non-Ethernet device; `EBUSY`, `EEXIST`, `EPERM`, ...). The text says what was tried.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct Error {
    errno: i32,
    what: String,
}

impl Error {
    /// An error with `errno` (positive, as in `libc`), met while doing `what`.
    pub fn new(errno: i32, what: impl Into<String>) -> Self {
        Self {
            errno,
            what: what.into(),
        }
    }

    pub(crate) fn os(errno: Errno, what: impl Into<String>) -> Self {
        Self::new(errno.raw_os_error(), what)
    }

    pub(crate) fn io(error: &std::io::Error, what: impl Into<String>) -> Self {
        Self::new(error.raw_os_error().unwrap_or(libc::EIO), what)
    }

    /// The errno, positive.
    pub fn errno(&self) -> i32 {
        self.errno
    }

    /// Whether the device behind the port is no more (deleted, or in another namespace).
    pub fn is_gone(&self) -> bool {
        matches!(self.errno, libc::ENODEV | libc::ENXIO | libc::EBADFD)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.what, Errno::from_raw_os_error(self.errno))
    }
}
