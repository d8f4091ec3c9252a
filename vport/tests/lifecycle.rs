//! What a port changes on the host while it is there, and that nothing of it stays. Needs root.
#![allow(clippy::unwrap_used, clippy::panic)] // helpers of tests

mod common;

use std::io::ErrorKind;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::time::Duration;

use common::{End, Lab, Netns, eventually, test_frame, wait};
use frame::Pool;
use vport::{
    AttachOptions, DriverChoice, HideChoice, InternalOptions, LinkEvent, LinkMonitor, RxStatus,
    TxOutcome, TxRefusal, attach, cleanup, create_internal,
};

/// Whether the host's stack behind the address answers (here: refuses) a connection.
fn answers(from: &Netns, address: &str) -> bool {
    let address: SocketAddr = format!("{address}:9").parse().unwrap();
    from.run(
        move || match TcpStream::connect_timeout(&address, Duration::from_millis(500)) {
            Ok(_) => true,
            Err(error) => error.kind() == ErrorKind::ConnectionRefused,
        },
    )
}

fn hidden_while_open(hide: HideChoice, by: &str) {
    let lab = Lab::new(1500);
    lab.switch.ip("addr add 10.9.0.9/24 dev pa");
    assert!(answers(&lab.a, "10.9.0.9"), "not reachable to begin with");
    let port = lab.switch.attach(
        "pa",
        AttachOptions {
            hide,
            ..AttachOptions::default()
        },
    );
    assert!(port.mode().contains(by), "{}", port.mode());
    lab.a.ip("neigh flush all");
    assert!(
        !answers(&lab.a, "10.9.0.9"),
        "the host's stack still answers: {}",
        port.mode()
    );
    // The port itself did see what the host didn't.
    let mut queue = port.open_queues().unwrap().pop().unwrap();
    let (mut frames, mut pool) = (Vec::new(), Pool::default());
    queue.receive(&mut pool, &mut frames, 32).unwrap();
    let arp = |frame: &frame::Frame| frame.bytes().get(12..14) == Some(&[8, 6]);
    assert!(
        frames.iter().any(arp),
        "no ARP request among {} frames",
        frames.len()
    );
    drop(port);
    assert!(!answers(&lab.a, "10.9.0.9"), "a queue is still open");
    drop(queue);
    lab.a.ip("neigh flush all");
    assert!(answers(&lab.a, "10.9.0.9"), "not restored");
    assert_eq!(lab.switch.command("nft list tables"), "");
}

#[test]
fn the_hosts_stack_does_not_see_a_port_hidden_by_default() {
    hidden_while_open(HideChoice::Auto, "hidden by tcx");
}

#[test]
fn the_hosts_stack_does_not_see_a_port_hidden_by_nftables() {
    hidden_while_open(HideChoice::Nftables, "hidden by nftables");
}

#[test]
fn a_device_that_is_a_port_again_before_the_last_one_is_closed_is_hidden_throughout() {
    for hide in [HideChoice::Auto, HideChoice::Nftables] {
        let lab = Lab::new(1500);
        lab.switch.ip("addr add 10.9.0.9/24 dev pa");
        let options = AttachOptions {
            hide,
            ..AttachOptions::default()
        };
        let first = lab.switch.attach("pa", options.clone());
        let second = lab.switch.attach("pa", options);
        assert!(second.mode().contains("hidden by"), "{}", second.mode());
        drop(first);
        assert!(!answers(&lab.a, "10.9.0.9"));
    }
}

#[test]
fn not_hidden_if_so_asked() {
    let lab = Lab::new(1500);
    lab.switch.ip("addr add 10.9.0.9/24 dev pa");
    let options = AttachOptions {
        hide: HideChoice::Off,
        ..AttachOptions::default()
    };
    let port = lab.switch.attach("pa", options);
    assert!(answers(&lab.a, "10.9.0.9"), "{}", port.mode());
}

#[test]
fn a_qdisc_of_the_ports_own_may_come_and_go_beside_the_filter() {
    let lab = Lab::new(1500);
    let port = lab.switch.attach("pa", AttachOptions::default());
    lab.switch.command("tc qdisc add dev pa ingress");
    lab.switch.command("tc qdisc del dev pa ingress");
    assert!(port.mode().contains("hidden by"), "{}", port.mode());
    lab.switch.ip("addr add 10.9.0.9/24 dev pa");
    assert!(!answers(&lab.a, "10.9.0.9"));
}

