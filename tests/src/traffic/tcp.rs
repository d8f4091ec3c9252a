//! Bytes over TCP that must come back as they went.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};

use crate::namespace::Namespace;

const SILENCE: Duration = Duration::from_secs(15);

/// Sends `length` bytes from `from` to an echo server at `address` in `to` and checks each byte
/// that comes back.
///
/// # Errors
/// No connection, silence for 15 s, or a byte that differs.
pub fn echo(from: &Namespace, to: &Namespace, address: SocketAddr, length: usize) -> Result<()> {
    echo_at(from, to, address, address, length)
}

/// As [`echo`], with the server at another address than the one that the client connects to.
///
/// # Errors
/// As [`echo`].
pub fn echo_at(
    from: &Namespace,
    to: &Namespace,
    connect: SocketAddr,
    listen: SocketAddr,
    length: usize,
) -> Result<()> {
    let listener = super::bind(to, "echo server", || TcpListener::bind(listen))?;
    std::thread::scope(|scope| {
        let server = scope.spawn(move || -> Result<()> {
            let (mut stream, _) = listener.accept()?;
            stream.set_read_timeout(Some(SILENCE))?;
            stream.set_write_timeout(Some(SILENCE))?;
            let mut buffer = vec![0; 1 << 16];
            loop {
                let count = stream.read(&mut buffer).context("echo server reading")?;
                if count == 0 {
                    return Ok(());
                }
                stream
                    .write_all(&buffer[..count])
                    .context("echo server writing")?;
            }
        });
        let client = client(from, connect, length);
        if client.is_err() {
            // The server may still wait in accept(): a connection from its own side ends that.
            let _ = to.inside(|| TcpStream::connect_timeout(&listen, SILENCE));
        }
        let served = server
            .join()
            .map_err(|_| anyhow!("the echo server panicked"))?;
        client.and(served)
    })
}

fn client(from: &Namespace, address: SocketAddr, length: usize) -> Result<()> {
    let stream = from.inside(|| TcpStream::connect_timeout(&address, SILENCE))?;
    let mut stream = stream.with_context(|| format!("connecting to {address}"))?;
    stream.set_read_timeout(Some(SILENCE))?;
    stream.set_write_timeout(Some(SILENCE))?;
    // Not periodic in any power of two: a lost or moved segment shows.
    let sent: Vec<u8> = (0..length)
        .map(|i| (i % 251) as u8 ^ (i / 251 % 241) as u8)
        .collect();
    let mut back = Vec::with_capacity(length);
    let mut writer = stream.try_clone()?;
    std::thread::scope(|scope| -> Result<()> {
        let writing = scope.spawn(|| -> std::io::Result<()> {
            writer.write_all(&sent)?;
            writer.shutdown(Shutdown::Write)
        });
        stream
            .read_to_end(&mut back)
            .context("reading what comes back")?;
        writing
            .join()
            .map_err(|_| anyhow!("the writer panicked"))?
            .context("writing")
    })?;
    let same = sent.iter().zip(&back).take_while(|(a, b)| a == b).count();
    ensure!(
        back == sent,
        "{} of {length} bytes came back, {same} of them right",
        back.len()
    );
    Ok(())
}
