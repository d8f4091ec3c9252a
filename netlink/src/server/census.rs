//! How many are connected, by user.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use crate::sys::Credentials;

/// How many connections there may be. Descriptors are the scarce thing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Of those who may change state, together. Open vSwitch with per-vport dispatch has one for
    /// each port and handler.
    pub privileged: usize,
    /// Of all others, together.
    pub unprivileged: usize,
    /// Of one of the others.
    pub unprivileged_user: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            privileged: 65_536,
            unprivileged: 512,
            unprivileged_user: 64,
        }
    }
}

/// # Thread safety
/// One lock, held for a few instructions.
#[derive(Debug)]
pub(super) struct Census {
    limits: Limits,
    counts: Mutex<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    privileged: usize,
    unprivileged: usize,
    users: HashMap<u32, usize>,
}

impl Census {
    pub(super) fn new(limits: Limits) -> Self {
        Self {
            limits,
            counts: Mutex::default(),
        }
    }

    /// Counts one more, if the limits allow it.
    pub(super) fn enter(&self, credentials: Credentials, privileged: bool) -> bool {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        if privileged {
            if counts.privileged >= self.limits.privileged {
                return false;
            }
            counts.privileged += 1;
            return true;
        }
        let user = counts.users.get(&credentials.uid).copied().unwrap_or(0);
        if counts.unprivileged >= self.limits.unprivileged || user >= self.limits.unprivileged_user
        {
            return false;
        }
        counts.users.insert(credentials.uid, user + 1);
        counts.unprivileged += 1;
        true
    }

    /// Takes one back that [`Census::enter`] counted.
    pub(super) fn leave(&self, credentials: Credentials, privileged: bool) {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        if privileged {
            counts.privileged = counts.privileged.saturating_sub(1);
            return;
        }
        counts.unprivileged = counts.unprivileged.saturating_sub(1);
        if let Some(user) = counts.users.get_mut(&credentials.uid) {
            *user = user.saturating_sub(1);
            if *user == 0 {
                counts.users.remove(&credentials.uid);
            }
        }
    }
}
