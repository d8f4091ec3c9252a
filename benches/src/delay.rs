//! A delay line: a device whose frames take a given time to and from another device, whatever their number. For
//! machines whose kernel has no netem.
//!
//! Frames are neither lost nor reordered; a bound on how many are under way would be a queue of its own.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ::tests::Namespace;
use anyhow::{Context, Result, anyhow};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vport::{AttachOptions, DriverChoice, HideChoice, InternalOptions, Port, RxQueue, TxOutcome};

/// Runs until it is dropped; its device goes with it.
#[derive(Debug)]
pub struct DelayLine {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl DelayLine {
    /// Makes the device `name` in a namespace, each way `delay` away from `device`.
    ///
    /// # Errors
    /// The device can't be made.
    pub fn start(namespace: &Namespace, device: &str, name: &str, delay: Duration) -> Result<Self> {
        let made = namespace.inside(|| -> Result<[Box<dyn Port>; 2], vport::Error> {
            let near = vport::attach(
                device,
                &AttachOptions {
                    driver: DriverChoice::AfPacket,
                    hide: HideChoice::Auto,
                    ..AttachOptions::default()
                },
            )?;
            let far = vport::create_internal(name, &InternalOptions::default())?;
            Ok([near, far])
        })?;
        let [near, far] = made.map_err(|error| anyhow!("{error}"))?.map(Arc::from);
        let near: Arc<dyn Port> = near;
        let far: Arc<dyn Port> = far;
        let stop = Arc::new(AtomicBool::new(false));
        let mut threads = Vec::new();
        for (from, to) in [(&near, &far), (&far, &near)] {
            let queues = from.open_queues().map_err(|error| anyhow!("{error}"))?;
            let queue = queues.into_iter().next().context("a queue")?;
            let (to, stop) = (Arc::clone(to), Arc::clone(&stop));
            threads.push(std::thread::spawn(move || carry(queue, &*to, delay, &stop)));
        }
        Ok(Self { stop, threads })
    }
}

impl Drop for DelayLine {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // It has said why it panicked.
            let _ = thread.join();
        }
    }
}

fn carry(mut queue: Box<dyn RxQueue>, to: &dyn Port, delay: Duration, stop: &AtomicBool) {
    let mut pool = frame::Pool::default();
    let mut under_way = VecDeque::new();
    let (mut came, mut due) = (Vec::new(), Vec::new());
    let mut outcome = TxOutcome::default();
    while !stop.load(Ordering::Relaxed) {
        let first = under_way.front().map(|(at, _): &(Instant, _)| *at);
        let wait = first.map_or(Duration::from_millis(50), |at| {
            at.saturating_duration_since(Instant::now())
        });
        let wait = Timespec {
            tv_sec: 0,
            tv_nsec: wait.min(Duration::from_millis(50)).subsec_nanos().into(),
        };
        let mut fds = [PollFd::new(&queue, PollFlags::IN)];
        if poll(&mut fds, Some(&wait)).is_ok_and(|ready| ready != 0) {
            if queue.receive(&mut pool, &mut came, 64).is_err() {
                return;
            }
            let at = Instant::now() + delay;
            under_way.extend(came.drain(..).map(|frame| (at, frame)));
        }
        let now = Instant::now();
        while under_way.front().is_some_and(|(at, _)| *at <= now) {
            due.extend(under_way.pop_front().map(|(_, frame)| frame));
        }
        if !due.is_empty() {
            to.transmit(&mut due, &mut pool, &mut outcome);
        }
    }
}
