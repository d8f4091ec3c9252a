//! datapath

pub mod codec;
