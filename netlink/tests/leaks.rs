//! Alone in its process, since it counts the process's descriptors and threads.

// Clippy knows only #[test] functions as tests.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;

use common::{Client, Fixture, dial, request};
use netlink::family::command;
use netlink::message::flags;
use netlink::transport::ControlOp;
use netlink::{Family, Group};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

fn entries(directory: &str) -> usize {
    std::fs::read_dir(directory).unwrap().count()
}

#[test]
fn descriptors_and_threads_come_back() {
    let (descriptors, threads) = (entries("/proc/self/fd"), entries("/proc/self/task"));
    let mut fixture = Fixture::new();
    let serving = entries("/proc/self/fd");
    for round in 0..200 {
        let mut client = fixture.client();
        client.control(ControlOp::AddMembership, Group::Vport.id());
        match round % 4 {
            // What earlier rounds' ports still notify may be among the answers.
            0 => drop(client.converse(&[])),
            1 => {
                let ask = flags::REQUEST | flags::DUMP;
                client.ask(&[request(Family::Flow, command::GET, ask, 1, 900)]);
            }
            2 => {
                let ask = flags::REQUEST | flags::ACK;
                client.ask(&[request(Family::Vport, command::NEW, ask, 1, 2)]);
            }
            _ => {
                // Descriptors that nobody asked for.
                let fds = [client.socket.as_fd()];
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
                let mut control = SendAncillaryBuffer::new(&mut space);
                assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
                let bytes = request(Family::Flow, command::NEW, flags::REQUEST, 1, 1);
                let parts = [IoSlice::new(&bytes)];
                let none = SendFlags::empty();
                rustix::net::sendmsg(&client.socket, &parts, &mut control, none).unwrap();
                client.converse(&[]);
            }
        }
        drop(dial(&fixture.dir.0).unwrap());
        drop(client);
    }
    fixture.until("all gone", || fixture.hub.clients().is_empty());
    fixture.until("descriptors are closed", || {
        entries("/proc/self/fd") == serving
    });
    let many: Vec<Client> = (0..300).map(|_| fixture.client()).collect();
    fixture.running.take().unwrap().stop();
    drop(many);
    assert_eq!(entries("/proc/self/fd"), descriptors);
    // A thread that was joined leaves /proc a moment later.
    fixture.until("threads have ended", || {
        entries("/proc/self/task") == threads
    });
}
