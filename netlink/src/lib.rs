//! Netlink, generic netlink and the Open vSwitch families as bytes; the server that speaks them.
//! Knows no flow table.

pub mod attr;
mod connection;
mod ctrl;
pub mod errno;
mod fair;
pub mod family;
pub mod handler;
pub mod hub;
pub mod links;
pub mod message;
pub mod policy;
pub mod quiet;
pub mod server;
pub mod service;
mod session;
mod sys;
pub mod transport;

pub use errno::Errno;
pub use family::{Family, Group};
pub use handler::{Answer, Dump, DumpPart, Fit, Handler, Lane};
pub use hub::Hub;
pub use links::Links;
pub use message::{Failure, Request};
pub use server::{BindError, Config, Running, Server};
pub use service::{Protocol, Service};
pub use session::Loopback;
