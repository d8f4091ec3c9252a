//! Frames, as fast as one thread can or at a steady rate.
//!
//! Sent by sendmmsg past the queueing discipline: what comes out of the veth's other end is what a
//! container or a virtual machine would send. Each frame is an UDP datagram in IPv4 to an address of
//! nobody's, so that the receiver's stack drops it first thing; its source and destination port make the
//! flow.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ::tests::endpoint::{DEVICE, Endpoint};
use anyhow::{Context, Result, anyhow};

use crate::cpu;
use crate::wire::{self, BATCH, Wire, Wish};

/// Where a frame carries when it was sent, in nanoseconds of the real-time clock, and a number.
const PAYLOAD: usize = 42;
/// Length of a frame without its checksum: "64 B".
pub const SHORTEST: usize = 60;
const SOURCE_PORT: usize = 34;

/// A frame of that length for the flow `flow`.
pub fn frame(length: usize, flow: u32) -> Vec<u8> {
    let mut frame = vec![0; length.max(SHORTEST)];
    frame[..14].copy_from_slice(&[2, 0, 0, 0, 0xee, 2, 2, 0, 0, 0, 0xee, 1, 8, 0]);
    let ip_len = (frame.len() - 14) as u16;
    let mut ip = [
        0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, 17, 0, 0, 198, 18, 0, 1, 198, 19, 0, 1,
    ];
    ip[2..4].copy_from_slice(&ip_len.to_be_bytes());
    let sum: u32 = ip
        .chunks(2)
        .map(|w| u32::from(u16::from_be_bytes([w[0], w[1]])))
        .sum();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    frame[14..34].copy_from_slice(&ip);
    set_flow(&mut frame, flow);
    frame[38..40].copy_from_slice(&(ip_len - 20).to_be_bytes());
    frame
}

/// Makes a frame one of the flow `flow`, by both its ports. (The UDP checksum is 0: none.)
fn set_flow(frame: &mut [u8], flow: u32) {
    let [a, b, c, d] = flow.wrapping_add(0x1000_1000).to_be_bytes();
    frame[SOURCE_PORT..SOURCE_PORT + 4].copy_from_slice(&[c, d, a, b]);
}

/// The flow of a frame of ours.
pub fn flow(frame: &[u8]) -> Option<u32> {
    let [c, d, a, b] = *frame.get(SOURCE_PORT..)?.first_chunk()?;
    Some(u32::from_be_bytes([a, b, c, d]).wrapping_sub(0x1000_1000))
}

/// When a frame of ours was sent, in nanoseconds of the real-time clock, and which it was.
pub fn stamp(frame: &[u8]) -> Option<(i64, u32)> {
    if frame.get(26..34)? != [198, 18, 0, 1, 198, 19, 0, 1] {
        return None;
    }
    let at = i64::from_be_bytes(*frame.get(PAYLOAD..)?.first_chunk()?);
    let number = u32::from_be_bytes(*frame.get(PAYLOAD + 8..)?.first_chunk()?);
    Some((at, number))
}

/// A thread that sends until it is stopped.
#[derive(Debug)]
pub struct Flood {
    stop: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    thread: JoinHandle<Result<()>>,
}

impl Flood {
    /// Sends frames of `length` bytes in turn of `flows` flows, as fast as it can, on
    /// [`cpu::SENDER`].
    pub fn start(from: &Arc<Endpoint>, length: usize, flows: u32) -> Self {
        let (stop, sent) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicU64::new(0)),
        );
        let thread = {
            let (from, stop, sent) = (Arc::clone(from), Arc::clone(&stop), Arc::clone(&sent));
            std::thread::spawn(move || {
                from.namespace().inside(|| {
                    cpu::pin_thread(cpu::SENDER)?;
                    let wire = open()?;
                    flood(&wire, length, flows, &stop, &sent)
                })?
            })
        };
        Self { stop, sent, thread }
    }

    /// How many the kernel has taken.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Stops.
    ///
    /// # Errors
    /// Those of the system calls.
    pub fn stop(self) -> Result<u64> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread
            .join()
            .map_err(|_| anyhow!("the sender panicked"))??;
        Ok(self.sent.load(Ordering::Relaxed))
    }
}

