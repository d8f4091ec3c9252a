//! Meters: rates kept with real traffic, statistics, what ovs-vswitchd makes of the family.

use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::net::sockopt;
use tests::lab::{self, Lab};
use tests::replay::client::Client;
use tests::replay::translate::{HEADERS as NETLINK, attributes, family, u32_at};
use tests::replay::{laboratory, session};
use tests::{Endpoint, wait};

/// Ethernet, IPv4 and UDP headers.
const HEADERS: u64 = 42;
const PORT: u16 = 5001;
/// How often the meter is looked at, at least.
const LOOK: Duration = Duration::from_millis(60);

/// What an OpenFlow meter has counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stats {
    packets_in: u64,
    bytes_in: u64,
    packets_dropped: u64,
    bytes_dropped: u64,
}

/// A bridge, two hosts with addresses 10.1.1.1 and 10.1.1.2 and frames of up to `mtu`, and a rule that sends
/// UDP to [`PORT`] from the first to the second through meter 1.
fn metered(
    lab: &Lab,
    mtu: u16,
    meter: &str,
) -> Result<(std::sync::Arc<Endpoint>, std::sync::Arc<Endpoint>)> {
    lab.bridge("br0")?;
    let a = lab.host_on("br0", "a", "10.1.1.1/24")?;
    let b = lab.host_on("br0", "b", "10.1.1.2/24")?;
    for endpoint in [&a, &b] {
        let mtu = mtu.to_string();
        lab.host()
            .ip(["link", "set", endpoint.port(), "mtu", &mtu])?;
        endpoint
            .namespace()
            .ip(["link", "set", "eth0", "mtu", &mtu])?;
    }
    a.neighbour("10.1.1.2", &b)?;
    b.neighbour("10.1.1.1", &a)?;
    openflow(lab, &["add-meter", "br0", &format!("meter=1,{meter}")])?;
    let rule = format!(
        "udp,tp_dst={PORT},actions=meter:1,output:{}",
        lab.ofport(b.port())?
    );
    openflow(lab, &["add-flow", "br0", &rule])?;
    Ok((a, b))
}

fn openflow(lab: &Lab, words: &[&str]) -> Result<String> {
    lab.ofctl([&["-O", "OpenFlow13"], words].concat().as_slice())
}

fn stats(lab: &Lab) -> Result<Stats> {
    let text = openflow(lab, &["meter-stats", "br0", "meter=1"])?;
    // After the name come the digits; a band's fields follow the meter's.
    let number = |name: &str| -> Result<u64> {
        let (_, rest) = text.split_once(name).with_context(|| text.clone())?;
        let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
        digits.parse().with_context(|| text.clone())
    };
    Ok(Stats {
        packets_in: number("packet_in_count:")?,
        bytes_in: number("byte_in_count:")?,
        packets_dropped: number(" packet_count:")?,
        bytes_dropped: number(" byte_count:")?,
    })
}

/// Sends datagrams of `payload` bytes for `time`, `per_second` of them on the average whatever holds the
/// sender up, and longer if the meter has `dropped` none until then; how many.
fn send(
    a: &Endpoint,
    payload: usize,
    per_second: f64,
    time: Duration,
    dropped: &AtomicU64,
) -> Result<u64> {
    let socket = a
        .namespace()
        .inside(|| UdpSocket::bind(("10.1.1.1", 0)))??;
    socket.connect(SocketAddr::from(([10, 1, 1, 2], PORT)))?;
    let datagram = vec![0x5a; payload];
    let begin = Instant::now();
    let mut sent = 0_u64;
    while begin.elapsed() < time
        || (dropped.load(Ordering::Relaxed) == 0 && begin.elapsed() < time * 10)
    {
        while (sent as f64) < begin.elapsed().as_secs_f64() * per_second {
            socket.send(&datagram)?;
            sent += 1;
        }
        std::thread::sleep(Duration::from_micros(500));
    }
    Ok(sent)
}