/// Receives until the queue says Gone.
fn until_gone(end: &mut End) {
    let mut frames = Vec::new();
    eventually("the queue says Gone", || {
        wait([end.queue.as_fd()].into_iter(), 20);
        end.queue.receive(&mut end.pool, &mut frames, 32).unwrap() == RxStatus::Gone
    });
    assert_eq!(end.send(test_frame(60, 1)).refused_for(TxRefusal::Gone), 1);
    // And stays so.
    let again = end.queue.receive(&mut end.pool, &mut frames, 32).unwrap();
    assert_eq!(again, RxStatus::Gone);
    end.port.host_counters();
    end.port.mode();
}

#[test]
fn a_device_deleted_under_the_port_is_gone() {
    for hide in [HideChoice::Auto, HideChoice::Nftables] {
        let lab = Lab::new(1500);
        let options = AttachOptions {
            hide,
            ..AttachOptions::default()
        };
        let mut end = End::new(lab.switch.attach("pa", options));
        lab.switch.ip("link del pa");
        until_gone(&mut end);
        drop(end);
        assert_eq!(lab.switch.command("nft list tables"), "");
    }
}

#[test]
fn a_device_that_leaves_the_namespace_is_gone() {
    let lab = Lab::new(1500);
    let mut end = End::new(lab.switch.attach("pa", AttachOptions::default()));
    lab.switch
        .ip(&format!("link set pa netns {}", lab.b.path()));
    until_gone(&mut end);
}

#[test]
fn a_tap_or_pair_deleted_by_hand_is_gone() {
    for force_veth in [false, true] {
        let netns = Netns::new();
        let options = InternalOptions {
            force_veth,
            ..InternalOptions::default()
        };
        let port = netns.run(move || create_internal("int0", &options).unwrap());
        netns.ip("link set int0 up");
        let mut end = End::new(port);
        netns.ip("link del int0");
        until_gone(&mut end);
    }
}

#[test]
fn a_port_that_is_down_refuses_and_comes_back() {
    let lab = Lab::new(1500);
    let _forwarder = lab.forward();
    let options = AttachOptions {
        hide: HideChoice::Off,
        ..AttachOptions::default()
    };
    let mut a = End::new(lab.a.attach("eth0", options.clone()));
    let mut b = End::new(lab.b.attach("eth0", options));
    lab.a.ip("link set eth0 down");
    assert_eq!(a.send(test_frame(60, 1)).refused_for(TxRefusal::Down), 1);
    assert!(a.next(50).is_none());
    lab.a.ip("link set eth0 up");
    // A veth's carrier, and with it its peer's queueing discipline, comes back a little later.
    eventually("frames from a arrive at b", || {
        assert_eq!(a.send(test_frame(60, 2)).packets, 1);
        b.next(100).is_some()
    });
    eventually("frames from b arrive at a", || {
        b.send(test_frame(60, 3));
        a.next(100).is_some()
    });

    let tap = lab
        .switch
        .run(|| create_internal("int0", &InternalOptions::default()).unwrap());
    let mut tap = End::new(tap);
    assert_eq!(tap.send(test_frame(60, 1)).refused_for(TxRefusal::Down), 1);
    lab.switch.ip("link set int0 up");
    assert_eq!(tap.send(test_frame(60, 1)).packets, 1);
}

#[test]
fn an_internal_port_is_made_as_asked_and_goes_with_its_queues() {
    for force_veth in [false, true] {
        let netns = Netns::new();
        let options = InternalOptions {
            mac: Some([2, 0, 0, 0, 0, 77]),
            mtu: Some(2000),
            tx_queue_len: Some(77),
            force_veth,
            ..InternalOptions::default()
        };
        let port = netns.run(move || create_internal("int%d", &options).unwrap());
        assert_eq!(port.name(), "int0");
        let link = netns.link("int0");
        assert_eq!(link.index, port.ifindex());
        assert_eq!((link.mac, link.mtu), (Some([2, 0, 0, 0, 0, 77]), 2000));
        assert_eq!(port.capabilities().max_frame, 2014);
        assert!(!link.is_up());
        assert!(netns.ip("link show int0").contains("qlen 77"));
        let queues = port.open_queues().unwrap();
        assert_eq!(port.open_queues().err().unwrap().errno(), libc::EBUSY);
        drop(port);
        netns.link("int0");
        drop(queues);
        // Not at once: another test's child between fork and exec has the descriptor of the TAP too.
        eventually("only lo remains", || {
            netns.run(|| vport::link::all().unwrap().len() == 1)
        });
    }
}

