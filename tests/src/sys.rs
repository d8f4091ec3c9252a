//! What a test asks the kernel for that no library offers: packet sockets, and a parent's death.
#![allow(unsafe_code)] // sockaddr_ll, PACKET_AUXDATA and pre_exec have no safe form in libc, rustix or std

use std::ffi::CString;
use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

/// Makes the kernel kill the program when the thread that started it ends, so that nothing
/// outlives a test that is killed.
pub fn die_with_parent(command: &mut Command) {
    // SAFETY: the closure runs between fork and exec; prctl is a bare system call that touches
    // no memory and takes no lock.
    unsafe {
        command.pre_exec(|| {
            rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
            Ok(())
        });
    }
}

/// A packet socket on one device of the thread's network namespace: what it sends leaves
/// through the device, what it receives came in through the device.
#[derive(Debug)]
pub struct PacketSocket {
    fd: OwnedFd,
}

impl PacketSocket {
    /// Opens a socket on the device `name`.
    ///
    /// # Errors
    /// Those of the system calls; ENODEV if there is no such device.
    pub fn open(name: &str) -> io::Result<Self> {
        let c_name = CString::new(name).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: c_name is a NUL-terminated string that outlives the call.
        let ifindex = unsafe { libc::if_nametoindex(c_name.as_ptr()) };
        if ifindex == 0 {
            return Err(io::Error::last_os_error());
        }
        // Protocol 0: nothing is received before bind() says from which device.
        // SAFETY: no pointers are passed.
        let fd = unsafe {
            libc::socket(
                libc::AF_PACKET,
                libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK,
                0,
            )
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and owned by nobody else.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let socket = Self { fd };
        socket.set_option(libc::SOL_PACKET, libc::PACKET_AUXDATA, 1)?;
        socket.set_option(libc::SOL_PACKET, libc::PACKET_IGNORE_OUTGOING, 1)?;
        // A burst of a test must fit; refused (harmlessly) inside a user namespace.
        let _ = socket.set_option(libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, 32 << 20);
        // SAFETY: sockaddr_ll is plain old data, for which all zeroes is a value.
        let mut address: libc::sockaddr_ll = unsafe { mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
        address.sll_ifindex = ifindex as i32;
        // SAFETY: the pointer and the length describe `address`, which outlives the call.
        let bound = unsafe {
            libc::bind(
                socket.fd.as_raw_fd(),
                (&raw const address).cast(),
                mem::size_of::<libc::sockaddr_ll>() as u32,
            )
        };
        if bound < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(socket)
    }

    fn set_option(&self, level: i32, option: i32, value: i32) -> io::Result<()> {
        // SAFETY: the pointer and the length describe `value`, which outlives the call.
        let set = unsafe {
            libc::setsockopt(
                self.fd.as_raw_fd(),
                level,
                option,
                (&raw const value).cast(),
                mem::size_of::<i32>() as u32,
            )
        };
        if set < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    }

    /// Has every frame from now on begin with a virtio-net header of 10 bytes (linux/virtio_net.h).
    ///
    /// # Errors
    /// Those of setsockopt(2).
    pub fn set_offloading(&self) -> io::Result<()> {
        /// linux/if_packet.h.
        const PACKET_VNET_HDR: i32 = 15;
        self.set_option(libc::SOL_PACKET, PACKET_VNET_HDR, 1)
    }

    /// Sends one frame, from its destination address on.
    ///
    /// # Errors
    /// Those of send(2): `WouldBlock` if the device's queue is full.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        // SAFETY: the pointer and the length describe `frame`.
        let sent =
            unsafe { libc::send(self.fd.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
        if sent < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    }

    /// The next frame that has arrived, with a VLAN tag that the kernel took out put back.
    ///
    /// # Errors
    /// Those of recvmsg(2): `WouldBlock` if nothing has arrived.
    pub fn receive(&self) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0_u8; 70_000];
        let mut control = [0_u64; 16];
        let mut part = libc::iovec {
            iov_base: bytes.as_mut_ptr().cast(),
            iov_len: bytes.len(),
        };
        // SAFETY: msghdr is plain old data, for which all zeroes is a value.
        let mut header: libc::msghdr = unsafe { mem::zeroed() };
        header.msg_iov = &raw mut part;
        header.msg_iovlen = 1;
        header.msg_control = control.as_mut_ptr().cast();
        header.msg_controllen = mem::size_of_val(&control);
        // SAFETY: header points at buffers that outlive the call, with their own lengths.
        let length = unsafe { libc::recvmsg(self.fd.as_raw_fd(), &raw mut header, 0) };
        let Ok(length) = usize::try_from(length) else {
            return Err(io::Error::last_os_error());
        };
        bytes.truncate(length);
        // SAFETY: header is as recvmsg left it; the CMSG macros stay within msg_controllen.
        let mut message = unsafe { libc::CMSG_FIRSTHDR(&raw const header) };
        while !message.is_null() {
            // SAFETY: message is not null and lies, aligned, within `control`.
            let kind = unsafe { ((*message).cmsg_level, (*message).cmsg_type) };
            if kind == (libc::SOL_PACKET, libc::PACKET_AUXDATA) {
                // SAFETY: the kernel wrote a tpacket_auxdata there; read without assuming alignment.
                let aux = unsafe {
                    libc::CMSG_DATA(message)
                        .cast::<libc::tpacket_auxdata>()
                        .read_unaligned()
                };
                if aux.tp_status & libc::TP_STATUS_VLAN_VALID != 0 && bytes.len() >= 12 {
                    let mut tpid = 0x8100;
                    if aux.tp_status & libc::TP_STATUS_VLAN_TPID_VALID != 0 {
                        tpid = aux.tp_vlan_tpid;
                    }
                    let tag = (u32::from(tpid) << 16 | u32::from(aux.tp_vlan_tci)).to_be_bytes();
                    bytes.splice(12..12, tag);
                }
            }
            // SAFETY: as above.
            message = unsafe { libc::CMSG_NXTHDR(&raw const header, message) };
        }
        Ok(bytes)
    }
}

impl AsFd for PacketSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
