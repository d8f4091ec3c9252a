//! Protocols beside generic netlink, through a client without a socket.

#![allow(clippy::panic, clippy::unwrap_used)] // these are tests

mod common;

use common::error_of;
use netlink::handler::{DumpPart, Fit};
use netlink::message::{Header, flags};
use netlink::service::{Answer, Request, Served};
use netlink::{
    Dump, Errno, Failure, Handler, Hub, Lane, Loopback, Protocol, Service, service, transport,
};

const NEW: u16 = 16;
const GET: u16 = 18;
const BREAKS: u16 = 19;

/// Answers its own request types; its dump pauses, then counts to `0`.
struct Links;

impl Service for Links {
    fn lane(&self, _: &Request<'_>) -> Lane {
        Lane::MaySleep
    }

    fn needs_privilege(&self, request: &Request<'_>) -> bool {
        request.kind != GET
    }

    fn is_dump(&self, request: &Request<'_>) -> bool {
        request.kind == GET && request.has(flags::DUMP)
    }

    fn handle(&self, request: &Request<'_>, answer: &mut Answer<'_>) -> Result<Served, Failure> {
        let (fixed, attributes) = request.split::<16>()?;
        match request.kind {
            NEW => Ok(Served::NotOurs),
            GET => {
                // A reply that fails leaves nothing behind.
                assert!(answer.reply(GET, &[], |_| Err(Errno::ENOSPC)).is_err());
                answer.reply(NEW, fixed, |writer| {
                    writer.raw(attributes);
                    Ok(())
                })?;
                Ok(Served::Done)
            }
            BREAKS => panic!("on purpose"),
            _ => Err(Failure::from(Errno::EOPNOTSUPP).message("no such thing")),
        }
    }

    fn dump(&self, _: &Request<'_>) -> Result<Box<dyn Dump>, Failure> {
        Ok(Box::new(Countdown(3)))
    }
}

struct Countdown(u8);

impl Dump for Countdown {
    fn fill(&mut self, part: &mut DumpPart<'_>) -> Result<bool, Errno> {
        if self.0 == 3 {
            self.0 = 2;
            part.pause();
            return Ok(false);
        }
        while let Some(next) = self.0.checked_sub(1) {
            let fit = part.record(NEW, &[next], |_| Ok(()))?;
            assert_eq!(fit, Fit::Written);
            self.0 = next;
        }
        Ok(true)
    }
}

struct OnlyLinks(Links);

impl Handler for OnlyLinks {
    fn lane(&self, _: &netlink::Request<'_>) -> Lane {
        Lane::Prompt
    }

    fn handle(&self, _: &netlink::Request<'_>, _: &mut netlink::Answer<'_>) -> Result<(), Failure> {
        Err(Errno::EIO.into())
    }

    fn dump(&self, _: &netlink::Request<'_>) -> Result<Box<dyn Dump>, Failure> {
        Err(Errno::EIO.into())
    }

    fn gone(&self, _: u32) {}

    fn before_sleep(&self) {}

    fn service(&self, protocol: Protocol) -> Option<&dyn Service> {
        (protocol == Protocol::Route).then_some(&self.0 as &dyn Service)
    }
}

fn request(kind: u16, more: u16, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    Header {
        len: 16 + payload.len() as u32,
        kind,
        flags: flags::REQUEST | more,
        seq: 7,
        pid: 0,
    }
    .emit(&mut bytes);
    bytes.extend(payload);
    bytes
}

fn exchange(privileged: bool, datagram: &[u8]) -> Vec<Vec<u8>> {
    let client = Loopback {
        privileged,
        protocol: Protocol::Route,
        ..Loopback::new(Hub::default(), 5)
    };
    client.exchange(&OnlyLinks(Links), datagram)
}

#[test]
fn a_reply_has_the_requests_number_and_its_ack_behind() {
    let payload = [&[9; 16][..], &[8, 0, 1, 0, 1, 2, 3, 4]].concat();
    let said = exchange(false, &request(GET, flags::ACK, &payload));
    let [reply, ack] = &said[..] else {
        panic!("{said:x?}")
    };
    let header = Header::parse(reply).unwrap();
    assert_eq!((header.kind, header.seq, header.pid), (NEW, 7, 5));
    assert_eq!(
        (header.len as usize, &reply[16..]),
        (reply.len(), &payload[..])
    );
    assert_eq!(error_of(ack), 0);
}

#[test]
fn a_request_that_is_the_kernels_has_that_for_its_only_answer() {
    let said = exchange(true, &request(NEW, flags::ACK, &[0; 16]));
    assert_eq!(said.len(), 1);
    assert!(transport::is_not_ours(&said[0]));
}

#[test]
fn what_fails_says_why() {
    let error = |privileged, kind, payload: &[u8]| {
        let said = exchange(privileged, &request(kind, 0, payload));
        assert_eq!(said.len(), 1);
        error_of(&said[0])
    };
    assert_eq!(error(false, NEW, &[0; 16]), -libc::EPERM);
    assert_eq!(error(true, NEW, &[0; 15]), -libc::EINVAL);
    assert_eq!(error(true, 77, &[0; 16]), -libc::EOPNOTSUPP);
    assert_eq!(error(true, BREAKS, &[0; 16]), -libc::EIO);
    // A control type is only acked, also if it is nobody's request.
    assert!(exchange(true, &request(1, 0, &[])).is_empty());
    let other = Loopback {
        protocol: Protocol::Netfilter,
        ..Loopback::new(Hub::default(), 5)
    };
    let said = other.exchange(&OnlyLinks(Links), &request(GET, 0, &[0; 16]));
    assert_eq!(error_of(&said[0]), -libc::EOPNOTSUPP);
}

#[test]
fn a_dump_may_pause() {
    let said = exchange(true, &request(GET, flags::DUMP, &[]));
    let kinds: Vec<_> = said
        .iter()
        .map(|datagram| (Header::parse(datagram).unwrap().kind, datagram.len()))
        .collect();
    // Both records in one datagram, then NLMSG_DONE.
    assert_eq!(kinds, [(NEW, 40), (3, 20)]);
}

#[test]
fn numbers_of_protocols_are_the_kernels() {
    for (number, protocol) in [
        (libc::NETLINK_GENERIC, Protocol::Generic),
        (libc::NETLINK_NETFILTER, Protocol::Netfilter),
        (libc::NETLINK_ROUTE, Protocol::Route),
    ] {
        let number = u32::try_from(number).unwrap();
        assert_eq!(service::Protocol::from_number(number), Some(protocol));
    }
    assert_eq!(service::Protocol::from_number(15), None);
}
