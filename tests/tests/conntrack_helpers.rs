//! Helpers with the real ovs-vswitchd: whole transfers by FTP and TFTP through firewalls that know nothing
//! of the data connections but what the helper says, translated or not.

use anyhow::{Result, ensure};
use tests::Namespace;
use tests::lab::{self, Lab};
use tests::process::Process;

/// Replaces the bridge's rules.
fn rules(lab: &Lab, rules: &[&str]) -> Result<()> {
    lab.ofctl("del-flows br0")?;
    for rule in rules {
        lab.ofctl(["add-flow", "br0", rule])?;
    }
    Ok(())
}

/// Whoever is at port 1 may speak to port 2, where `begins` says so, with that helper and `nat` (empty: none); port 2 may
/// begin what is related to it, and nothing else.
fn helper_rules(lab: &Lab, ip: &str, begins: &str, helper: &str, nat: &str) -> Result<()> {
    let nat = match nat {
        "" => String::new(),
        nat => format!(",nat({nat})"),
    };
    let alg = match helper {
        "" => String::new(),
        helper => format!(",alg={helper}"),
    };
    let again = if nat.is_empty() { "" } else { ",nat" };
    rules(
        lab,
        &[
            "table=0,priority=10,arp,actions=normal",
            "table=0,priority=10,icmp6,icmp_type=135,actions=normal",
            "table=0,priority=10,icmp6,icmp_type=136,actions=normal",
            &format!("table=0,priority=5,{ip},actions=ct(table=1,zone=1{again})"),
            &format!(
                "table=1,priority=9,in_port=1,ct_state=+trk+new-rel,{begins},actions=ct(commit,zone=1{alg}{nat}),2"
            ),
            &format!(
                "table=1,priority=8,in_port=1,ct_state=+trk+new+rel,{ip},actions=ct(commit,zone=1{again}),2"
            ),
            &format!(
                "table=1,priority=8,in_port=2,ct_state=+trk+new+rel,{ip},actions=ct(commit,zone=1{again}),1"
            ),
            &format!("table=1,priority=7,in_port=1,ct_state=+trk+est,{ip},actions=2"),
            &format!("table=1,priority=7,in_port=2,ct_state=+trk+est,{ip},actions=1"),
        ],
    )
}

fn python(namespace: &Namespace, script: &str, arguments: &[&str]) -> Result<String> {
    namespace.exec([&["python3", "-c", script], arguments].concat().as_slice())
}

fn serve(lab: &Lab, namespace: &Namespace, script: &str, arguments: &[&str]) -> Result<Process> {
    let words = [&["python3", "-u", "-c", script], arguments].concat();
    let mut server = namespace.spawn(words.as_slice(), &lab.directory().join("server"))?;
    server.wait_output("ready", tests::wait::SOON)?;
    Ok(server)
}

/// One transfer in each of these ways; the server says as whom it saw the client.
fn transfers(
    lab: &Lab,
    client: &Namespace,
    server: &Process,
    to: &str,
    ways: &[&str],
) -> Result<()> {
    for way in ways {
        let said = python(client, FTP_CLIENT, &[to, way]);
        let said = said.map_err(|error| error.context(server.output()))?;
        ensure!(
            said.contains("300000 bytes"),
            "{way}: {said}\n{}\n{}",
            server.output(),
            lab.status()?
        );
    }
    Ok(())
}

/// Active and passive, by the old commands and by the extended ones; the answers that the client is given
/// are as long as the server's own, or longer, or shorter: sequence numbers shift.
#[test]
fn ftp_passes_a_translated_source() -> Result<()> {
    lab::test_ovs_dpd(|lab| {
        lab.bridge("br0")?;
        let a = lab.host_on("br0", "a", "10.1.1.1/24")?;
        let b = lab.host_on("br0", "b", "10.1.1.2/24")?;
        ensure!(lab.ofport(a.port())? == 1, "the rules name port 1");
        let server = serve(lab, b.namespace(), FTP_SERVER, &["10.1.1.2"])?;
        for seen in ["10.1.1.240", "10.1.1.9"] {
            b.neighbour(seen, &a)?;
            helper_rules(lab, "ip", "tcp,tp_dst=2121", "ftp", &format!("src={seen}"))?;
            transfers(
                lab,
                a.namespace(),
                &server,
                "10.1.1.2",
                &["PORT", "PASV", "EPRT", "EPSV"],
            )?;
            let output = server.output();
            ensure!(output.contains(&format!("from {seen}")), "{output}");
        }
        Ok(())
    })
}

