//! Failures injected below the ladder: which rungs are tried, in which order, and what is said.

use std::cell::{Cell, RefCell};
use std::process::Command;

use super::*;

/// The kernel, but for the calls that are told to fail; notes what was asked.
#[derive(Default)]
struct Scripted {
    map: Option<Errno>,
    /// For rings of more than so many entries.
    socket: Option<(u32, Errno)>,
    zero_copy: Option<Errno>,
    /// For the first so many calls.
    bind: Option<(u32, Errno)>,
    native: Option<Errno>,
    attach: Option<(u32, Errno)>,
    binds: Cell<u32>,
    attachs: Cell<u32>,
    pauses: Cell<u32>,
    tight: Cell<bool>,
    /// A device that binds for zero copy, and what it says about that afterwards.
    pretends: Option<bool>,
    asked: RefCell<Vec<String>>,
}

impl Scripted {
    fn note(&self, what: impl Into<String>) {
        self.asked.borrow_mut().push(what.into());
    }
}

fn fails_until(count: &Cell<u32>, script: Option<(u32, Errno)>) -> Result<(), Errno> {
    count.set(count.get() + 1);
    match script {
        Some((until, errno)) if count.get() <= until => Err(errno),
        _ => Ok(()),
    }
}

impl System for Scripted {
    fn map(&self, queues: u32) -> Result<SocketMap, Errno> {
        self.map.map_or_else(|| SocketMap::new(queues), Err)
    }

    fn memory(&self, kind: Kind, sizes: Sizes, queues: u32, want: Want) -> Result<Lease, Errno> {
        self.tight.set(want == Want::Tight);
        let kind = match self.pretends {
            Some(_) => Kind {
                copying: Copying::Copy,
                ..kind
            },
            None => kind,
        };
        let (chunks, sent) = (sizes.chunks() * queues, sizes.transmit * queues);
        Lease::new(kind, chunks, sent, want)
    }

    fn socket(
        &self,
        lease: &Arc<Lease>,
        sizes: Sizes,
    ) -> Result<(XskSocket, Receiver, Sender), Errno> {
        let tight = if self.tight.get() { ", tight" } else { "" };
        self.note(format!(
            "socket {}+{}{tight}",
            sizes.receive, sizes.transmit
        ));
        match self.socket {
            Some((most, errno)) if sizes.receive > most => Err(errno),
            _ => XskSocket::new(lease, sizes),
        }
    }

    fn bind(&self, socket: &XskSocket, ifindex: u32, queue: u32, kind: Kind) -> Result<(), Errno> {
        let several = if kind.several { ", several chunks" } else { "" };
        self.note(format!("bind {queue} {:?}{several}", kind.copying));
        match self.zero_copy {
            Some(errno) if kind.copying == Copying::Zero => return Err(errno),
            _ => {}
        }
        fails_until(&self.binds, self.bind)?;
        socket.bind(ifindex, queue)
    }

    fn is_zero_copy(&self, socket: &XskSocket) -> Result<bool, Errno> {
        self.pretends.map_or_else(|| socket.is_zero_copy(), Ok)
    }

    fn attach(
        &self,
        map: &SocketMap,
        ifindex: u32,
        hook: Hook,
        several: bool,
    ) -> Result<ProgramLink, Errno> {
        self.note(format!("attach {hook:?}"));
        match self.native {
            Some(errno) if hook == Hook::Native => return Err(errno),
            _ => {}
        }
        fails_until(&self.attachs, self.attach)?;
        map.attach(ifindex, hook, several)
    }

    fn pause(&self, time: Duration) {
        self.pauses.set(self.pauses.get() + 1);
        // A queue that the last rung had is really busy for a moment.
        std::thread::sleep(time);
    }
}

/// Climbs on a veth of a namespace of its own; gives rung or refusals, and what was asked.
fn climbed(script: Scripted, queues: Option<u32>) -> (Result<Rung, Refused>, Scripted) {
    climbed_at(script, queues, 1500)
}

