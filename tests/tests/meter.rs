//! Meters: rates kept with real traffic, statistics, what ovs-vswitchd makes of the family.

use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::net::sockopt;
use tests::lab::{self, Lab};
use tests::{Endpoint, wait};

/// Ethernet, IPv4 and UDP headers.
const HEADERS: u64 = 42;
const PORT: u16 = 5001;

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
/// sender up; how many, and how long it took.
fn send(a: &Endpoint, payload: usize, per_second: f64, time: Duration) -> Result<(u64, Duration)> {
    let socket = a
        .namespace()
        .inside(|| UdpSocket::bind(("10.1.1.1", 0)))??;
    socket.connect(SocketAddr::from(([10, 1, 1, 2], PORT)))?;
    let datagram = vec![0x5a; payload];
    let begin = Instant::now();
    let mut sent = 0_u64;
    while begin.elapsed() < time {
        while (sent as f64) < begin.elapsed().as_secs_f64() * per_second {
            socket.send(&datagram)?;
            sent += 1;
        }
        std::thread::sleep(Duration::from_micros(500));
    }
    Ok((sent, begin.elapsed()))
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
        // A quarter of a second's worth: so long may a busy machine hold the sender up.
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
        let per_second = f64::from(kbps) * 1000.0 / bits;
        let (sent, took, received) = std::thread::scope(|scope| -> Result<_> {
            let receiving = scope.spawn(|| {
                let mut datagram = vec![0; 65_536];
                let mut received = 0_u64;
                // The first waits for a megaflow: longer than the pause that ends it.
                while receiver.recv(&mut datagram).is_ok() {
                    received += 1;
                }
                received
            });
            let (sent, took) = send(&a, payload, per_second * 1.5, time)?;
            let received = receiving.join().ok().context("the receiver panicked")?;
            Ok((sent, took, received))
        })?;
        let seen = stats(lab)?;
        let passed = seen.packets_in - seen.packets_dropped;
        eprintln!("{kbps} kbit/s: {sent} sent in {took:?}, {seen:?}, {received} received");
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

        // What a device's queue held is metered when it comes out of it: a little later.
        let allowed = |took: Duration| {
            (took.as_secs_f64() * f64::from(kbps) + f64::from(burst)) * 1000.0 / bits
        };
        let most = allowed(took + Duration::from_millis(20)) * 1.02 + 1.0;
        ensure!((passed as f64) <= most, "{passed} passed of {most} at most");
        let least = allowed(took) * 0.95 - 1.0;
        ensure!(
            (passed as f64) >= least,
            "{passed} passed of {least} at least"
        );
        ensure!(came as f64 >= allowed(took), "too few came: {came}");
        ensure!(
            received <= passed && received as f64 >= passed as f64 * 0.98,
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
