//! A port into which frames vanish.

use frame::{Frame, Pool};
use vport::{Capabilities, Driver, Error, HostCounters, Link, Port, RxQueue, TxOutcome};

/// Takes everything.
pub struct Sink;

impl Port for Sink {
    fn driver(&self) -> Driver {
        Driver::AfPacket
    }

    fn mode(&self) -> String {
        "sink".to_owned()
    }

    fn ifindex(&self) -> u32 {
        1
    }

    fn name(&self) -> &str {
        "sink"
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            csum: true,
            tso4: true,
            tso6: true,
            uso: true,
            ufo: true,
            vlan: true,
            max_frame: 1514,
            max_gso_frame: 65_535,
        }
    }

    fn open_queues(&self) -> Result<Vec<Box<dyn RxQueue>>, Error> {
        Ok(Vec::new())
    }

    fn transmit(&self, frames: &mut Vec<Frame>, pool: &mut Pool, outcome: &mut TxOutcome) {
        for frame in frames.drain(..) {
            outcome.sent(frame.wire_len());
            pool.put(frame);
        }
    }

    fn host_counters(&self) -> HostCounters {
        HostCounters::default()
    }

    fn link_changed(&self, _: &Link) {}
}