/// What the datapath's meter had counted at a moment between two.
#[derive(Clone, Copy, Debug)]
struct Sample {
    before: Duration,
    after: Duration,
    came: u64,
    dropped: u64,
}

impl Sample {
    fn passed(&self) -> u64 {
        self.came - self.dropped
    }
}

/// Reads the datapath's meter by netlink, quickly.
struct Observer {
    client: Client,
    request: Vec<u8>,
    begin: Instant,
}

impl Observer {
    fn new(lab: &Lab) -> Result<Self> {
        /// `OVS_METER_CMD_GET`, `OVS_METER_ATTR_ID`.
        const GET: u8 = 4;
        const ID: u16 = 1;
        let ifindex = laboratory::ifindex(lab, "ovs-system")?;
        let mut client = laboratory::client(lab)?;
        // ovs-vswitchd numbers the datapath's meters as it likes.
        for id in 0..8_u32 {
            let body = [
                &8_u16.to_ne_bytes()[..],
                &ID.to_ne_bytes(),
                &id.to_ne_bytes(),
            ];
            let request = session::request(family::METER, GET, ifindex, &body.concat());
            let answers = client.converse(&request)?;
            if session::errno(answers.last().context("no answer")?) == Some(0) {
                let begin = Instant::now();
                return Ok(Self {
                    client,
                    request,
                    begin,
                });
            }
        }
        anyhow::bail!("the datapath has no meter")
    }

    fn sample(&mut self) -> Result<Sample> {
        /// `OVS_METER_ATTR_STATS`, `OVS_METER_ATTR_BANDS`.
        const STATS: u16 = 3;
        const BANDS: u16 = 4;
        let before = self.begin.elapsed();
        let answers = self.client.converse(&self.request)?;
        let after = self.begin.elapsed();
        let reply = answers.first().context("no answer")?;
        let places = attributes(reply, NETLINK, reply.len());
        let count = |kind: u16, behind: usize| -> Result<u64> {
            let place = places.iter().find(|place| place.kind == kind);
            let at = place.context("no such statistics")?.start + behind;
            Ok(u64::from(u32_at(reply, at)) | u64::from(u32_at(reply, at + 4)) << 32)
        };
        Ok(Sample {
            before,
            after,
            came: count(STATS, 4)?,
            // A list of bands, a band, its statistics.
            dropped: count(BANDS, 12)?,
        })
    }
}

/// At most and at least how many packets a right meter of `rate` packets a second, `burst` packets deep and full
/// at first, lets pass of those that came to it, whenever they came and whoever was held up.
///
/// At most: what the bucket held, and what flowed in. At least: when the first was dropped the bucket was empty,
/// and what it had held and what had flowed in (and not over) had passed.
/// From then on, of what came between two samples as many as the rate allowed in that time, and no more than half
/// of the bucket, are such that the bucket would always have had enough for them, once it had as much as comes in
/// two of these times; and that more come can't make fewer pass.
fn bounds(samples: &[Sample], rate: f64, burst: f64) -> Result<(f64, f64)> {
    let last = samples.last().context("no sample")?;
    let start = samples.iter().rfind(|sample| sample.came == 0);
    let end = samples.iter().find(|sample| sample.came == last.came);
    let (start, end) = (start.context("late")?, end.context("never")?);
    let most = burst + rate * (end.after - start.before).as_secs_f64();
    let first = samples.iter().position(|sample| sample.dropped != 0);
    let first = first.context("the sender never got to the meter's rate")?;
    // What flowed in before that, but for what flowed over while less came than that.
    let inflow = |until: Duration| rate * until.saturating_sub(start.before).as_secs_f64();
    let spilled = samples[..=first]
        .windows(2)
        .map(|pair| inflow(pair[1].after) - pair[0].came as f64)
        .fold(0.0, f64::max);
    let before = burst + inflow(samples[first.saturating_sub(1)].before) - spilled;
    let (mut sum, mut largest) = (0.0, 0.0_f64);
    for pair in samples[first..].windows(2) {
        let time = pair[1].before.saturating_sub(pair[0].after).as_secs_f64();
        let came = (pair[1].came - pair[0].came) as f64;
        let fits = came.min(rate * time).min(burst / 2.0);
        sum += fits;
        largest = largest.max(fits);
    }
    Ok((most, before + sum - 2.0 * largest))
}

