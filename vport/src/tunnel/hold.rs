//! A tunnel's place on the host: the sockets that hold its port, and those that receive.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd;
use std::sync::Arc;

use libc::sock_filter;
use rustix::io::Errno;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use super::{TunnelConfig, wire};
use crate::error::Error;
use crate::sys::inet;
use crate::sys::packet_socket::PacketSocket;

/// Bytes that may wait to be received.
const RECEIVE_BUFFER: usize = 8 << 20;

const ETH_P_IP: u16 = 0x0800;
const ETH_P_IPV6: u16 = 0x86dd;

/// Holds the UDP port, or the IP protocol, while it lives.
#[derive(Debug)]
pub(super) struct Hold {
    _sockets: Vec<Socket>,
}

impl Hold {
    pub(super) fn new(name: &str, config: &TunnelConfig) -> Result<Self, Error> {
        let (v4, v6) = config.kind.families();
        let mut sockets = Vec::new();
        for (wanted, is_v6) in [(v4, false), (v6, true)] {
            if !wanted {
                continue;
            }
            match open(config, is_v6) {
                Ok(socket) => sockets.push(socket),
                // A host without IPv6.
                Err(error) if is_v6 && v4 && is_unsupported(&error) => {}
                Err(error) => {
                    let what = format!("{} socket for {name}", config.kind.name());
                    return Err(Error::io(&error, what));
                }
            }
        }
        Ok(Self { _sockets: sockets })
    }
}

fn is_unsupported(error: &std::io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL | libc::EPROTONOSUPPORT)
    )
}

fn open(config: &TunnelConfig, v6: bool) -> std::io::Result<Socket> {
    let domain = if v6 { Domain::IPV6 } else { Domain::IPV4 };
    let (kind, protocol) = match config.kind.is_udp() {
        true => (Type::DGRAM, Protocol::UDP),
        false => (Type::RAW, Protocol::from(i32::from(wire::GRE))),
    };
    let socket = Socket::new(domain, kind, Some(protocol))?;
    inet::receive_nothing(socket.as_fd())?;
    if !config.kind.is_udp() {
        return Ok(socket);
    }
    let any = if v6 {
        socket.set_only_v6(true)?;
        inet::take_no_checksum6(socket.as_fd())?;
        SocketAddr::from((Ipv6Addr::UNSPECIFIED, config.port))
    } else {
        SocketAddr::from((Ipv4Addr::UNSPECIFIED, config.port))
    };
    // Where it isn't known (before Linux 5.0) packets come one by one.
    let _ = inet::set_gro(socket.as_fd());
    socket.bind(&SockAddr::from(any))?;
    Ok(socket)
}

/// The sockets that receive, one a family.
pub(super) fn receivers(
    name: &str,
    config: &TunnelConfig,
) -> Result<Vec<Arc<PacketSocket>>, Error> {
    let (v4, v6) = config.kind.families();
    let mut sockets = Vec::new();
    for (wanted, ethertype) in [(v4, ETH_P_IP), (v6, ETH_P_IPV6)] {
        if wanted {
            let socket = receiver(config, ethertype);
            let socket =
                socket.map_err(|errno| Error::os(errno, format!("packet socket for {name}")))?;
            sockets.push(Arc::new(socket));
        }
    }
    Ok(sockets)
}

fn receiver(config: &TunnelConfig, ethertype: u16) -> Result<PacketSocket, Errno> {
    let socket = PacketSocket::new()?;
    socket.set_vnet_header()?;
    socket.set_auxdata()?;
    socket.set_ignore_outgoing()?;
    inet::set_buffer(&socket, RECEIVE_BUFFER, true)?;
    let protocol = wire::protocol(config.kind);
    let marks = wire::marks(config);
    let program = match ethertype {
        ETH_P_IP => filter_v4(protocol, &marks),
        _ => filter_v6(protocol, &marks),
    };
    socket.set_classic_filter(&program)?;
    socket.bind_protocol(ethertype)?;
    if ethertype == ETH_P_IP {
        socket.defragment()?;
    }
    Ok(socket)
}

// Classic BPF, uapi `linux/filter.h`: offsets from here on count from the network header, or ask for what
// the kernel knows of the packet.
const NETWORK: u32 = 0xfff0_0000;
const PACKET_TYPE: u32 = 0xffff_f000 + 4;
/// `PACKET_HOST`.
const TO_US: u32 = 0;
const FRAGMENT: u32 = 0x3fff;