/// The same at that MTU.
fn climbed_at(
    script: Scripted,
    queues: Option<u32>,
    mtu: u32,
) -> (Result<Rung, Refused>, Scripted) {
    std::thread::scope(|scope| {
        let run = move || {
            #[expect(deprecated)] // the flag that makes it unsafe isn't used
            rustix::thread::unshare(rustix::thread::UnshareFlags::NEWNET).unwrap();
            let words = format!("link add v0 mtu {mtu} type veth peer name v1 mtu {mtu}");
            let mut ip = Command::new("ip");
            assert!(ip.args(words.split(' ')).status().unwrap().success());
            let link = crate::link::by_name("v0").unwrap();
            let result = climb(&Rung::ALL, |rung| hold(&script, &link, queues, rung));
            let program = crate::link::by_name("v0").unwrap().xdp;
            assert_eq!(program.is_some(), result.is_ok(), "a program stays");
            let result = result.map(|(held, rung, _)| {
                assert_eq!(held.channels.len(), 1);
                rung
            });
            assert_eq!(crate::link::by_name("v0").unwrap().xdp, None);
            (result, script)
        };
        scope.spawn(run).join().unwrap()
    })
}

fn refusals(result: &Result<Rung, Refused>) -> Vec<Rung> {
    let refused = result.as_ref().unwrap_err();
    refused.iter().map(|(rung, _)| *rung).collect()
}

#[test]
fn each_rung_that_fails_leads_to_the_next() {
    let (result, script) = climbed(Scripted::default(), Some(1));
    // A veth has no zero copy.
    assert_eq!(result, Ok(Rung::Native));
    assert_eq!(
        *script.asked.borrow(),
        [
            "socket 2048+1024",
            "bind 0 Zero",
            "socket 2048+1024",
            "bind 0 Copy",
            "attach Native"
        ]
    );
    for errno in [
        Errno::OPNOTSUPP,
        Errno::RANGE,
        Errno::INVAL,
        Errno::NOSPC,
        Errno::IO,
    ] {
        let native = Scripted {
            native: Some(errno),
            ..Scripted::default()
        };
        let (result, script) = climbed(native, Some(1));
        assert_eq!(result, Ok(Rung::Generic), "{errno:?}");
        assert_eq!(*script.asked.borrow().last().unwrap(), "attach Generic");
    }
    let none = Scripted {
        attach: Some((99, Errno::OPNOTSUPP)),
        ..Scripted::default()
    };
    let (result, _) = climbed(none, Some(1));
    assert_eq!(refusals(&result), Rung::ALL);
    let error = error("v0", &result.unwrap_err());
    assert_eq!(error.errno(), libc::EOPNOTSUPP);
    let text = error.to_string();
    for rung in [
        "zero copy: bind to queue 0",
        "native copy: program",
        "generic: program",
    ] {
        assert!(text.contains(rung), "{text}");
    }
}

#[test]
fn what_no_rung_can_mend_ends_the_attempt() {
    let cases = [
        Scripted {
            map: Some(Errno::PERM),
            ..Scripted::default()
        },
        Scripted {
            zero_copy: Some(Errno::NODEV),
            ..Scripted::default()
        },
        Scripted {
            socket: Some((0, Errno::AFNOSUPPORT)),
            ..Scripted::default()
        },
    ];
    for (script, errno) in cases
        .into_iter()
        .zip([Errno::PERM, Errno::NODEV, Errno::AFNOSUPPORT])
    {
        let (result, _) = climbed(script, Some(1));
        assert_eq!(refusals(&result), [Rung::ZeroCopy]);
        let text = error("v0", &result.unwrap_err()).to_string();
        assert!(text.ends_with(&errno.to_string()), "{text}");
    }
    // The same when it comes at a later rung.
    let script = Scripted {
        native: Some(Errno::PERM),
        ..Scripted::default()
    };
    assert_eq!(
        refusals(&climbed(script, Some(1)).0),
        [Rung::ZeroCopy, Rung::Native]
    );
}

#[test]
fn what_was_closed_a_moment_ago_is_waited_for() {
    let script = Scripted {
        bind: Some((7, Errno::BUSY)),
        zero_copy: Some(Errno::OPNOTSUPP),
        attach: Some((5, Errno::EXIST)),
        ..Scripted::default()
    };
    let (result, script) = climbed(script, Some(1));
    assert_eq!(result, Ok(Rung::Native));
    assert_eq!(script.pauses.get(), 12);
}