/// Waits until the meter has counted that many packets.
fn settled(lab: &Lab, packets: u64) -> Result<Stats> {
    wait::until("the packets at the meter", Duration::from_secs(10), || {
        let seen = stats(lab)?;
        Ok((seen.packets_in >= packets).then_some(seen))
    })
}

/// Offers half as much again as the meter lets pass, and checks what did.
fn keeps_rate(mtu: u16, kbps: u32, time: Duration) -> Result<()> {
    lab::test_ovs_dpd(|lab| {
        // A quarter of a second's worth: a busy machine that holds the sender up costs nothing so long.
        let burst = kbps / 4;
        let meter = format!("kbps,burst,stats,bands=type=drop,rate={kbps},burst_size={burst}");
        let (a, b) = metered(lab, mtu, &meter)?;
        let receiver = b
            .namespace()
            .inside(|| UdpSocket::bind(("10.1.1.2", PORT)))??;
        // What waits for the receiver isn't to be lost.
        sockopt::set_socket_recv_buffer_size_force(&receiver, 256 << 20)?;
        receiver.set_read_timeout(Some(Duration::from_millis(500)))?;

        let payload = usize::from(mtu) - 28;
        let bits = (payload as f64 + HEADERS as f64) * 8.0;
        let rate = f64::from(kbps) * 1000.0 / bits;
        let mut observer = Observer::new(lab)?;
        let mut samples = vec![observer.sample()?];
        let (done, dropped) = (AtomicBool::new(false), AtomicU64::new(0));
        // Some packets at least between two looks.
        let pause = Duration::from_secs_f64(8.0 / rate).clamp(Duration::from_millis(5), LOOK);
        let (sent, received) = std::thread::scope(|scope| -> Result<_> {
            let observing = scope.spawn(|| -> Result<()> {
                while !done.load(Ordering::Relaxed) {
                    std::thread::sleep(pause);
                    let sample = observer.sample()?;
                    dropped.store(sample.dropped, Ordering::Relaxed);
                    samples.push(sample);
                }
                Ok(())
            });
            let receiving = scope.spawn(|| {
                let mut datagram = vec![0; 65_536];
                let mut received = 0_u64;
                // The first waits for a megaflow: longer than the pause that ends it.
                while receiver.recv(&mut datagram).is_ok() {
                    received += 1;
                }
                received
            });
            let sent = send(&a, payload, rate * 1.5, time, &dropped);
            let received = receiving.join();
            done.store(true, Ordering::Relaxed);
            observing.join().ok().context("the observer panicked")??;
            Ok((sent?, received.ok().context("the receiver panicked")?))
        })?;
        let seen = stats(lab)?;
        let passed = seen.packets_in - seen.packets_dropped;
        let (most, least) = bounds(&samples, rate, f64::from(burst) * 1000.0 / bits)?;
        eprintln!(
            "{kbps} kbit/s: {sent} sent, {seen:?}, {passed} passed of {least:.0} to {most:.0}, {received} received"
        );
        let last = samples.last().context("no sample")?;
        ensure!(
            (last.came, last.passed()) == (seen.packets_in, passed),
            "{last:?} by netlink, {seen:?} by OpenFlow"
        );
        // A device's queue may lose some before the meter, where the processor is the limit.
        let came = seen.packets_in;
        ensure!(came <= sent, "{seen:?}, {sent} sent");
        ensure!(kbps > 1000 || came == sent, "{seen:?}, {sent} sent");
        let frame = payload as u64 + HEADERS;
        ensure!(seen.bytes_in == came * frame, "{seen:?}");
        ensure!(
            seen.bytes_dropped == seen.packets_dropped * frame,
            "{seen:?}"
        );
        ensure!(
            passed as f64 <= most * 1.02 + 1.0,
            "{passed} passed of {most} at most"
        );
        ensure!(
            passed as f64 >= least * 0.98 - 1.0,
            "{passed} passed of {least} at least"
        );
        // Behind the meter there are queues, too.
        ensure!(
            received <= passed && received as f64 >= passed as f64 * 0.9,
            "{received} of {passed}"
        );

        let status = lab.status_json()?;
        let text = status.to_string();
        ensure!(
            text.contains(&format!("\"meter\":{}", seen.packets_dropped)),
            "no such count of drops by a meter: {text}"
        );
        Ok(())
    })
}

