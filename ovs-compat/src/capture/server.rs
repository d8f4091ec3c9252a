//! The daemon's side of captures: a thread that accepts, and one for each capture, which alone waits for
//! its client.

use std::collections::HashMap;
use std::fs::Permissions;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use datapath::capture::{Capture, MOST, PortLabel, Record, Wish};
use datapath::daemon::Daemon;
use netlink::quiet::Quiet;
use netlink::server::peer_may_change;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tracing::{debug, info};

use super::stream::{self, PortName, Reply, Request};
use crate::rundir::RunDir;

/// How long a client may take to say what it wants.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long a batch may last.
const HOLD: Duration = Duration::from_millis(10);
/// Batches that are taken before some are handed on.
const TURN: usize = 256;
/// How often a capture without packets looks whether its client is there.
const LOOK: Duration = Duration::from_millis(100);

/// Starts to accept captures. Ends with the process.
///
/// # Errors
/// It can't be listened on the run directory's socket.
pub fn start(run_dir: &RunDir, daemon: &Arc<Daemon>, group: Option<u32>) -> Result<()> {
    let path = run_dir.capture_socket();
    // Left by a daemon that is dead: we hold the directory's lock.
    crate::run::remove_file(&path);
    let listener =
        UnixListener::bind(&path).with_context(|| format!("can't listen on {}", path.display()))?;
    // Who may capture is decided by who connects.
    std::fs::set_permissions(&path, Permissions::from_mode(0o666))
        .with_context(|| format!("can't open {} to all", path.display()))?;
    let daemon = Arc::clone(daemon);
    crate::run::spawn("captures", move || {
        let errors = Quiet::default();
        let clients = Arc::new(AtomicUsize::new(0));
        for stream in listener.incoming() {
            match stream {
                Ok(stream) => welcome(stream, &daemon, group, &clients),
                Err(error) => {
                    // No descriptors, perhaps.
                    errors.say(|| info!("captures: {error}"));
                    std::thread::sleep(LOOK);
                }
            }
        }
    })?;
    Ok(())
}

/// Refuses at once, or gives the client a thread of its own.
fn welcome(
    stream: UnixStream,
    daemon: &Arc<Daemon>,
    group: Option<u32>,
    clients: &Arc<AtomicUsize>,
) {
    let refusal = match peer_may_change(stream.as_fd(), group) {
        Ok(true) if clients.load(Ordering::Relaxed) >= 2 * MOST => "too many clients",
        Ok(true) => "",
        Ok(false) => {
            "packets are shown to root, to the daemon's own user, and to members of the --group of \
             `ovs-dpd run` only"
        }
        Err(_) => "who are you?",
    };
    if !refusal.is_empty() {
        // A few bytes into a new socket: they don't wait for its reader.
        answer(&stream, Some(refusal.to_owned()));
        return;
    }
    clients.fetch_add(1, Ordering::Relaxed);
    let (daemon, count) = (Arc::clone(daemon), Arc::clone(clients));
    let life = move || {
        if let Err(error) = serve(&stream, &daemon) {
            debug!("capture: {error:#}");
        }
        count.fetch_sub(1, Ordering::Relaxed);
    };
    if let Err(error) = crate::run::spawn("capture", life) {
        clients.fetch_sub(1, Ordering::Relaxed);
        info!("capture: {error:#}");
    }
}

fn answer(mut stream: &UnixStream, error: Option<String>) {
    let line = serde_json::to_string(&Reply { error }).unwrap_or_default();
    // Who doesn't listen to the answer is gone.
    let _ = stream.write_all(format!("{line}\n").as_bytes());
}

fn serve(stream: &UnixStream, daemon: &Daemon) -> Result<()> {
    match begin(stream, daemon) {
        Ok(capture) => {
            answer(stream, None);
            carry(stream, &capture)
        }
        Err(error) => {
            answer(stream, Some(format!("{error:#}")));
            Err(error)
        }
    }
}

