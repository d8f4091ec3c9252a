//! The XDP program of a port, the map by which it finds the port's sockets, and the link that puts it
//! on the device.
//!
//! The program gives each packet to the socket of the receive queue that it came by. Where there is
//! none (a queue that was added later) the packet is dropped: a port's packets never reach the host's
//! stack.
//!
//! Source: uapi `linux/bpf.h` (BPF_MAP_TYPE_XSKMAP, bpf_redirect_map, BPF_LINK_CREATE), `linux/if_link.h`
//! (XDP_FLAGS_*).

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;

use super::bpf::{Instruction, LinkCreate, PROG_LOAD, ProgLoad, ProgramLink, bpf, bpf_fd, name};

const MAP_CREATE: libc::c_int = 0;
const MAP_UPDATE_ELEM: libc::c_int = 2;
const MAP_TYPE_XSKMAP: u32 = 17;
const PROG_TYPE_XDP: u32 = 6;
/// `BPF_XDP`, of `enum bpf_attach_type`.
const ATTACH_XDP: u32 = 37;
const FLAGS_SKB_MODE: u32 = 1 << 1;
const FLAGS_DRV_MODE: u32 = 1 << 2;
/// `BPF_F_XDP_HAS_FRAGS`.
const XDP_HAS_FRAGS: u32 = 1 << 5;
/// `XDP_DROP`, of `enum xdp_action`.
const DROP: i32 = 1;
/// Where `struct xdp_md` has `rx_queue_index`.
const RX_QUEUE_INDEX: i16 = 16;
/// `bpf_redirect_map`, of `enum bpf_func_id`.
const REDIRECT_MAP: i32 = 51;
/// `BPF_PSEUDO_MAP_FD`: the immediate is a map's descriptor.
const MAP_FD: u8 = 1;

/// The `BPF_MAP_CREATE` part of `union bpf_attr`, up to `map_name`.
#[repr(C)]
#[derive(Default)]
struct MapCreate {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
    inner_map_fd: u32,
    numa_node: u32,
    map_name: [u8; 16],
}

/// The `BPF_MAP_*_ELEM` part.
#[repr(C)]
#[derive(Default)]
struct MapElement {
    map_fd: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// Where in the kernel the program runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hook {
    /// In the driver, on its own buffers.
    Native,
    /// In the stack's first function, on what the driver made of them: any device.
    Generic,
}

/// Which socket each receive queue's packets go to (BPF_MAP_TYPE_XSKMAP).
#[derive(Debug)]
pub(crate) struct SocketMap {
    fd: OwnedFd,
}

impl SocketMap {
    /// For `queues` queues. Needs CAP_BPF and CAP_NET_ADMIN in the initial user namespace.
    pub(crate) fn new(queues: u32) -> Result<Self, Errno> {
        let create = MapCreate {
            map_type: MAP_TYPE_XSKMAP,
            key_size: 4,
            value_size: 4,
            max_entries: queues,
            map_name: name(b"ovs_dpd_xsks"),
            ..MapCreate::default()
        };
        // SAFETY: the structure that MAP_CREATE takes, without pointers; it gives a descriptor.
        let fd = unsafe { bpf_fd(MAP_CREATE, &create)? };
        Ok(Self { fd })
    }

    /// Packets of `queue` go to `socket`, which must be bound to that queue.
    pub(crate) fn insert(&self, queue: u32, socket: BorrowedFd<'_>) -> Result<(), Errno> {
        let value = socket.as_raw_fd() as u32;
        let update = MapElement {
            map_fd: self.fd.as_raw_fd() as u32,
            key: std::ptr::from_ref(&queue).expose_provenance() as u64,
            value: std::ptr::from_ref(&value).expose_provenance() as u64,
            ..MapElement::default()
        };
        // SAFETY: key and value point at locals of the map's key and value sizes, four bytes each.
        unsafe { bpf(MAP_UPDATE_ELEM, &update) }.map(|_| ())
    }

    /// Puts the program on the device. `EBUSY`, `EEXIST`: there is another program. Linux 5.9.
    /// `several`: it may see packets in several buffers (Linux 5.18).
    pub(crate) fn attach(
        &self,
        ifindex: u32,
        hook: Hook,
        several: bool,
    ) -> Result<ProgramLink, Errno> {
        let program = self.load(several)?;
        let create = LinkCreate {
            prog_fd: program.as_raw_fd() as u32,
            target_ifindex: ifindex,
            attach_type: ATTACH_XDP,
            flags: match hook {
                Hook::Native => FLAGS_DRV_MODE,
                Hook::Generic => FLAGS_SKB_MODE,
            },
            ..LinkCreate::default()
        };
        ProgramLink::new(&create)
    }

    fn load(&self, several: bool) -> Result<OwnedFd, Errno> {
        let instruction = |code, registers, offset, immediate| Instruction {
            code,
            registers,
            offset,
            immediate,
        };
        let map = self.fd.as_raw_fd();
        let program = [
            // r2 = ctx->rx_queue_index (BPF_LDX | BPF_MEM | BPF_W)
            instruction(0x61, 0x12, RX_QUEUE_INDEX, 0),
            // r1 = the map (BPF_LD | BPF_IMM | BPF_DW: two slots)
            instruction(0x18, MAP_FD << 4 | 1, 0, map),
            instruction(0, 0, 0, 0),
            // r3 = what to do where no socket is (BPF_ALU64 | BPF_MOV | BPF_K; Linux 5.3)
            instruction(0xb7, 3, 0, DROP),
            // r0 = bpf_redirect_map(r1, r2, r3) (BPF_JMP | BPF_CALL)
            instruction(0x85, 0, 0, REDIRECT_MAP),
            // return r0 (BPF_JMP | BPF_EXIT)
            instruction(0x95, 0, 0, 0),
        ];
        let license = c"Apache-2.0";
        let load = ProgLoad {
            prog_type: PROG_TYPE_XDP,
            insn_cnt: program.len() as u32,
            insns: program.as_ptr().expose_provenance() as u64,
            license: license.as_ptr().expose_provenance() as u64,
            prog_flags: if several { XDP_HAS_FRAGS } else { 0 },
            prog_name: name(b"ovs_dpd_xdp"),
            expected_attach_type: ATTACH_XDP,
            ..ProgLoad::default()
        };
        // SAFETY: `load` points at `program` and `license`, both alive, with their lengths; PROG_LOAD
        // gives a descriptor.
        unsafe { bpf_fd(PROG_LOAD, &load) }
    }
}