/// The server is behind a translated destination: what it tells of itself is translated.
#[test]
fn ftp_passes_a_translated_destination() -> Result<()> {
    lab::test_ovs_dpd(|lab| {
        lab.bridge("br0")?;
        let a = lab.host_on("br0", "a", "10.1.1.1/24")?;
        let b = lab.host_on("br0", "b", "10.1.1.2/24")?;
        ensure!(lab.ofport(a.port())? == 1, "the rules name port 1");
        a.neighbour("10.1.1.200", &b)?;
        // The client never speaks to the server's own address.
        a.namespace().ip("route add unreachable 10.1.1.2/32")?;
        let server = serve(lab, b.namespace(), FTP_SERVER, &["10.1.1.2"])?;
        let nat = "dst=10.1.1.2:2121";
        helper_rules(lab, "ip", "tcp,nw_dst=10.1.1.200,tp_dst=2121", "ftp", nat)?;
        transfers(
            lab,
            a.namespace(),
            &server,
            "10.1.1.200",
            &["PORT", "PASV", "EPRT", "EPSV"],
        )
    })
}

#[test]
fn ftp_over_ipv6_passes_with_and_without_translation() -> Result<()> {
    lab::test_ovs_dpd(|lab| {
        lab.bridge("br0")?;
        let a = lab.endpoint("a")?;
        let b = lab.endpoint("b")?;
        a.address("fd00::1/64")?;
        b.address("fd00::2/64")?;
        lab.port("br0", &a, "")?;
        lab.port("br0", &b, "")?;
        ensure!(lab.ofport(a.port())? == 1, "the rules name port 1");
        b.neighbour("fd00::240:1", &a)?;
        b.neighbour("fd00::1", &a)?;
        a.neighbour("fd00::2", &b)?;
        let server = serve(lab, b.namespace(), FTP_SERVER, &["fd00::2"])?;
        for nat in ["", "src=fd00::240:1"] {
            helper_rules(lab, "ipv6", "tcp6,tp_dst=2121", "ftp", nat)?;
            transfers(lab, a.namespace(), &server, "fd00::2", &["EPRT", "EPSV"])?;
        }
        let output = server.output();
        ensure!(output.contains("from fd00::240:1"), "{output}");
        Ok(())
    })
}

/// Without the helper the control connection works and the data connection doesn't: the rules of these
/// tests let nothing pass that they shouldn't.
#[test]
fn without_a_helper_no_data_connection_passes() -> Result<()> {
    lab::test_ovs_dpd(|lab| {
        lab.bridge("br0")?;
        let a = lab.host_on("br0", "a", "10.1.1.1/24")?;
        let b = lab.host_on("br0", "b", "10.1.1.2/24")?;
        ensure!(lab.ofport(a.port())? == 1, "the rules name port 1");
        let server = serve(lab, b.namespace(), FTP_SERVER, &["10.1.1.2"])?;
        helper_rules(lab, "ip", "tcp,tp_dst=2121", "", "")?;
        for way in ["PORT", "PASV"] {
            let said = python(a.namespace(), FTP_CLIENT, &["10.1.1.2", way])?;
            ensure!(
                said.contains("no data"),
                "{way}: {said}\n{}",
                server.output()
            );
        }
        Ok(())
    })
}

