//! How a socket comes to the daemon, and how it is known again.

use core::cell::UnsafeCell;
use core::ffi::{CStr, c_int};
use core::mem::offset_of;
use core::sync::atomic::{
    AtomicU32,
    Ordering::{AcqRel, Acquire, Release},
};

use transport::{Hello, Netns, Status, VERSION, WELCOME_LEN, Welcome};

use crate::{sys, table};

/// How long a daemon may take to let a client in, before it counts as none.
const PATIENCE_MS: i64 = 5000;

/// Whether the daemon may serve sockets of this protocol. (Those of NETLINK_ROUTE stay the kernel's.)
pub fn serves(domain: c_int, kind: c_int, protocol: c_int) -> bool {
    let kind = kind & !(libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK);
    domain == libc::AF_NETLINK
        && (protocol == libc::NETLINK_GENERIC || protocol == libc::NETLINK_NETFILTER)
        && (kind == libc::SOCK_RAW || kind == libc::SOCK_DGRAM)
}

/// What of a socket survives exec: it is in the socket's own (abstract) name, which no other
/// socket in this network namespace can have while it lives.
#[derive(Debug, Clone, Copy)]
pub struct Name {
    pub port_id: u32,
    /// SOCK_RAW or SOCK_DGRAM.
    pub kind: c_int,
    /// `NETLINK_GENERIC` or `NETLINK_NETFILTER`.
    pub protocol: c_int,
}

const PREFIX: &[u8] = b"\0ovs-dpd/1/";
/// Prefix, kind and protocol of two hexadecimal digits, port id of 8, the daemon's instance of
/// 16.
const NAME_LEN: usize = PREFIX.len() + 2 + 2 + 8 + 16;

impl Name {
    fn address(self, instance: u64) -> libc::sockaddr_un {
        let mut address = libc::sockaddr_un {
            sun_family: libc::AF_UNIX as libc::sa_family_t,
            sun_path: [0; 108],
        };
        let digits = hexadecimal(self.kind as u64, 2)
            .chain(hexadecimal(self.protocol as u64, 2))
            .chain(hexadecimal(u64::from(self.port_id), 8))
            .chain(hexadecimal(instance, 16));
        for (to, from) in address
            .sun_path
            .iter_mut()
            .zip(PREFIX.iter().copied().chain(digits))
        {
            *to = from as libc::c_char;
        }
        address
    }

    fn parse(name: &[u8]) -> Option<Self> {
        let digits = name.strip_prefix(PREFIX)?;
        let number = |at: usize, count: usize| -> Option<u64> {
            digits
                .get(at..)?
                .get(..count)?
                .iter()
                .try_fold(0u64, |number, digit| {
                    Some(number << 4 | u64::from(char::from(*digit).to_digit(16)?))
                })
        };
        Some(Self {
            kind: number(0, 2)? as c_int,
            protocol: number(2, 2)? as c_int,
            port_id: number(4, 8)? as u32,
        })
    }
}

fn hexadecimal(value: u64, digits: u32) -> impl Iterator<Item = u8> {
    (0..digits).rev().map(move |digit| {
        let nibble = (value >> (digit.saturating_mul(4).min(60)) & 0xf) as u8;
        if nibble < 10 {
            b'0'.wrapping_add(nibble)
        } else {
            b'a'.wrapping_add(nibble.wrapping_sub(10))
        }
    })
}

/// The name of a descriptor, if that is a socket of ours.
pub fn name_of(fd: c_int) -> Option<Name> {
    let (bytes, length) = sys::unix_name(fd)?;
    Name::parse(bytes.get(..length)?)
}

/// What `socket(AF_NETLINK, kind, protocol)` gives: None for a real netlink socket.
pub fn open(kind: c_int, protocol: c_int) -> Option<Result<c_int, sys::Errno>> {
    let (fd, welcome) = reach(kind & libc::SOCK_CLOEXEC, protocol)?;
    let bare = kind & !(libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK);
    let name = Name {
        port_id: welcome.port_id,
        kind: bare,
        protocol,
    };
    let address = name.address(welcome.instance);
    let length = offset_of!(libc::sockaddr_un, sun_path) + NAME_LEN;
    // Without its name it would not be known again after exec, and only then.
    let _ = sys::bind(fd, &address, length);
    let ready = if kind & libc::SOCK_NONBLOCK == 0 {
        block(fd)
    } else {
        Ok(())
    };
    match ready.and_then(|()| table::register(fd, name)) {
        Ok(()) => Some(Ok(fd)),
        Err(error) => {
            sys::close(fd);
            Some(Err(error))
        }
    }
}