#[test]
fn a_random_mac_is_locally_administered() {
    let netns = Netns::new();
    let _port = netns.run(|| create_internal("int0", &InternalOptions::default()).unwrap());
    let mac = netns.link("int0").mac.unwrap();
    assert_eq!(mac[0] & 3, 2);
}

#[test]
fn a_name_that_is_taken_is_eexist_and_a_bad_one_einval() {
    let netns = Netns::new();
    netns.ip("link add v0 type veth peer name v1");
    netns.run(|| {
        for force_veth in [false, true] {
            let options = InternalOptions {
                force_veth,
                ..InternalOptions::default()
            };
            let errno = |name: &str| create_internal(name, &options).err().unwrap().errno();
            assert_eq!(errno("v0"), libc::EEXIST);
            assert_eq!(errno("lo"), libc::EEXIST);
            let _tap = create_internal("int0", &options).unwrap();
            assert_eq!(errno("int0"), libc::EEXIST);
            for bad in ["", "a/b", "a b", "sixteen-letters.", "..", "a:b"] {
                assert_eq!(errno(bad), libc::EINVAL, "{bad:?}");
            }
        }
        assert_eq!(vport::link::all().unwrap().len(), 3, "nothing left behind");
    });
}

#[test]
fn a_device_that_can_not_be_a_port_says_why() {
    let netns = Netns::new();
    netns.ip("link add v0 type veth peer name v1");
    netns.ip("link add br0 type bridge");
    netns.ip("link set v1 master br0");
    netns.ip("tuntap add dev tun0 mode tun");
    netns.run(|| {
        let refused = |name: &str, driver| {
            let options = AttachOptions {
                driver,
                ..AttachOptions::default()
            };
            attach(name, &options).err().unwrap()
        };
        let auto = DriverChoice::Auto;
        assert_eq!(refused("nothere", auto).errno(), libc::ENODEV);
        assert_eq!(refused("lo", auto).errno(), libc::EINVAL);
        assert_eq!(refused("tun0", auto).errno(), libc::EINVAL);
        let busy = refused("v1", auto);
        assert_eq!(busy.errno(), libc::EBUSY);
        assert!(busy.to_string().contains("v1 belongs to br0"), "{busy}");
    });
}

#[test]
fn an_internal_port_that_is_moved_stays_a_port_and_tells_where_it_is() {
    for force_veth in [false, true] {
        let lab = Lab::new(1500);
        let options = InternalOptions {
            force_veth,
            ..InternalOptions::default()
        };
        let port = lab
            .switch
            .run(move || create_internal("int0", &options).unwrap());
        let (port, none) = lab.switch.run(move || {
            let id = port.netnsid();
            (port, id)
        });
        assert_eq!(none, None);
        lab.switch
            .ip(&format!("link set int0 netns {}", lab.a.path()));
        lab.a.ip("link set int0 addrgenmode none");
        lab.a.ip("link set int0 up");
        let (port, id) = lab.switch.run(move || {
            let id = port.netnsid();
            (port, id)
        });
        let id = id.unwrap();
        assert!(
            lab.switch
                .ip("netns list-id")
                .contains(&format!("nsid {id} ")),
            "{id}"
        );
        let mut end = End::new(port);
        assert_eq!(end.send(test_frame(60, 1)).packets, 1);
        assert!(
            lab.a.ip("-s link show int0").contains("60"),
            "received there"
        );
    }
}

#[test]
fn devices_of_our_own_go_together_and_one_that_moved_stays() {
    let lab = Lab::new(1500);
    lab.switch.ip("link add other type veth peer name rehto");
    let left = lab.switch.run(|| {
        let make = |n: u32| create_internal(&format!("int{n}"), &InternalOptions::default());
        (0..8).map(|n| make(n).unwrap()).collect::<Vec<_>>()
    });
    lab.switch
        .ip(&format!("link set int3 netns {}", lab.a.path()));
    lab.switch.ip("link del int5");
    let left = lab.switch.run(move || {
        let own: Vec<u32> = left.iter().filter_map(|port| port.own_device()).collect();
        assert_eq!(
            own.len(),
            6,
            "all but the one that moved and the one that went"
        );
        vport::link::delete_together(&own).unwrap();
        left
    });
    let links = lab.switch.ip("-br link");
    assert!(!links.contains("int") && links.contains("other"), "{links}");
    assert!(lab.a.ip("-br link").contains("int3"), "moved, not deleted");
    drop(left);
    assert!(!lab.a.ip("-br link").contains("int3"), "gone with its port");
}