fn begin(stream: &UnixStream, daemon: &Daemon) -> Result<Capture> {
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut line = String::new();
    BufReader::new(stream.take(stream::LONGEST_LINE)).read_line(&mut line)?;
    let request: Request = serde_json::from_str(&line).context("the request can't be read")?;
    let version = env!("CARGO_PKG_VERSION");
    if request.version != version {
        bail!(
            "the daemon is ovs-dpd {version}, this is {}: use that of the daemon",
            request.version
        );
    }
    check_port(&request.wish, daemon)?;
    Ok(daemon.captures.begin(request.wish)?)
}

fn check_port(wish: &Wish, daemon: &Daemon) -> Result<()> {
    let mut names = Vec::new();
    for datapath in daemon.datapaths().iter() {
        for port in datapath.ports.load().iter() {
            names.push(port.current_name());
        }
    }
    match &wish.port {
        Some(port) if !names.contains(port) => match names.as_slice() {
            [] => bail!("there is no port {port}: there are no ports at all"),
            _ => bail!("there is no port {port}; there are {}", names.join(", ")),
        },
        _ => Ok(()),
    }
}

/// Hands records on until the client has enough.
fn carry(mut stream: &UnixStream, capture: &Capture) -> Result<()> {
    let snaplen = capture.wish().snaplen;
    let (mut ports, mut line) = (Ports::default(), Line::default());
    let mut out = Vec::new();
    let mut stopped = false;
    loop {
        let idle = line.gather(capture);
        for record in line.ready(idle) {
            let port = ports.id(&record.port, &mut out);
            stream::put_packet(&mut out, port, &record, snaplen);
        }
        stream.write_all(&out)?;
        out.clear();
        if stopped && idle {
            break;
        }
        if !stopped && wants_no_more(stream)? {
            // What waits is handed on; nothing more comes.
            capture.stop();
            stopped = true;
        }
    }
    stream::put_end(&mut out, capture.lost());
    stream.write_all(&out)?;
    Ok(())
}

/// Records on their way to the client. Workers hand their batches in as they end, so one that began
/// earlier may come later: a record stands in line until another is [`HOLD`] younger, or none comes.
#[derive(Default)]
struct Line(Vec<Arc<Record>>);

impl Line {
    /// Takes what has come. True: nothing has, for a while.
    fn gather(&mut self, capture: &Capture) -> bool {
        let patience = if self.0.is_empty() { LOOK } else { HOLD };
        let mut records = capture.next(patience);
        let idle = records.is_empty();
        for _ in 0..TURN {
            if records.is_empty() {
                break;
            }
            self.0.append(&mut records);
            records = capture.next(Duration::ZERO);
        }
        self.0.append(&mut records);
        idle
    }

    /// Those whose turn it is; all if none comes any more.
    fn ready(&mut self, idle: bool) -> impl Iterator<Item = Arc<Record>> + '_ {
        self.0.sort_by_key(|record| record.time_ns);
        let youngest = self.0.last().map_or(0, |record| record.time_ns);
        let until = match idle {
            true => u64::MAX,
            false => youngest.saturating_sub(HOLD.as_nanos() as u64),
        };
        let ready = self.0.partition_point(|record| record.time_ns <= until);
        self.0.drain(..ready)
    }
}

/// Whether the client has shut down its half.
fn wants_no_more(stream: &UnixStream) -> Result<bool> {
    let mut fds = [PollFd::new(stream, PollFlags::IN)];
    let at_once = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    if poll(&mut fds, Some(&at_once))? == 0 {
        return Ok(false);
    }
    let mut from = stream;
    // Whatever else it says has no meaning.
    Ok(from.read(&mut [0; 64])? == 0)
}

/// Numbers for ports, as the client knows them.
#[derive(Default)]
struct Ports {
    known: HashMap<(String, u32, String), u32>,
}

impl Ports {
    fn id(&mut self, label: &PortLabel, out: &mut Vec<u8>) -> u32 {
        let key = (label.datapath.clone(), label.number, label.name.clone());
        if let Some(id) = self.known.get(&key) {
            return *id;
        }
        let id = self.known.len() as u32;
        let name = PortName {
            datapath: label.datapath.clone(),
            name: label.name.clone(),
            number: label.number,
            driver: label.driver.to_owned(),
        };
        stream::put_port(out, id, &name);
        self.known.insert(key, id);
        id
    }
}