#[test]
fn what_stays_busy_is_said_in_words() {
    let script = Scripted {
        zero_copy: Some(Errno::BUSY),
        ..Scripted::default()
    };
    let (result, script) = climbed(script, Some(1));
    assert_eq!(refusals(&result), [Rung::ZeroCopy]);
    let text = error("v0", &result.unwrap_err()).to_string();
    assert!(
        text.contains("queue 0 belongs to another AF_XDP socket"),
        "{text}"
    );
    assert_eq!(script.pauses.get(), BUSY_TRIES - 1);

    let script = Scripted {
        native: Some(Errno::EXIST),
        ..Scripted::default()
    };
    let (result, _) = climbed(script, Some(1));
    let error = error("v0", &result.unwrap_err());
    assert_eq!(error.errno(), libc::EBUSY);
    assert!(error.to_string().contains("another XDP program"), "{error}");
}

#[test]
fn rings_shrink_to_what_may_be_locked() {
    let script = Scripted {
        socket: Some((512, Errno::NOBUFS)),
        ..Scripted::default()
    };
    let (result, script) = climbed(script, Some(1));
    assert_eq!(result, Ok(Rung::Native));
    assert_eq!(
        script.asked.borrow()[..5],
        [
            "socket 2048+1024",
            "socket 2048+1024, tight",
            "socket 1024+512, tight",
            "socket 512+256, tight",
            "bind 0 Zero"
        ]
    );
    let script = Scripted {
        socket: Some((0, Errno::NOBUFS)),
        ..Scripted::default()
    };
    let (result, _) = climbed(script, Some(1));
    assert_eq!(refusals(&result), [Rung::ZeroCopy]);
    let text = error("v0", &result.unwrap_err()).to_string();
    assert!(text.contains("KiB of locked memory"), "{text}");
}

#[test]
fn a_device_that_does_not_tell_its_queues_is_asked_one_by_one() {
    let (result, script) = climbed(Scripted::default(), None);
    assert_eq!(result, Ok(Rung::Native));
    let asked = script.asked.borrow();
    assert!(asked.contains(&"bind 1 Copy".into()), "{asked:?}");
    assert!(!asked.contains(&"bind 2 Copy".into()), "{asked:?}");
}

#[test]
fn memory_is_bounded_for_any_number_of_queues() {
    for queues in 1..=64 {
        let bytes = sizes(queues).bytes() * queues as usize;
        assert!(bytes <= 128 << 20, "{queues} queues: {bytes} bytes");
    }
}

#[test]
fn a_jumbo_device_asks_for_frames_in_several_chunks() {
    let script = Scripted {
        zero_copy: Some(Errno::OPNOTSUPP),
        ..Scripted::default()
    };
    let (result, script) = climbed_at(script, Some(1), 9000);
    assert_eq!(result, Ok(Rung::Native));
    let asked = script.asked.borrow();
    assert!(
        asked.contains(&"bind 0 Copy, several chunks".into()),
        "{asked:?}"
    );
}

#[test]
fn zero_copy_is_taken_from_a_device_that_has_it_and_says_so() {
    let script = |pretends| Scripted {
        pretends: Some(pretends),
        ..Scripted::default()
    };
    let (result, script_used) = climbed(script(true), Some(1));
    assert_eq!(result, Ok(Rung::ZeroCopy));
    let asked = script_used.asked.borrow();
    assert_eq!(*asked, ["socket 2048+1024", "bind 0 Zero", "attach Native"]);
    let (result, _) = climbed(script(false), Some(1));
    assert_eq!(result, Ok(Rung::Native));
}

#[test]
fn memory_that_nobody_can_share_any_more_is_replaced_by_fresh_one() {
    let script = Scripted {
        zero_copy: Some(Errno::OPNOTSUPP),
        bind: Some((1, Errno::BADF)),
        ..Scripted::default()
    };
    let (result, script) = climbed(script, Some(1));
    assert_eq!(result, Ok(Rung::Native));
    let binds = script.binds.get();
    assert_eq!(binds, 2);
    // It stays so: the next rung.
    let script = Scripted {
        zero_copy: Some(Errno::OPNOTSUPP),
        bind: Some((9, Errno::BADF)),
        ..Scripted::default()
    };
    let (result, _) = climbed(script, Some(1));
    assert_eq!(refusals(&result), Rung::ALL);
}