fn open() -> Result<Wire> {
    let wish = Wish {
        qdisc_bypass: true,
        ..Wish::default()
    };
    Wire::open(DEVICE, wish).context("the sender's socket")
}

fn flood(
    wire: &Wire,
    length: usize,
    flows: u32,
    stop: &AtomicBool,
    sent: &AtomicU64,
) -> Result<()> {
    let mut frames: Vec<Vec<u8>> = (0..BATCH).map(|_| frame(length, 0)).collect();
    let mut flow = 0;
    while !stop.load(Ordering::Relaxed) {
        if flows > 1 {
            for frame in &mut frames {
                set_flow(frame, flow);
                flow = (flow + 1) % flows;
            }
        }
        let views: [&[u8]; BATCH] = std::array::from_fn(|n| &frames[n][..]);
        match wire.send(&views) {
            Ok(taken) => {
                sent.fetch_add(taken as u64, Ordering::Relaxed);
            }
            Err(error) if busy(&error) => {}
            Err(error) => return Err(error).context("sending"),
        }
    }
    Ok(())
}

fn busy(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOBUFS | libc::EAGAIN))
}

/// Answers a frame of each of so many flows once, from the other end, on [`cpu::SENDER`].
///
/// # Errors
/// Those of the system calls.
pub fn answer(from: &Endpoint, flows: u32) -> Result<()> {
    from.namespace().inside(|| {
        cpu::pin_thread(cpu::SENDER)?;
        let wire = open()?;
        for flow in 0..flows {
            let mut frame = frame(SHORTEST, flow);
            for (one, other, length) in [(0, 6, 6), (26, 30, 4), (SOURCE_PORT, SOURCE_PORT + 2, 2)]
            {
                for at in 0..length {
                    frame.swap(one + at, other + at);
                }
            }
            while let Err(error) = wire.send(&[&frame]) {
                if !busy(&error) {
                    return Err(error).context("sending");
                }
            }
        }
        Ok(())
    })?
}

/// Sends `count` frames at `rate` a second, each with its time and number, on [`cpu::SENDER`]; frame n is
/// of the flow `flow_of(n)`. The thread spins between them, so that it isn't late. Gives how many went.
///
/// # Errors
/// Those of the system calls.
pub fn paced(
    from: &Endpoint,
    rate: f64,
    count: u32,
    flow_of: impl Fn(u32) -> u32 + Send + Sync,
) -> Result<u32> {
    from.namespace().inside(|| {
        cpu::pin_thread(cpu::SENDER)?;
        let wire = open()?;
        let mut frame = frame(SHORTEST, 0);
        let (start, gap) = (Instant::now(), Duration::from_secs_f64(1.0 / rate));
        let mut sent = 0;
        for number in 0..count {
            let due = start + gap * number;
            while Instant::now() < due {
                std::hint::spin_loop();
            }
            set_flow(&mut frame, flow_of(number));
            frame[PAYLOAD + 8..PAYLOAD + 12].copy_from_slice(&number.to_be_bytes());
            frame[PAYLOAD..PAYLOAD + 8].copy_from_slice(&wire::realtime().to_be_bytes());
            match wire.send(&[&frame]) {
                Ok(_) => sent += 1,
                Err(error) if busy(&error) => {}
                Err(error) => return Err(error).context("sending"),
            }
        }
        Ok(sent)
    })?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_tells_its_flow() {
        for number in [0, 1, 70_000, 5_000_000] {
            assert_eq!(flow(&frame(60, number)), Some(number));
        }
    }

    #[test]
    fn a_frame_has_a_right_ip_checksum() {
        let frame = frame(100, 3);
        let sum: u32 = frame[14..34]
            .chunks(2)
            .map(|w| u32::from(u16::from_be_bytes([w[0], w[1]])))
            .sum();
        assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff);
        assert_eq!(stamp(&frame), Some((0, 0)));
    }
}