#[test]
fn a_meter_of_1_mbit_lets_1_mbit_a_second_pass() -> Result<()> {
    keeps_rate(1500, 1000, Duration::from_secs(5))
}

#[test]
fn a_meter_of_100_mbit_lets_100_mbit_a_second_pass() -> Result<()> {
    keeps_rate(1500, 100_000, Duration::from_secs(3))
}

/// With large frames, so that the sender of a small machine gets there.
#[test]
fn a_meter_of_1_gbit_lets_1_gbit_a_second_pass() -> Result<()> {
    keeps_rate(9000, 1_000_000, Duration::from_secs(2))
}

#[test]
fn a_meter_of_packets_counts_packets_and_a_changed_one_its_new_rate() -> Result<()> {
    lab::test_ovs_dpd(|lab| {
        let (a, _b) = metered(
            lab,
            1500,
            "pktps,burst,stats,bands=type=drop,rate=1,burst_size=10",
        )?;
        let sender = a
            .namespace()
            .inside(|| UdpSocket::bind(("10.1.1.1", 0)))??;
        let burst = |count: u64, payload: usize| -> Result<()> {
            for _ in 0..count {
                sender.send_to(&vec![0; payload], ("10.1.1.2", PORT))?;
            }
            Ok(())
        };
        let begin = Instant::now();
        burst(40, 1000)?;
        let seen = settled(lab, 40)?;
        let more = begin.elapsed().as_secs() + 1;
        let passed = 40 - seen.packets_dropped;
        ensure!((10..=10 + more).contains(&passed), "{seen:?}");
        ensure!(
            seen.packets_in == 40 && seen.bytes_in == 40 * 1042,
            "{seen:?}"
        );

        // A new rate is a new meter, with a full bucket; its statistics begin anew, as the module's.
        let changed = "meter=1,pktps,burst,stats,bands=type=drop,rate=1,burst_size=100";
        openflow(lab, &["mod-meter", "br0", changed])?;
        burst(90, 100)?;
        let seen = settled(lab, 90)?;
        ensure!(
            (seen.packets_in, seen.packets_dropped) == (90, 0),
            "{seen:?}"
        );

        // Without the meter its rule goes, too.
        openflow(lab, &["del-meter", "br0", "meter=1"])?;
        let rules = openflow(lab, &["dump-flows", "br0"])?;
        ensure!(!rules.contains("meter"), "{rules}");
        Ok(())
    })
}

#[test]
fn open_vswitch_finds_the_modules_meters() -> Result<()> {
    lab::test_ovs_dpd(|lab| {
        lab.bridge("br0")?;
        let features = openflow(lab, &["meter-features", "br0"])?;
        for part in [
            "max_meter:200000",
            "max_bands:1",
            "drop",
            "kbps",
            "pktps",
            "burst",
            "stats",
        ] {
            ensure!(features.contains(part), "no {part}: {features}");
        }
        let log = lab.log();
        ensure!(!log.contains("broken meter"), "{log}");
        Ok(())
    })
}
