//! bpf(2): a program that drops everything, and the link that puts it in front of the host's stack.
//!
//! Source: uapi `linux/bpf.h`.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use rustix::io::Errno;

use super::last;

const PROG_LOAD: libc::c_int = 5;
const LINK_CREATE: libc::c_int = 28;
const PROG_TYPE_SCHED_CLS: u32 = 3;
const TCX_INGRESS: u32 = 46;
/// In front of whatever else is attached.
const F_BEFORE: u32 = 1 << 3;
const TCX_DROP: i32 = 2;

/// `struct bpf_insn`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Instruction {
    code: u8,
    registers: u8,
    offset: i16,
    immediate: i32,
}

/// The `BPF_PROG_LOAD` part of `union bpf_attr`, up to `expected_attach_type`.
#[repr(C)]
#[derive(Default)]
struct ProgLoad {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
    prog_ifindex: u32,
    expected_attach_type: u32,
}

/// The `BPF_LINK_CREATE` part, as for tcx.
#[repr(C)]
#[derive(Default)]
struct LinkCreate {
    prog_fd: u32,
    target_ifindex: u32,
    attach_type: u32,
    flags: u32,
    relative_fd: u32,
    reserved: u32,
    expected_revision: u64,
}

/// # Safety
/// `T` is the part of `union bpf_attr` that `command` takes, its pointers valid for reads.
unsafe fn bpf<T>(command: libc::c_int, attributes: &T) -> Result<OwnedFd, Errno> {
    // SAFETY: the caller's promise; the length is the structure's.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_ref(attributes),
            size_of::<T>(),
        )
    };
    let fd = i32::try_from(fd).map_err(|_| Errno::IO)?;
    if fd < 0 {
        return Err(last());
    }
    // SAFETY: the kernel made this descriptor for us (both commands return one, close-on-exec).
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Drops what the device receives before the host's stack sees it, and after packet sockets have,
/// until the descriptor is closed. Needs Linux 6.6 and CAP_BPF in the initial user namespace.
pub(crate) fn drop_ingress(ifindex: u32) -> Result<OwnedFd, Errno> {
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
    let mut name = [0; 16];
    for (to, from) in name.iter_mut().zip(b"ovs_dpd_hide") {
        *to = *from;
    }
    let load = ProgLoad {
        prog_type: PROG_TYPE_SCHED_CLS,
        insn_cnt: program.len() as u32,
        insns: program.as_ptr().expose_provenance() as u64,
        license: license.as_ptr().expose_provenance() as u64,
        prog_name: name,
        expected_attach_type: TCX_INGRESS,
        ..ProgLoad::default()
    };
    // SAFETY: `load` points at `program` and `license`, both alive, with their lengths.
    let program = unsafe { bpf(PROG_LOAD, &load)? };
    let create = LinkCreate {
        prog_fd: program.as_raw_fd() as u32,
        target_ifindex: ifindex,
        attach_type: TCX_INGRESS,
        flags: F_BEFORE,
        ..LinkCreate::default()
    };
    // SAFETY: no pointers. The link keeps the program.
    unsafe { bpf(LINK_CREATE, &create) }
}
