//! `ovs-dpd capture`: packets of a port, as lines or as pcapng.

mod line;
mod pcapng;
pub mod server;
mod stream;

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, IsTerminal, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::{ArgGroup, ValueEnum};
use datapath::capture::Wish;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::rundir::RunDir;
use stream::{Message, Packet, PortName, Reply, Request};

/// What `--help` ends with.
pub const EXAMPLES: &str = "Examples:
  ovs-dpd capture eth1
  ovs-dpd capture eth1 --direction in --count 100 --write eth1.pcapng
  ovs-dpd capture br0 --write - | tcpdump -nr - 'tcp port 80'
  ovs-dpd capture --drops";

/// What `capture` can be told.
#[derive(clap::Args)]
#[command(group(ArgGroup::new("what").required(true).multiple(true).args(["port", "drops"])))]
pub struct CaptureArguments {
    #[command(flatten)]
    run_dir: crate::RunDirArgument,
    /// The port, by its device's name: as in `ovs-dpd status`.
    port: Option<String>,
    /// Only packets that are dropped, of the port or of all ports, as they are when they are dropped.
    #[arg(long, conflicts_with = "direction")]
    drops: bool,
    /// Which way: in is out of the port, into the datapath.
    #[arg(long, value_enum, default_value_t = Direction::Both)]
    direction: Direction,
    /// Write pcapng to a file, or to standard output (-), instead of lines.
    #[arg(long, short, value_name = "FILE.pcapng")]
    write: Option<PathBuf>,
    /// End after that many packets.
    #[arg(long, short, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
    /// Bytes of each packet to keep.
    #[arg(long, short, value_name = "BYTES", default_value_t = 262_144,
          value_parser = clap::value_parser!(u32).range(14..=262_144))]
    snaplen: u32,
}

/// Which way packets go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Direction {
    /// Out of the port, into the datapath.
    In,
    /// Out of the datapath, to the port.
    Out,
    /// Both.
    Both,
}

impl CaptureArguments {
    fn wish(&self) -> Wish {
        let seen = |direction| {
            let both = self.direction == Direction::Both;
            !self.drops && (both || self.direction == direction)
        };
        Wish {
            port: self.port.clone(),
            received: seen(Direction::In),
            transmitted: seen(Direction::Out),
            dropped: self.drops,
            snaplen: self.snaplen,
        }
    }

    fn sink(&self) -> Result<Sink> {
        let stdout = || BufWriter::with_capacity(1 << 16, io::stdout());
        let out: Box<dyn Write> = match &self.write {
            None => return Ok(Sink::Lines(Box::new(stdout()))),
            Some(path) if path == Path::new("-") => {
                if io::stdout().is_terminal() {
                    bail!("a terminal can't show pcapng: pipe it into a program, or name a file");
                }
                Box::new(stdout())
            }
            Some(path) => {
                let file = File::create(path)
                    .with_context(|| format!("can't write {}", path.display()))?;
                Box::new(BufWriter::with_capacity(1 << 16, file))
            }
        };
        Ok(Sink::Pcapng(pcapng::Writer::new(out, self.snaplen)?))
    }
}

/// Where packets go.
enum Sink {
    Lines(Box<dyn Write>),
    Pcapng(pcapng::Writer<Box<dyn Write>>),
}

impl Sink {
    fn put(&mut self, packet: &Packet, port: &PortName) -> io::Result<()> {
        match self {
            Self::Lines(out) => writeln!(out, "{}", line::line(packet, port)),
            Self::Pcapng(out) => out.packet(packet, port, &line::comment(packet, port)),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Lines(out) => out.flush(),
            Self::Pcapng(out) => out.flush(),
        }
    }

    fn end(&mut self, lost: u64) -> io::Result<()> {
        match self {
            Self::Lines(out) => out.flush(),
            Self::Pcapng(out) => out.end(lost),
        }
    }
}

