//! ovs-dpd
fn main() {}
