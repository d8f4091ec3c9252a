//! A stream between a peer and a datapath that takes turns with it. Needs root.
#![allow(clippy::unwrap_used, clippy::panic)] // helpers of tests

mod common;

use std::io::Write;
use std::net::TcpListener;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use common::{Netns, eventually, wait};
use frame::Pool;
use vport::RxStatus;
use vport::stream::{Endpoint, StreamOptions, Streams};

/// More than the ring in front of the datapath holds, and less than is read of the connection at once.
const BURST: usize = 1500;

#[test]
fn a_burst_arrives_whole_though_nothing_follows_it() {
    let netns = Netns::new();
    netns.run(|| {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let streams = Streams::default();
        let options = StreamOptions {
            endpoint: Endpoint::Connect(listener.local_addr().unwrap()),
            ring: 64,
            backpressure: false,
        };
        streams.add("s0", &options).unwrap();
        let (mut peer, _) = listener.accept().unwrap();
        let port = streams.port_named("s0").unwrap();
        let mut queue = port.open_queues().unwrap().pop().unwrap();
        eventually("the port is up", || port.link().unwrap().is_up());
        let frame = [&[0, 60][..], &[2; 60]].concat();
        let burst = frame.repeat(BURST);
        let (mut frames, mut pool) = (Vec::new(), Pool::default());
        for round in 0..300 {
            peer.write_all(&burst).unwrap();
            let begin = Instant::now();
            let mut came = 0;
            while came < BURST {
                let status = queue.receive(&mut pool, &mut frames, 32).unwrap();
                let more = !matches!(status, RxStatus::Open { more: false, .. });
                came += frames.len();
                frames.drain(..).for_each(|frame| pool.put(frame));
                let late = begin.elapsed() > Duration::from_secs(3);
                let told = || streams.list().pop();
                assert!(!late, "round {round}: {came} of {BURST}: {:?}", told());
                if !more && came < BURST {
                    wait(std::iter::once(queue.as_fd()), 1000);
                }
            }
        }
    });
}
