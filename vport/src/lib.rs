//! vport