/// A connection of our own, that no program knows of. None: no daemon serves this protocol here.
pub fn side(protocol: c_int) -> Option<(c_int, Welcome)> {
    reach(libc::SOCK_CLOEXEC, protocol)
}

fn reach(flags: c_int, protocol: c_int) -> Option<(c_int, Welcome)> {
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_NONBLOCK | flags;
    let fd = sys::socket(libc::AF_UNIX, kind, 0).ok()?;
    let Some(welcome) = greet(fd, protocol) else {
        sys::close(fd);
        return None;
    };
    Some((fd, welcome))
}

fn block(fd: c_int) -> Result<(), sys::Errno> {
    let flags = sys::fcntl(fd, libc::F_GETFL, 0)?;
    sys::fcntl(fd, libc::F_SETFL, flags & !libc::O_NONBLOCK).map(|_| ())
}

fn greet(fd: c_int, protocol: c_int) -> Option<Welcome> {
    connect(fd)?;
    let (dev, ino) = sys::stat(c"/proc/thread-self/ns/net").unwrap_or((0, 0));
    let netns = Netns { dev, ino };
    let hello = Hello {
        version: VERSION,
        protocol: protocol as u32,
        netns,
    };
    sys::send(
        fd,
        &hello.to_bytes(),
        libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT,
    )
    .ok()?;
    let mut bytes = [0; WELCOME_LEN];
    let mut waited = 0;
    let length = loop {
        match sys::recv(fd, &mut bytes, libc::MSG_DONTWAIT) {
            Ok(length) => break length,
            Err(libc::EAGAIN) if waited < PATIENCE_MS => {
                if !sys::wait(fd, libc::POLLIN, 100) {
                    waited = waited.saturating_add(100);
                }
            }
            Err(_) => return None,
        }
    };
    let welcome = Welcome::parse(bytes.get(..length)?)?;
    (welcome.status == Status::Ok).then_some(welcome)
}

fn connect(fd: c_int) -> Option<()> {
    let (address, length, directory) = address()?;
    let mut waited = 0;
    let connected = loop {
        match sys::connect(fd, &address, length) {
            // The daemon hasn't accepted those who came before yet; there is nothing to poll.
            Err(libc::EAGAIN) if waited < PATIENCE_MS => {
                sys::pause(5);
                waited = waited.saturating_add(5);
            }
            Err(_) => break None,
            Ok(_) => break Some(()),
        }
    };
    if let Some(directory) = directory {
        sys::close(directory);
    }
    connected
}

/// The daemon's socket; with a descriptor to be closed after connecting.
fn address() -> Option<(libc::sockaddr_un, usize, Option<c_int>)> {
    let directory = run_directory()?;
    if let Some((address, length)) = join(directory.to_bytes()) {
        return Some((address, length, None));
    }
    // A UNIX address holds 107 bytes. A longer one can be reached through a descriptor.
    let fd = sys::open_directory(directory).ok()?;
    let mut path = [0u8; 32];
    let digits = decimal(fd as u32);
    let text = b"/proc/self/fd/"
        .iter()
        .copied()
        .chain(digits.into_iter().filter(|digit| *digit != 0));
    for (to, from) in path.iter_mut().zip(text) {
        *to = from;
    }
    let end = path.iter().position(|byte| *byte == 0)?;
    let (address, length) = join(path.get(..end)?)?;
    Some((address, length, Some(fd)))
}

fn join(directory: &[u8]) -> Option<(libc::sockaddr_un, usize)> {
    let mut address = libc::sockaddr_un {
        sun_family: libc::AF_UNIX as libc::sa_family_t,
        sun_path: [0; 108],
    };
    let name = transport::SOCKET_NAME.as_bytes();
    let path = directory.iter().chain(b"/").chain(name);
    let length = directory.len().checked_add(1)?.checked_add(name.len())?;
    if length >= address.sun_path.len() {
        return None;
    }
    for (to, from) in address.sun_path.iter_mut().zip(path) {
        *to = *from as libc::c_char;
    }
    Some((
        address,
        offset_of!(libc::sockaddr_un, sun_path) + length + 1,
    ))
}