/// A server answers from another port than it was asked at: only the helper lets that pass.
#[test]
fn tftp_passes_with_and_without_translation() -> Result<()> {
    lab::test_ovs_dpd(|lab| {
        lab.bridge("br0")?;
        let a = lab.host_on("br0", "a", "10.1.1.1/24")?;
        let b = lab.host_on("br0", "b", "10.1.1.2/24")?;
        ensure!(lab.ofport(a.port())? == 1, "the rules name port 1");
        b.neighbour("10.1.1.240", &a)?;
        a.neighbour("10.1.1.200", &b)?;
        let server = serve(lab, b.namespace(), TFTP_SERVER, &["10.1.1.2"])?;
        for (nat, to, seen) in [
            ("", "10.1.1.2", "10.1.1.1"),
            ("src=10.1.1.240", "10.1.1.2", "10.1.1.240"),
            ("src=10.1.1.240:9000-9009", "10.1.1.2", "10.1.1.240"),
            ("dst=10.1.1.2", "10.1.1.200", "10.1.1.1"),
        ] {
            helper_rules(lab, "ip", "udp,tp_dst=69", "tftp", nat)?;
            for way in ["read", "write"] {
                let said = python(a.namespace(), TFTP_CLIENT, &[to, way])?;
                ensure!(
                    said.contains("100000 bytes"),
                    "{nat} {way}: {said}\n{}",
                    server.output()
                );
            }
            let output = server.output();
            let last = output.lines().last().unwrap_or_default();
            ensure!(
                last.starts_with(&format!("from {seen} ")),
                "{nat}: {output}"
            );
        }
        // Without the helper nothing comes back.
        helper_rules(lab, "ip", "udp,tp_dst=69", "", "")?;
        let said = python(a.namespace(), TFTP_CLIENT, &["10.1.1.2", "read"])?;
        ensure!(said.contains("no answer"), "{said}");
        Ok(())
    })
}

/// Says `bytes` of what RETR gave over a data connection made in the way of the second argument.
const FTP_CLIENT: &str = r#"
import socket, sys
server, way = sys.argv[1:]
family = socket.AF_INET6 if ':' in server else socket.AF_INET
control = socket.create_connection((server, 2121), 10)
own = control.getsockname()[0]
lines = control.makefile('rb')
def ask(text=None):
    if text:
        control.sendall(text.encode() + b'\r\n')
    answer = lines.readline().decode().strip()
    print(text, '->', answer)
    return answer
