//! hide
