//! Sends 60-byte frames as fast as one thread can, past the queueing discipline, as a container or a
//! virtual machine would: `blast SECONDS DEVICE`. Prints how many the kernel took.

use std::time::{Duration, Instant};

use frame::Pool;
use vport::{AttachOptions, HideChoice, TxOutcome, attach};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [seconds, device] = &arguments[..] else {
        return Err("usage: blast SECONDS DEVICE".into());
    };
    let options = AttachOptions {
        qdisc_bypass: true,
        hide: HideChoice::Off,
        ..AttachOptions::default()
    };
    let port = attach(device, &options)?;
    let mut bytes = [0; 60];
    bytes[..14].copy_from_slice(&[2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 0x88, 0xb5]);
    let mut pool = Pool::default();
    let mut frames = Vec::new();
    let mut outcome = TxOutcome::default();
    let start = Instant::now();
    let end = start + Duration::from_secs_f64(seconds.parse()?);
    while Instant::now() < end {
        for _ in 0..32 {
            let mut frame = pool.small();
            frame.space_mut()[..60].copy_from_slice(&bytes);
            frame.set_len(60);
            frames.push(frame);
        }
        port.transmit(&mut frames, &mut pool, &mut outcome);
    }
    let rate = outcome.packets as f64 / start.elapsed().as_secs_f64() / 1e6;
    println!(
        "{rate:.3} Mpps offered, {} refused",
        outcome.refused_total()
    );
    Ok(())
}