#[test]
fn what_nobody_reads_is_counted() {
    let lab = Lab::new(1500);
    let options = InternalOptions {
        tx_queue_len: Some(10),
        ..InternalOptions::default()
    };
    let tap = lab
        .switch
        .run(move || create_internal("int0", &options).unwrap());
    lab.switch.ip("link set int0 addrgenmode none");
    lab.switch.ip("link set int0 up");
    let sender = lab.switch.attach("int0", AttachOptions::default());
    let mut pool = Pool::default();
    let mut outcome = vport::TxOutcome::default();
    for _ in 0..3 {
        let mut frames = (0..20).map(|n| test_frame(60, n)).collect();
        sender.transmit(&mut frames, &mut pool, &mut outcome);
        assert!(frames.is_empty());
    }
    assert_eq!(outcome.packets + outcome.refused_total(), 60);
    let (_tap, counters) = lab.switch.run(move || {
        let counters = tap.host_counters();
        (tap, counters)
    });
    assert_eq!(counters.queue_full, 50, "{counters:?}, {outcome:?}");

    // AF_PACKET: until the socket's buffer is full.
    let port = lab.switch.attach("pa", AttachOptions::default());
    let off = AttachOptions {
        hide: HideChoice::Off,
        ..AttachOptions::default()
    };
    let peer = lab.a.attach("eth0", off);
    eventually("drops are counted", || {
        let mut frames = (0..32).map(|n| test_frame(1000, n)).collect();
        for _ in 0..100 {
            peer.transmit(&mut frames, &mut pool, &mut outcome);
            frames.extend((0..32).map(|n| test_frame(1000, n)));
        }
        port.host_counters().queue_full > 0
    });
    let first = port.host_counters().queue_full;
    assert_eq!(
        port.host_counters().queue_full,
        first,
        "reading clears nothing of ours"
    );
}

#[test]
fn links_that_come_change_are_renamed_and_go_are_told_of() {
    let netns = Netns::new();
    let other = Netns::new();
    let mut monitor = netns.run(|| LinkMonitor::new().unwrap());
    let mut events = Vec::new();
    monitor.receive(&mut events).unwrap();
    assert!(
        matches!(&events[..], [LinkEvent::New(link)] if link.name == "lo"),
        "{events:?}"
    );

    let mut after = |line: String| {
        netns.ip(&line);
        let mut events = Vec::new();
        // The kernel tells within the request; a carrier's change comes later.
        wait([monitor.as_fd()].into_iter(), 1000);
        monitor.receive(&mut events).unwrap();
        events
    };
    let events = after("link add v0 type veth peer name v1".into());
    let named = |events: &[LinkEvent], name: &str| {
        events.iter().find_map(|event| match event {
            LinkEvent::New(link) if link.name == name => Some(link.clone()),
            _ => None,
        })
    };
    let v0 = named(&events, "v0").unwrap();
    assert_eq!(v0.kind.as_deref(), Some("veth"));
    let events = after("link set v0 mtu 1400".into());
    assert_eq!(named(&events, "v0").unwrap().mtu, 1400);
    let events = after("link set v0 up".into());
    assert!(named(&events, "v0").unwrap().is_up());
    let events = after("link set v1 name w1".into());
    assert!(events.iter().any(|event| matches!(event,
        LinkEvent::Renamed { old_name, link } if old_name == "v1" && link.name == "w1")));
    // A bridge tells of its ports in the same group, also when one leaves: that isn't the end.
    after("link add br0 type bridge".into());
    after("link set v0 master br0".into());
    let events = after("link set v0 nomaster".into());
    assert!(
        !events
            .iter()
            .any(|event| matches!(event, LinkEvent::Gone { .. })),
        "{events:?}"
    );
    let events = after(format!("link set v0 netns {}", other.path()));
    assert!(events.contains(&LinkEvent::Gone {
        index: v0.index,
        name: "v0".into()
    }));
    let events = after("link del w1".into());
    assert!(
        events.iter().any(|event| matches!(event,
        LinkEvent::Gone { name, .. } if name == "w1")),
        "{events:?}"
    );
}

