//! The run directory: one daemon at a time, whoever else is about.

// Clippy knows only #[test] functions as tests.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::fs::{self, File};
use std::io::ErrorKind;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use common::{Fixture, RunDir};
use netlink::server::BindError;
use netlink::{Config, Server};

/// A lock file that is removed while somebody waits to lock it is the lock of nothing.
#[test]
fn two_never_hold_a_directory_that_is_emptied_again_and_again() {
    let dir = RunDir::new();
    let (holders, held) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let end = Instant::now() + Duration::from_secs(2);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while Instant::now() < end {
                    match Server::bind(Config::new(&dir.0)) {
                        Ok(server) => {
                            assert_eq!(holders.fetch_add(1, Ordering::SeqCst), 0, "two at a time");
                            held.fetch_add(1, Ordering::SeqCst);
                            holders.fetch_sub(1, Ordering::SeqCst);
                            server.remove().unwrap();
                        }
                        Err(BindError::Occupied { .. }) => {}
                        Err(error) => panic!("{error}"),
                    }
                }
            });
        }
    });
    assert!(held.into_inner() > 100);
    assert_eq!(fs::read_dir(&dir.0).unwrap().count(), 0);
}

/// Whoever can open the lock file can lock it, and so keep the next daemon from starting.
#[test]
fn another_user_cannot_take_the_lock() {
    let fixture = Fixture::new();
    let path = fixture.dir.0.join("ovs-dpd.lock");
    let opened = std::thread::spawn(move || {
        let nobody = rustix::process::Uid::from_raw(65534);
        rustix::thread::set_thread_res_uid(nobody, nobody, nobody)
            .expect("this test needs root, to become another user");
        File::open(path).map(drop)
    });
    let error = opened.join().unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::PermissionDenied);
}