ask()
ask('USER x')
listener = None
if way in ('PORT', 'EPRT'):
    listener = socket.socket(family)
    listener.bind((own, 0))
    listener.listen(1)
    listener.settimeout(3)
    port = listener.getsockname()[1]
    if way == 'PORT':
        ask('PORT %s,%d,%d' % (own.replace('.', ','), port // 256, port % 256))
    else:
        ask('EPRT |%d|%s|%d|' % (2 if ':' in own else 1, own, port))
    host = None
elif way == 'PASV':
    numbers = ask('PASV').split('(')[1].split(')')[0].split(',')
    host, port = '.'.join(numbers[:4]), int(numbers[4]) * 256 + int(numbers[5])
    assert host == server, host
else:
    host, port = server, int(ask('EPSV').split('|||')[1].split('|')[0])
try:
    # Behind the announcement, whose length may have changed, the connection goes on.
    ask('NOOP')
    control.sendall(b'RETR x\r\n')
    data = listener.accept()[0] if listener else socket.create_connection((host, port), 3)
    data.settimeout(5)
    got = 0
    while True:
        piece = data.recv(65536)
        if not piece:
            break
        got += len(piece)
    ask(); ask()
    ask('NOOP')
    ask('QUIT')
    print(got, 'bytes')
except (TimeoutError, socket.timeout):
    print('no data')
"#;

/// As much of RFC 959 and RFC 2428 as that client speaks.
const FTP_SERVER: &str = r#"
import socket, sys, threading
own = sys.argv[1]
family = socket.AF_INET6 if ':' in own else socket.AF_INET
listener = socket.socket(family)
listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
listener.bind((own, 2121))
listener.listen(5)
print('ready')
def serve(control, peer):
    print('from', peer[0])
    control.sendall(b'220 hello\r\n')
    passive = active = None
    for line in control.makefile():
        word, _, rest = line.strip().partition(' ')
        print(peer, line.strip())
        if word == 'PORT':
            n = rest.split(',')
            active = ('.'.join(n[:4]), int(n[4]) * 256 + int(n[5]))
            answer = '200 ok'
        elif word == 'EPRT':
            _, _, host, port, _ = rest.split('|')
            active = (host, int(port))
            answer = '200 ok'
        elif word in ('PASV', 'EPSV'):
            passive = socket.socket(family)
            passive.bind((own, 0))
            passive.listen(1)
            passive.settimeout(5)
            port = passive.getsockname()[1]
            if word == 'PASV':
                answer = '227 Entering Passive Mode (%s,%d,%d)' % (own.replace('.', ','), port // 256, port % 256)
            else:
                answer = '229 Entering Extended Passive Mode (|||%d|)' % port
        elif word == 'RETR':
            control.sendall(b'150 here it comes\r\n')
            try:
                data = passive.accept()[0] if passive else socket.create_connection(active, 3)
            except (TimeoutError, socket.timeout):
                print('no data connection')
                break
            assert not active or active[0] == peer[0], (active, peer)
            assert data.getpeername()[0] == peer[0], (data.getpeername(), peer)
            data.sendall(b'x' * 300000)
            data.close()
            answer = '226 done'
        elif word == 'QUIT':
            control.sendall(b'221 bye\r\n')
            break
        else:
            answer = '230 ok'
        control.sendall(answer.encode() + b'\r\n')
    control.close()
while True:
    threading.Thread(target=serve, args=listener.accept(), daemon=True).start()
"#;

/// Says `bytes` of what was read or written.
const TFTP_CLIENT: &str = r#"
import socket, sys
server, way = sys.argv[1:]
client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
client.settimeout(2)
code = b'\0\1' if way == 'read' else b'\0\2'
client.sendto(code + b'file\0octet\0', (server, 69))
whole = bytes(100000)
done, block, got = False, 0, 0
try:
    while not done:
        packet, peer = client.recvfrom(2048)
        assert peer[0] == server and peer[1] != 69, peer
        if packet[1] == 3:
            got += len(packet) - 4
            done = len(packet) < 516
            client.sendto(b'\0\4' + packet[2:4], peer)
        else:
            block = int.from_bytes(packet[2:4], 'big') + 1
            piece = whole[(block - 1) * 512:block * 512]
            if block > 1 and (block - 1) * 512 > len(whole):
                done = True
            else:
                got += len(piece)
                client.sendto(b'\0\3' + block.to_bytes(2, 'big') + piece, peer)
    print(got, 'bytes')
except (TimeoutError, socket.timeout):
    print('no answer')
"#;

/// RFC 1350, from a new port for each transfer; prints whom it served.
const TFTP_SERVER: &str = r#"
import socket, sys, threading
listener = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
listener.bind((sys.argv[1], 69))
print('ready')
def serve(request, peer):
    own = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    own.bind((sys.argv[1], 0))
    own.connect(peer)
    own.settimeout(2)
    try:
        if request[1] == 1:
            whole = bytes(100000)
            for block in range(1, len(whole) // 512 + 2):
                own.send(b'\0\3' + block.to_bytes(2, 'big') + whole[(block - 1) * 512:block * 512])
                assert own.recv(9)[:4] == b'\0\4' + block.to_bytes(2, 'big')
            got = len(whole)
        else:
            own.send(b'\0\4\0\0')
            got = 0
            while True:
                packet = own.recv(2048)
                got += len(packet) - 4
                own.send(b'\0\4' + packet[2:4])
                if len(packet) < 516:
                    break
        print('from', peer[0], got)
    except (TimeoutError, socket.timeout):
        print('lost', peer)
while True:
    threading.Thread(target=serve, args=listener.recvfrom(2048), daemon=True).start()
"#;