#[test]
fn a_monitor_that_lost_events_catches_up() {
    let netns = Netns::new();
    netns.ip("link add old type veth peer name old1");
    let mut monitor = netns.run(|| LinkMonitor::new().unwrap());
    let mut events = Vec::new();
    monitor.receive(&mut events).unwrap();
    // Far more notifications than fit the socket's buffer.
    netns.run(|| {
        let old = vport::link::by_name("old").unwrap().index;
        for n in 0..6000u32 {
            vport::link::set_mtu(old, 1000 + n % 400).unwrap();
        }
        vport::link::delete(old).unwrap();
        let veth = vport::link::Veth {
            name: "new",
            peer: "new1",
            ifindex: None,
            mac: None,
            mtu: None,
            peer_mtu: None,
            peer_silent: false,
        };
        vport::link::create_veth(&veth).unwrap();
    });
    let mut events = Vec::new();
    monitor.receive(&mut events).unwrap();
    let mut names: Vec<String> = vec!["lo".into(), "old".into(), "old1".into()];
    for event in events {
        match event {
            LinkEvent::New(link) if !names.contains(&link.name) => names.push(link.name),
            LinkEvent::New(_) | LinkEvent::Renamed { .. } => {}
            LinkEvent::Gone { name, .. } => names.retain(|known| *known != name),
        }
    }
    names.sort();
    assert_eq!(names, ["lo", "new", "new1"]);
}

#[test]
fn what_a_killed_daemon_left_is_cleaned_up_and_nothing_else() {
    let netns = Netns::new();
    // As left by one that was killed: a pair with its mark, a table without an owner.
    netns.ip("link add int0 type veth peer name dpd-0000000a");
    netns.ip("link set dpd-0000000a alias ovs-dpd:mine");
    netns.ip("link add int1 type veth peer name dpd-0000000b");
    netns.ip("link set dpd-0000000b alias ovs-dpd:other");
    netns.command("nft add table netdev ovs_dpd_mine_7_0");
    netns.command("nft add table netdev ovs_dpd_mine_other_7_0");
    netns.ip("link add v0 type veth peer name v1");
    // And one that lives.
    let options = AttachOptions {
        hide: HideChoice::Nftables,
        run_prefix: "mine".into(),
        ..AttachOptions::default()
    };
    let living = netns.attach("v0", options);
    assert!(
        living.mode().contains("hidden by nftables"),
        "{}",
        living.mode()
    );
    let removed = netns.run(|| cleanup("mine").unwrap());
    assert_eq!(removed, ["ovs_dpd_mine_7_0", "dpd-0000000a"]);
    let tables = netns.command("nft list tables");
    assert!(tables.contains("ovs_dpd_mine_other_7_0"), "{tables}");
    assert!(
        tables.contains(&format!("ovs_dpd_mine_{}_", living.ifindex())),
        "{tables}"
    );
    let names: Vec<String> = netns.run(|| {
        vport::link::all()
            .unwrap()
            .into_iter()
            .map(|link| link.name)
            .collect()
    });
    for name in ["int1", "dpd-0000000b", "v0", "v1"] {
        assert!(
            names.iter().any(|known| known == name),
            "{name} in {names:?}"
        );
    }
    assert!(!names.iter().any(|name| name == "int0"));
    assert_eq!(netns.run(|| cleanup("mine").unwrap()), Vec::<String>::new());
}

/// Both are refused with EINVAL: a priority that this kernel doesn't take, and a malformed frame.
#[test]
fn a_malformed_frame_does_not_take_the_priorities_of_others() {
    let lab = Lab::new(1500);
    let frame = |malformed: bool| {
        let mut frame = test_frame(60, 1);
        frame.class.priority = 5;
        if malformed {
            frame.offload.csum = Some(frame::PartialChecksum {
                start: 6000,
                offset: 6,
            });
        }
        frame
    };
    let (mut pool, mut modes) = (Pool::default(), Vec::new());
    for frames in [vec![frame(false)], vec![frame(true), frame(false)]] {
        let port = lab.switch.attach("pa", AttachOptions::default());
        let mut outcome = TxOutcome::default();
        let malformed = frames.len() as u64 - 1;
        port.transmit(&mut { frames }, &mut pool, &mut outcome);
        assert_eq!(outcome.packets, 1, "{outcome:?}");
        assert_eq!(outcome.refused_for(TxRefusal::Error), malformed);
        let mut frames = vec![frame(true)];
        port.transmit(&mut frames, &mut pool, &mut outcome);
        assert_eq!(outcome.refused_for(TxRefusal::Error), malformed + 1);
        modes.push(port.mode().contains("priority and mark not carried"));
    }
    // Whatever this kernel can, it can after a malformed frame too.
    let uname = rustix::system::uname();
    let release = uname.release().to_string_lossy().into_owned();
    let mut numbers = release.split('.').map_while(|n| n.parse::<u32>().ok());
    let version = (numbers.next().unwrap(), numbers.next().unwrap());
    assert_eq!(modes, [version < (6, 14); 2], "{release}");
}
