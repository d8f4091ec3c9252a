//! What the host's traffic control classifies a frame by.

/// Priority and mark, as a Linux packet carries them beside its bytes. Zero: none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Class {
    /// `SO_PRIORITY`: chooses the class of a queueing discipline (linux-htb, ...).
    pub priority: u32,
    /// `SO_MARK`: for filters.
    pub mark: u32,
}

impl Class {
    /// Whether there is nothing to tell.
    pub const fn is_plain(self) -> bool {
        self.priority == 0 && self.mark == 0
    }
}
