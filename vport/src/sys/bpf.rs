//! bpf(2), and with it a program that drops everything, and the link that puts it in front of the
//! host's stack. ([`super::xdp`] has the other program.)
//!
//! Source: uapi `linux/bpf.h`.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use rustix::io::Errno;

use super::last;

pub(super) const PROG_LOAD: libc::c_int = 5;
const LINK_CREATE: libc::c_int = 28;
const LINK_DETACH: libc::c_int = 34;
const PROG_TYPE_SOCKET_FILTER: u32 = 1;
const PROG_TYPE_SCHED_CLS: u32 = 3;
const TCX_INGRESS: u32 = 46;
/// In front of whatever else is attached.
const F_BEFORE: u32 = 1 << 3;
const TCX_DROP: i32 = 2;

/// `struct bpf_insn`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Instruction {
    pub(super) code: u8,
    pub(super) registers: u8,
    pub(super) offset: i16,
    pub(super) immediate: i32,
}

/// The `BPF_PROG_LOAD` part of `union bpf_attr`, up to `expected_attach_type`.
#[repr(C)]
#[derive(Default)]
pub(super) struct ProgLoad {
    pub(super) prog_type: u32,
    pub(super) insn_cnt: u32,
    pub(super) insns: u64,
    pub(super) license: u64,
    pub(super) log_level: u32,
    pub(super) log_size: u32,
    pub(super) log_buf: u64,
    pub(super) kern_version: u32,
    pub(super) prog_flags: u32,
    pub(super) prog_name: [u8; 16],
    pub(super) prog_ifindex: u32,
    pub(super) expected_attach_type: u32,
}

/// The `BPF_LINK_CREATE` part, as for tcx.
#[repr(C)]
#[derive(Default)]
pub(super) struct LinkCreate {
    pub(super) prog_fd: u32,
    pub(super) target_ifindex: u32,
    pub(super) attach_type: u32,
    pub(super) flags: u32,
    pub(super) relative_fd: u32,
    pub(super) reserved: u32,
    pub(super) expected_revision: u64,
}

/// The `BPF_LINK_DETACH` part.
#[repr(C)]
struct LinkDetach {
    link_fd: u32,
}

/// A program on a device: off when dropped, or when the process goes.
#[derive(Debug)]
pub(crate) struct ProgramLink {
    fd: OwnedFd,
}

impl Drop for ProgramLink {
    fn drop(&mut self) {
        // Closing would do, but for a child between fork and exec, which has the descriptor too.
        let detach = LinkDetach {
            link_fd: self.fd.as_raw_fd() as u32,
        };
        // SAFETY: the structure that LINK_DETACH takes, without pointers. It fails where the device is
        // gone, and with it the program.
        let _ = unsafe { bpf(LINK_DETACH, &detach) };
    }
}

impl ProgramLink {
    /// Puts a program where `create` says.
    pub(super) fn new(create: &LinkCreate) -> Result<Self, Errno> {
        // SAFETY: the structure that LINK_CREATE takes, without pointers; it gives a descriptor. The
        // link keeps the program, and that its maps.
        let fd = unsafe { bpf_fd(LINK_CREATE, create)? };
        Ok(Self { fd })
    }
}

/// # Safety
/// `T` is the part of `union bpf_attr` that `command` takes, its pointers valid for what the command
/// does with them.
pub(super) unsafe fn bpf<T>(command: libc::c_int, attributes: &T) -> Result<libc::c_int, Errno> {
    // SAFETY: the caller's promise; the length is the structure's.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_ref(attributes),
            size_of::<T>(),
        )
    };
    let result = i32::try_from(result).map_err(|_| Errno::IO)?;
    if result < 0 { Err(last()) } else { Ok(result) }
}

