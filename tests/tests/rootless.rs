//! Without root: an unprivileged user inside `unshare -U -r -n -m`.

use anyhow::{Result, ensure};
use tests::traffic::{ping_ok, tcp};
use tests::{Lab, Switch, lab, sandbox};

fn bridge_ping_and_tcp(lab: &Lab) -> Result<()> {
    lab.bridge("br0")?;
    let a = lab.host_on("br0", "a", "10.1.1.1/24")?;
    let b = lab.host_on("br0", "b", "10.1.1.2/24")?;
    lab.internal("br0", "int0", "10.1.1.254/24")?;
    ping_ok(a.namespace(), "10.1.1.2")?;
    ping_ok(a.namespace(), "10.1.1.254")?;
    tcp::echo(
        a.namespace(),
        b.namespace(),
        "10.1.1.2:7000".parse()?,
        4 << 20,
    )?;
    tcp::echo(
        a.namespace(),
        lab.host(),
        "10.1.1.254:7000".parse()?,
        4 << 20,
    )?;
    tcp::echo(lab.host(), a.namespace(), "10.1.1.1:7000".parse()?, 4 << 20)
}

#[test]
fn an_unprivileged_user_has_a_bridge_with_ping_and_tcp() -> Result<()> {
    sandbox::rootless(
        "an_unprivileged_user_has_a_bridge_with_ping_and_tcp",
        || lab::test_over(Switch::OvsDpd, bridge_ping_and_tcp),
    )
}

#[test]
fn where_tun_is_closed_internal_ports_are_veth_pairs_and_the_status_says_so() -> Result<()> {
    sandbox::rootless(
        "where_tun_is_closed_internal_ports_are_veth_pairs_and_the_status_says_so",
        || {
            lab::test_over(Switch::OvsDpd, |lab| {
                let tun = std::fs::File::options()
                    .read(true)
                    .write(true)
                    .open("/dev/net/tun");
                bridge_ping_and_tcp(lab)?;
                let status = lab.status()?;
                let line = status
                    .lines()
                    .find_map(|line| line.trim_start().strip_prefix("int0: "))
                    .unwrap_or_default();
                let wanted = if tun.is_ok() { "tap" } else { "veth" };
                ensure!(line.starts_with(wanted), "int0 is no {wanted}:\n{status}");
                Ok(())
            })
        },
    )
}
