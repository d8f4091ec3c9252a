//! Round trip of a request, and upcalls one way: `cargo run --release -p netlink --example rates`.
//!
//! Server and client are in one process, over the real socket; the handler does nothing. Needs no
//! privilege.
#![allow(clippy::print_stdout)]

use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::time::Instant;

use netlink::family::command;
use netlink::handler::{Answer, Dump, Handler, Lane};
use netlink::hub::UpcallError;
use netlink::message::{Header, flags, upcall_head};
use netlink::transport::{self, Hello, Netns, Welcome};
use netlink::{Config, Errno, Failure, Family, Request, Server};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, recv, send,
};

struct Idle;

impl Handler for Idle {
    fn lane(&self, _: &Request<'_>) -> Lane {
        Lane::Prompt
    }

    fn handle(&self, request: &Request<'_>, answer: &mut Answer<'_>) -> Result<(), Failure> {
        Ok(answer.reply(command::NEW, request.dp_ifindex, |writer| {
            writer.bytes(1, &[0; 100])
        })?)
    }

    fn dump(&self, _: &Request<'_>) -> Result<Box<dyn Dump>, Failure> {
        Err(Errno::EOPNOTSUPP.into())
    }

    fn gone(&self, _: u32) {}

    fn before_sleep(&self) {}
}

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

fn connect(path: &std::path::Path) -> Outcome<(OwnedFd, Welcome)> {
    let kind = SocketType::SEQPACKET;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    let metadata = std::fs::metadata("/proc/thread-self/ns/net")?;
    let netns = Netns {
        dev: metadata.dev(),
        ino: metadata.ino(),
    };
    let hello = Hello {
        version: transport::VERSION,
        protocol: transport::NETLINK_GENERIC,
        netns,
    };
    send(&socket, &hello.to_bytes(), SendFlags::empty())?;
    let mut bytes = [0; transport::WELCOME_LEN];
    recv(&socket, &mut bytes, RecvFlags::empty())?;
    Ok((socket, Welcome::parse(&bytes).ok_or("no welcome")?))
}

fn main() -> Outcome<()> {
    let dir = std::env::temp_dir().join(format!("netlink-rates-{}", std::process::id()));
    let server = Server::bind(Config::new(&dir))?;
    let hub = server.hub();
    let running = server.serve(Arc::new(Idle))?;
    let (socket, welcome) = connect(&dir.join(transport::SOCKET_NAME))?;

    // A flow request as Open vSwitch sends it, with the barrier that the interposer adds.
    let mut ask = Vec::new();
    let kind = Family::Flow.id();
    Header {
        len: 24,
        kind,
        flags: flags::REQUEST,
        seq: 1,
        pid: 0,
    }
    .emit(&mut ask);
    ask.extend_from_slice(&[command::GET, 1, 0, 0, 0, 0, 0, 0]);
    ask.extend_from_slice(&transport::barrier(1));
    let mut room = vec![0; 1 << 17];
    let mut times = Vec::new();
    for _ in 0..50_000 {
        let asked = Instant::now();
        send(&socket, &ask, SendFlags::empty())?;
        recv(&socket, &mut room[..], RecvFlags::empty())?;
        recv(&socket, &mut room[..], RecvFlags::empty())?;
        times.push(asked.elapsed().as_nanos() / 100);
    }
    times.sort_unstable();
    let at = |part: usize| {
        times
            .get(times.len() * part / 1000)
            .map_or(0.0, |t| *t as f64 / 10.0)
    };
    println!(
        "request, reply, barrier: p50 {} us, p99 {} us, p99.9 {} us",
        at(500),
        at(990),
        at(999)
    );

    for len in [64, 1500, 9000] {
        let (sender, port_id) = (hub.clone(), welcome.port_id);
        let worker = std::thread::spawn(move || {
            const SENT: u32 = 300_000;
            let (mut head, packet, mut full) = (Vec::new(), vec![0; len], 0u64);
            for number in 0..SENT {
                let built = upcall_head(&mut head, command::packet::MISS, 1, len, true, |writer| {
                    writer.bytes(2, &[0; 150])
                });
                // A worker would drop it; here it is tried again, to see how fast the reader gets them.
                while built.is_ok()
                    && sender.upcall(port_id, number % 8, &head, &packet) == Err(UpcallError::Full)
                {
                    full += 1;
                    std::thread::yield_now();
                }
            }
            // The last one, which there will be room for at some time.
            head.clear();
            Header {
                len: 16,
                kind: 0x10,
                flags: 0,
                seq: 0,
                pid: 0,
            }
            .emit(&mut head);
            while sender.upcall(port_id, 99, &head, &[]) == Err(UpcallError::Full) {
                std::thread::yield_now();
            }
            full
        });
        let began = Instant::now();
        let (mut received, mut ended) = (0u32, false);
        // What waits behind the last is other sources' backlog.
        loop {
            let idle = if ended {
                RecvFlags::DONTWAIT
            } else {
                RecvFlags::empty()
            };
            match recv(&socket, &mut room[..], idle) {
                Ok((16, _)) => ended |= Header::parse(&room).is_some_and(|h| h.kind == 0x10),
                Ok(_) => received += 1,
                Err(rustix::io::Errno::AGAIN)
                    if hub.clients().iter().all(|client| client.queued == 0) =>
                {
                    break;
                }
                Err(rustix::io::Errno::AGAIN) => std::thread::yield_now(),
                Err(error) => return Err(error.into()),
            }
        }
        let rate = f64::from(received) / began.elapsed().as_secs_f64() / 1000.0;
        let full = worker.join().map_err(|_| "the worker panicked")?;
        println!("upcalls of {len} B: {rate:.0} k/s received, {full} times refused as full");
    }
    running.stop();
    std::fs::remove_dir_all(&dir)?;
    Ok(())
}