/// Captures until it has enough, is told to end, or nobody reads it any more; then says how many.
pub fn capture(arguments: &CaptureArguments) -> Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM]).context("can't take signals")?;
    let path = &arguments.run_dir.run_dir;
    let socket = UnixStream::connect(RunDir::new(path).capture_socket()).with_context(|| {
        format!(
            "no daemon answers on {}: start one with `ovs-dpd run --run-dir {}`",
            path.display(),
            path.display()
        )
    })?;
    let mut reader = BufReader::with_capacity(1 << 18, socket.try_clone()?);
    ask(&socket, &mut reader, arguments.wish())?;
    // Only now: a refusal leaves a file as it was.
    let mut sink = arguments.sink()?;
    let ending = socket.try_clone()?;
    std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            for (times, signal) in signals.forever().enumerate() {
                // What is on the way still comes; who can't wait for it says so again.
                if times > 0 || ending.shutdown(Shutdown::Write).is_err() {
                    std::process::exit(128 + signal);
                }
            }
        })
        .context("can't start a thread")?;
    let what = match &arguments.port {
        Some(port) => format!("port {port}"),
        None => "all ports".to_owned(),
    };
    let only = if arguments.drops {
        "dropped packets of "
    } else {
        ""
    };
    eprintln!("ovs-dpd capture: {only}{what}; Ctrl-C ends it");
    let (captured, lost) = match carry(&mut reader, &socket, &mut sink, arguments.count) {
        Ok(counts) => counts,
        // The program behind the pipe has seen enough.
        Err(error) if is_broken_pipe(&error) => return Ok(()),
        Err(error) => return Err(error),
    };
    eprintln!(
        "ovs-dpd capture: {captured} packet{} captured, {lost} lost by the capture",
        if captured == 1 { "" } else { "s" }
    );
    Ok(())
}

fn ask(mut socket: &UnixStream, reader: &mut impl BufRead, wish: Wish) -> Result<()> {
    let version = env!("CARGO_PKG_VERSION").to_owned();
    let request = serde_json::to_string(&Request { version, wish })?;
    // Who is refused at once may find the connection closed: the answer says why.
    let sent = socket.write_all(format!("{request}\n").as_bytes());
    let mut line = String::new();
    let read = reader.take(stream::LONGEST_LINE * 64).read_line(&mut line);
    match serde_json::from_str::<Reply>(&line) {
        Ok(Reply { error: None }) => Ok(()),
        Ok(Reply { error: Some(error) }) => bail!("{error}"),
        Err(error) => {
            sent.and(read.map(drop)).context("the daemon broke off")?;
            Err(error).context("the daemon's answer can't be read: is it of another version?")
        }
    }
}

/// Packets captured and lost.
fn carry(
    reader: &mut BufReader<UnixStream>,
    socket: &UnixStream,
    sink: &mut Sink,
    count: Option<u64>,
) -> Result<(u64, u64)> {
    let mut ports = HashMap::new();
    let mut captured = 0;
    loop {
        let message = stream::read(reader).context("the daemon broke off")?;
        match message {
            None => {
                sink.end(0)?;
                bail!("the daemon ended; {captured} packets captured");
            }
            Some(Message::Port(id, name)) => {
                ports.insert(id, name);
            }
            Some(Message::Packet(packet)) if count.is_none_or(|count| captured < count) => {
                let port = ports.get(&packet.port).context("a packet of no port")?;
                sink.put(&packet, port)?;
                captured += 1;
                if count == Some(captured) {
                    socket.shutdown(Shutdown::Write)?;
                }
            }
            // More than was asked for: they were on the way.
            Some(Message::Packet(_)) => {}
            Some(Message::End(lost)) => {
                sink.end(lost)?;
                return Ok((captured, lost));
            }
        }
        if reader.buffer().is_empty() {
            sink.flush()?;
        }
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let io = error.downcast_ref::<io::Error>();
    io.is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}
