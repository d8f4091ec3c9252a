//! Frames as they are on the wire: sent and captured on an endpoint's device by a packet socket.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::endpoint::{DEVICE, Endpoint};
use crate::namespace::Namespace;
use crate::sys::PacketSocket;

/// Both ways on one device. What it captures it has captured since it was opened.
#[derive(Debug)]
pub struct Wire {
    socket: PacketSocket,
}

impl Wire {
    /// On an endpoint's `eth0`.
    ///
    /// # Errors
    /// Those of the system calls.
    pub fn open(endpoint: &Endpoint) -> Result<Self> {
        Self::on(endpoint.namespace(), DEVICE)
    }

    /// On a device of a namespace.
    ///
    /// # Errors
    /// Those of the system calls.
    pub fn on(namespace: &Namespace, device: &str) -> Result<Self> {
        let socket = namespace.inside(|| PacketSocket::open(device))?;
        Ok(Self {
            socket: socket.with_context(|| format!("packet socket on {device}"))?,
        })
    }

    /// Sends a frame, from its destination address on.
    ///
    /// # Errors
    /// Those of send(2).
    pub fn send(&self, frame: &[u8]) -> Result<()> {
        self.socket
            .send(frame)
            .with_context(|| format!("sending {} bytes", frame.len()))
    }

    /// Everything captured until `limit` has passed.
    ///
    /// # Errors
    /// Those of the system calls.
    pub fn capture_for(&self, limit: Duration) -> Result<Vec<Vec<u8>>> {
        let deadline = Instant::now() + limit;
        let mut frames = Vec::new();
        while let Some(frame) = self.next(deadline)? {
            frames.push(frame);
        }
        Ok(frames)
    }

    /// The first captured frame for which `wanted` gives something.
    ///
    /// # Errors
    /// None came within `limit`; the message shows what came instead.
    pub fn expect<T>(
        &self,
        what: &str,
        limit: Duration,
        mut wanted: impl FnMut(&[u8]) -> Option<T>,
    ) -> Result<T> {
        let deadline = Instant::now() + limit;
        let mut others = Vec::new();
        while let Some(frame) = self.next(deadline)? {
            if let Some(found) = wanted(&frame) {
                return Ok(found);
            }
            if others.len() < 8 {
                others.push(hex(&frame));
            }
        }
        bail!(
            "{what}: not captured within {limit:?}; but\n{}",
            others.join("\n")
        );
    }

    fn next(&self, deadline: Instant) -> Result<Option<Vec<u8>>> {
        loop {
            match self.socket.receive() {
                Ok(frame) => return Ok(Some(frame)),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            let timeout = Timespec::try_from(left).context("timeout")?;
            match poll(
                &mut [PollFd::new(&self.socket, PollFlags::IN)],
                Some(&timeout),
            ) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Bytes as hexadecimal digits, the first 64 of them.
pub fn hex(bytes: &[u8]) -> String {
    let digits: String = bytes.iter().take(64).map(|b| format!("{b:02x}")).collect();
    if bytes.len() > 64 {
        format!("{digits}... ({} bytes)", bytes.len())
    } else {
        digits
    }
}

/// A frame with an Ethernet header and a payload of 46 bytes or more, its type `ethertype`: the
/// local experimental 0x88b5 unless a test means something by it.
pub fn ethernet(source: [u8; 6], destination: [u8; 6], ethertype: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(60);
    frame.extend_from_slice(&destination);
    frame.extend_from_slice(&source);
    frame.extend_from_slice(&ethertype.to_be_bytes());
    frame.extend_from_slice(payload);
    frame.resize(frame.len().max(60), 0);
    frame
}

/// A UDP datagram in IPv4 in Ethernet, with right checksums.
///
/// # Errors
/// The payload is too long.
pub fn udp4(
    source: ([u8; 6], [u8; 4], u16),
    destination: ([u8; 6], [u8; 4], u16),
    payload: &[u8],
) -> Result<Vec<u8>> {
    let builder = etherparse::PacketBuilder::ethernet2(source.0, destination.0)
        .ipv4(source.1, destination.1, 64)
        .udp(source.2, destination.2);
    let mut frame = Vec::with_capacity(builder.size(payload.len()));
    builder.write(&mut frame, payload)?;
    frame.resize(frame.len().max(60), 0);
    Ok(frame)
}

/// Whether the IPv4 header's checksum and the UDP or TCP checksum behind it are right.
pub fn checksums_right(frame: &[u8]) -> bool {
    let Ok(packet) = etherparse::SlicedPacket::from_ethernet(frame) else {
        return false;
    };
    let Some(etherparse::NetSlice::Ipv4(ip)) = &packet.net else {
        return false;
    };
    let header = ip.header();
    let network = header.to_header().calc_header_checksum() == header.header_checksum();
    let transport = match &packet.transport {
        Some(etherparse::TransportSlice::Udp(udp)) => {
            let sum = udp.to_header().calc_checksum_ipv4_raw(
                header.source(),
                header.destination(),
                udp.payload(),
            );
            sum == Ok(udp.checksum())
        }
        Some(etherparse::TransportSlice::Tcp(tcp)) => {
            let sum = tcp.to_header().calc_checksum_ipv4_raw(
                header.source(),
                header.destination(),
                tcp.payload(),
            );
            sum == Ok(tcp.checksum())
        }
        _ => true,
    };
    network && transport
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_built_datagram_has_right_checksums_and_a_changed_one_has_not() {
        let from = ([2, 0, 0, 0, 0, 1], [10, 0, 0, 1], 1000);
        let to = ([2, 0, 0, 0, 0, 2], [10, 0, 0, 2], 2000);
        let mut frame = udp4(from, to, &[7; 40]).unwrap();
        assert!(checksums_right(&frame));
        frame[30] ^= 1;
        assert!(!checksums_right(&frame));
    }

    #[test]
    fn a_short_frame_is_padded() {
        assert_eq!(ethernet([0; 6], [0; 6], 0x88b5, &[]).len(), 60);
    }
}