/// Whether the daemon has marked the link of this name as its own.
pub fn is_marked(name: &[u8]) -> bool {
    // Names have no colon, marks of indices begin with one.
    let a_name = !name.is_empty() && name.len() < libc::IFNAMSIZ && !name.contains(&b':');
    a_name && name != b"." && name != b".." && !name.contains(&b'/') && is_there(&[name])
}

/// The same by its index.
pub fn is_marked_index(index: u32) -> bool {
    let digits = decimal(index);
    let start = digits.iter().position(|digit| *digit != 0).unwrap_or(0);
    is_there(&[b":", digits.get(start..).unwrap_or_default()])
}

/// Whether there is such a mark.
#[inline(never)] // Its buffer is on the stack only while it is needed.
fn is_there(mark: &[&[u8]]) -> bool {
    let Some(directory) = run_directory() else {
        return false;
    };
    let mut path = [0u8; libc::PATH_MAX as usize];
    let parts = [
        directory.to_bytes(),
        b"/",
        transport::LINKS_NAME.as_bytes(),
        b"/",
    ];
    let bytes = parts.iter().chain(mark).flat_map(|part| part.iter());
    let mut length = 0usize;
    for (to, from) in path.iter_mut().zip(bytes) {
        *to = *from;
        length = length.wrapping_add(1);
    }
    // One that doesn't fit has no NUL left.
    length < path.len() && CStr::from_bytes_until_nul(&path).is_ok_and(sys::exists)
}

/// Decimal digits, with NULs in front.
fn decimal(mut value: u32) -> [u8; 10] {
    let mut digits = [0; 10];
    for digit in digits.iter_mut().rev() {
        *digit = b'0'.wrapping_add((value % 10) as u8);
        value /= 10;
        if value == 0 {
            break;
        }
    }
    digits
}

/// The run directory, copied once: a program may write over its environment later.
struct RunDirectory {
    /// 0 not read, 1 being read, 2 there, 3 none (too long).
    state: AtomicU32,
    bytes: UnsafeCell<[u8; libc::PATH_MAX as usize]>,
}

// SAFETY: `bytes` is written by the one that changes `state` from 0 to 1, and read only at 2.
unsafe impl Sync for RunDirectory {}

static RUN_DIRECTORY: RunDirectory = RunDirectory {
    state: AtomicU32::new(0),
    bytes: UnsafeCell::new([0; libc::PATH_MAX as usize]),
};

/// Reads the environment, once: from the constructor, or from a hook that comes before it.
pub fn prepare() {
    let own = &RUN_DIRECTORY;
    if own.state.compare_exchange(0, 1, AcqRel, Acquire).is_err() {
        return;
    }
    // SAFETY: a C string's name; the environment is only read here, at the program's start.
    let value = unsafe { libc::getenv(c"OVS_DPD_RUNDIR".as_ptr()) };
    let value = if value.is_null() {
        transport::DEFAULT_RUNDIR.as_bytes()
    } else {
        // SAFETY: getenv gives a C string, copied before anything else can run.
        unsafe { CStr::from_ptr(value) }.to_bytes()
    };
    let value = if value.is_empty() {
        transport::DEFAULT_RUNDIR.as_bytes()
    } else {
        value
    };
    // SAFETY: state 1 is ours alone.
    let bytes = unsafe { &mut *own.bytes.get() };
    let fits = value.len() < bytes.len();
    for (to, from) in bytes.iter_mut().zip(value) {
        *to = *from;
    }
    own.state.store(if fits { 2 } else { 3 }, Release);
}

fn run_directory() -> Option<&'static CStr> {
    prepare();
    if RUN_DIRECTORY.state.load(Acquire) != 2 {
        return None;
    }
    // SAFETY: at state 2 nobody writes any more.
    CStr::from_bytes_until_nul(unsafe { &*RUN_DIRECTORY.bytes.get() }).ok()
}