/// The same of a command that makes a descriptor (all are close-on-exec).
///
/// # Safety
/// As for [`bpf`], and the command gives a new descriptor.
pub(super) unsafe fn bpf_fd<T>(command: libc::c_int, attributes: &T) -> Result<OwnedFd, Errno> {
    // SAFETY: the caller's promise.
    let fd = unsafe { bpf(command, attributes)? };
    // SAFETY: the kernel made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A name as `union bpf_attr` holds it: cut to 15 bytes, NUL behind.
pub(super) fn name(text: &[u8]) -> [u8; 16] {
    let mut name = [0; 16];
    for (to, from) in name.iter_mut().zip(text.iter().take(15)) {
        *to = *from;
    }
    name
}

/// Drops what the device receives before the host's stack sees it, and after packet sockets have,
/// until what is given is dropped. Needs Linux 6.6 and CAP_BPF in the initial user namespace.
pub(crate) fn drop_ingress(ifindex: u32) -> Result<ProgramLink, Errno> {
    let program = [
        // r0 = TCX_DROP (BPF_ALU64 | BPF_MOV | BPF_K)
        Instruction {
            code: 0xb7,
            registers: 0,
            offset: 0,
            immediate: TCX_DROP,
        },
        // return r0 (BPF_JMP | BPF_EXIT)
        Instruction {
            code: 0x95,
            registers: 0,
            offset: 0,
            immediate: 0,
        },
    ];
    let license = c"Apache-2.0";
    let load = ProgLoad {
        prog_type: PROG_TYPE_SCHED_CLS,
        insn_cnt: program.len() as u32,
        insns: program.as_ptr().expose_provenance() as u64,
        license: license.as_ptr().expose_provenance() as u64,
        prog_name: name(b"ovs_dpd_hide"),
        expected_attach_type: TCX_INGRESS,
        ..ProgLoad::default()
    };
    // SAFETY: `load` points at `program` and `license`, both alive, with their lengths.
    let program = unsafe { bpf_fd(PROG_LOAD, &load)? };
    let create = LinkCreate {
        prog_fd: program.as_raw_fd() as u32,
        target_ifindex: ifindex,
        attach_type: TCX_INGRESS,
        flags: F_BEFORE,
        ..LinkCreate::default()
    };
    ProgramLink::new(&create)
}

/// A socket filter that refuses what a virtio-net header can't say for certain: SCTP over IPv4 or IPv6 to
/// be segmented, behind up to one tag in band.
pub(crate) fn sayable() -> Result<OwnedFd, Errno> {
    const GSO_SIZE: i16 = 176; // in struct __sk_buff
    const ETHER_TYPE: i32 = 12;
    const NEXT_HEADER_V4: i32 = 23;
    const NEXT_HEADER_V6: i32 = 20;
    const SCTP: i32 = 132;
    let instruction = |code, registers, offset, immediate| Instruction {
        code,
        registers,
        offset,
        immediate,
    };
    // BPF_LD | BPF_IND: r0 = what is at r7 + `at`, in host order; what isn't there ends the program with 0.
    let half = |at| instruction(0x48, 0x70, 0, at);
    let byte = |at| instruction(0x50, 0x70, 0, at);
    // Of r0: skips the next instructions if it is `value`, or if it isn't.
    let if_equal = |value, skip| instruction(0x15, 0, skip, value);
    let unless_equal = |value, skip| instruction(0x55, 0, skip, value);
    let set = |register, value| instruction(0xb7, register, 0, value);
    let exit = instruction(0x95, 0, 0, 0);
    let program = [
        instruction(0xbf, 0x16, 0, 0),        // 0: r6 = r1, for BPF_IND
        set(7, 0),                            // 1
        instruction(0x61, 0x60, GSO_SIZE, 0), // 2: r0 = gso_size
        if_equal(0, 11),                      // 3: to 15
        half(ETHER_TYPE),                     // 4
        if_equal(0x8100, 1),                  // 5: to 7
        unless_equal(0x88a8, 2),              // 6: to 9
        set(7, 4),                            // 7: behind the tag
        half(ETHER_TYPE),                     // 8
        if_equal(0x0800, 3),                  // 9: to 13
        unless_equal(0x86dd, 4),              // 10: to 15
        byte(NEXT_HEADER_V6),                 // 11
        instruction(0x05, 0, 1, 0),           // 12: to 14
        byte(NEXT_HEADER_V4),                 // 13
        if_equal(SCTP, 2),                    // 14: to 17
        instruction(0xb4, 0, 0, -1),          // 15: all of it
        exit,                                 // 16
        set(0, 0),                            // 17: nothing of it
        exit,                                 // 18
    ];
    let license = c"Apache-2.0";
    let load = ProgLoad {
        prog_type: PROG_TYPE_SOCKET_FILTER,
        insn_cnt: program.len() as u32,
        insns: program.as_ptr().expose_provenance() as u64,
        license: license.as_ptr().expose_provenance() as u64,
        prog_name: name(b"ovs_dpd_sayable"),
        ..ProgLoad::default()
    };
    // SAFETY: `load` points at `program` and `license`, both alive, with their lengths.
    unsafe { bpf_fd(PROG_LOAD, &load) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link;

    /// The `BPF_PROG_QUERY` part, up to `revision`.
    #[repr(C)]
    #[derive(Default)]
    struct ProgQuery {
        target_ifindex: u32,
        attach_type: u32,
        query_flags: u32,
        attach_flags: u32,
        prog_ids: u64,
        count: u32,
        padding: u32,
        more: [u64; 4],
    }

    /// How many programs look at what the device receives.
    fn programs(ifindex: u32) -> u32 {
        const PROG_QUERY: libc::c_int = 16;
        let query = ProgQuery {
            target_ifindex: ifindex,
            attach_type: TCX_INGRESS,
            ..ProgQuery::default()
        };
        let place = std::cell::UnsafeCell::new(query);
        // SAFETY: the structure that PROG_QUERY takes, of which it writes parts, without pointers.
        unsafe {
            bpf(PROG_QUERY, &*place.get()).unwrap();
            place.get().read_volatile().count
        }
    }

    #[test]
    fn a_device_is_free_again_while_a_child_still_has_the_links_descriptor() {
        let run = || {
            #[expect(deprecated)] // the flag that makes it unsafe isn't used
            rustix::thread::unshare(rustix::thread::UnshareFlags::NEWNET).unwrap();
            let mut ip = std::process::Command::new("ip");
            ip.args("link add v0 type veth peer name v1".split(' '));
            assert!(ip.status().unwrap().success());
            let index = link::by_name("v0").unwrap().index;
            let link = drop_ingress(index).unwrap();
            // As a child has it between fork and exec.
            let child = link.fd.try_clone().unwrap();
            assert_eq!(programs(index), 1);
            drop(link);
            assert_eq!(programs(index), 0);
            drop(child);
        };
        std::thread::spawn(run).join().unwrap();
    }
}
