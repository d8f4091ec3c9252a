//! Flows a second in a terse dump over the socket: what ovs-vswitchd's revalidators ask for, all the time.
//!
//! A scripted client installs flows and dumps them with only their names and statistics
//! (`OVS_UFID_F_OMIT_KEY | OMIT_MASK | OMIT_ACTIONS`), as ovs-vswitchd does; whole, for comparison; and
//! counts what comes. Also: FLOW_NEWs a second over the socket, many under way.

use std::collections::HashSet;
use std::time::Instant;

use ::tests::lab::{Lab, Switch};
use anyhow::{Context, Result, ensure};
use benches::client::Client;
use benches::cpu;
use benches::report::Report;
use clap::Parser;

/// Flows a second in a terse dump.
#[derive(Debug, Parser)]
struct Arguments {
    /// Dumps of each kind.
    #[arg(long, default_value_t = 7)]
    rounds: u32,
    /// Numbers of flows.
    #[arg(long, value_delimiter = ',', default_values_t = [10_000, 1_000_000])]
    flows: Vec<u32>,
    /// Given by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

/// `OVS_UFID_F_OMIT_KEY | OVS_UFID_F_OMIT_MASK | OVS_UFID_F_OMIT_ACTIONS`.
const TERSE: u32 = 7;
const OURS: &str = "ovs-dpd";

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    cpu::ahead_of_others();
    let mut report = Report::new("dump");
    for &flows in &arguments.flows {
        let lab = Lab::bare(Switch::OvsDpd)?;
        let mut client = lab.host().inside(|| Client::connect(&lab.run_dir()))??;
        let dp = client.new_datapath("dump-bench")?;
        let start = Instant::now();
        client.install(dp, flows)?;
        let rate = f64::from(flows) / start.elapsed().as_secs_f64() / 1e3;
        report.add(
            &format!("{flows} flows: FLOW_NEW, 1000/s"),
            OURS,
            Some(rate),
        );
        for (name, flags) in [("terse", TERSE), ("whole", 0)] {
            for _ in 0..arguments.rounds {
                let start = Instant::now();
                let shown = client.dump_flows(dp, flags)?;
                let took = start.elapsed().as_secs_f64();
                let different: HashSet<_> = shown.iter().collect();
                ensure!(
                    different.len() == flows as usize && shown.len() == flows as usize,
                    "{} of {flows} flows were shown, {} different",
                    shown.len(),
                    different.len()
                );
                let rate = f64::from(flows) / took / 1e6;
                report.add(
                    &format!("{flows} flows: {name} dump, M/s"),
                    OURS,
                    Some(rate),
                );
            }
        }
        lab.stop_daemon().context("the daemon")?;
    }
    report.finish_table()
}