const LOAD_WORD: u16 = 0x20;
const LOAD_HALF: u16 = 0x28;
const LOAD_BYTE: u16 = 0x30;
const LOAD_HALF_AT_X: u16 = 0x48;
const AND: u16 = 0x54;
const SHIFT_LEFT: u16 = 0x64;
const TO_X: u16 = 0x07;
const JUMP_EQUAL: u16 = 0x15;
const JUMP_ANY_SET: u16 = 0x45;
const RETURN: u16 = 0x06;
const ALL: u32 = 0x0004_0000;

const fn op(code: u16, k: u32) -> sock_filter {
    sock_filter {
        code,
        jt: 0,
        jf: 0,
        k,
    }
}

/// What becomes of a packet behind a step.
#[derive(Clone, Copy)]
enum Then {
    /// The next step, whatever this one was.
    On,
    /// On if the test holds, else it is dropped.
    OnIf,
    /// On unless the test holds.
    OnUnless,
    /// Accepted if the test holds, else on.
    DoneIf,
}

/// Builds a program that accepts what comes to its end.
fn program(steps: &[(sock_filter, Then)]) -> Vec<sock_filter> {
    let mut program: Vec<sock_filter> = Vec::with_capacity(steps.len() + 2);
    for (index, (step, then)) in steps.iter().enumerate() {
        let mut step = *step;
        // Past the rest of the steps, to the return that accepts; behind it is the one that drops.
        let done = u8::try_from(steps.len() - index - 1).unwrap_or(u8::MAX);
        match then {
            Then::On => {}
            Then::OnIf => step.jf = done.saturating_add(1),
            Then::OnUnless => step.jt = done.saturating_add(1),
            Then::DoneIf => step.jt = done,
        }
        program.push(step);
    }
    program.push(op(RETURN, ALL));
    program.push(op(RETURN, 0));
    program
}

/// One of these is what was loaded.
fn one_of(marks: &[u16]) -> impl Iterator<Item = (sock_filter, Then)> {
    let last = marks.len().saturating_sub(1);
    marks.iter().enumerate().map(move |(index, mark)| {
        let then = if index == last {
            Then::OnIf
        } else {
            Then::DoneIf
        };
        (op(JUMP_EQUAL, u32::from(*mark)), then)
    })
}

/// To this host, of this protocol, with one of these marks, whole.
fn filter_v4(protocol: u8, marks: &[u16]) -> Vec<sock_filter> {
    let mut steps = vec![
        (op(LOAD_WORD, PACKET_TYPE), Then::On),
        (op(JUMP_EQUAL, TO_US), Then::OnIf),
        (op(LOAD_BYTE, NETWORK + 9), Then::On),
        (op(JUMP_EQUAL, u32::from(protocol)), Then::OnIf),
        (op(LOAD_HALF, NETWORK + 6), Then::On),
        (op(JUMP_ANY_SET, FRAGMENT), Then::OnUnless),
        (op(LOAD_BYTE, NETWORK), Then::On),
        (op(AND, 0xf), Then::On),
        (op(SHIFT_LEFT, 2), Then::On),
        (op(TO_X, 0), Then::On),
        (op(LOAD_HALF_AT_X, NETWORK + 2), Then::On),
    ];
    steps.extend(one_of(marks));
    program(&steps)
}

fn filter_v6(protocol: u8, marks: &[u16]) -> Vec<sock_filter> {
    let mut steps = vec![
        (op(LOAD_WORD, PACKET_TYPE), Then::On),
        (op(JUMP_EQUAL, TO_US), Then::OnIf),
        (op(LOAD_BYTE, NETWORK + 6), Then::On),
        (op(JUMP_EQUAL, u32::from(protocol)), Then::OnIf),
        (op(LOAD_HALF, NETWORK + 40 + 2), Then::On),
    ];
    steps.extend(one_of(marks));
    program(&steps)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_jump_leads_to_one_of_the_two_ends() {
        for program in [
            filter_v4(wire::UDP, &[4789]),
            filter_v6(wire::GRE, &[0x88be, 0x22eb]),
        ] {
            let last = program.len() - 1;
            assert_eq!((program[last].code, program[last].k), (RETURN, 0));
            assert_eq!((program[last - 1].code, program[last - 1].k), (RETURN, ALL));
            for (at, step) in program.iter().enumerate() {
                for jump in [step.jt, step.jf] {
                    let to = at + 1 + usize::from(jump);
                    assert!(jump == 0 || to == last || to == last - 1, "{at}");
                }
            }
            // The last test's failure drops.
            assert_eq!(program[last - 2].jf, 1);
        }
    }
}
