//! The kernel's nouns, one a file.
#![allow(unsafe_code)] // sockets options, ioctls, bpf(2) and recvmmsg have no safe wrapper elsewhere
