//! A campaign: many episodes, each from a seed of its own, so that one can be run again alone.
//!
//! # Contract
//! A failing episode prints the command that repeats it. A panic counts as a failure wherever it
//! happens, also where the daemon catches it. An episode that lasts too long ends the process, with the
//! same command printed: nothing else could end a loop.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, Once, PoisonError};
use std::time::{Duration, Instant};

use rand::SeedableRng;
use rand::rngs::SmallRng;

/// The seed unless another is asked for: CI finds the same tomorrow.
const SEED: u64 = 0x0005_eed0_f0a7_ad9d;
/// How many messages or packets unless another number is asked for: enough for a look.
const COUNT: u64 = 50_000;
/// The longest that an episode may take: none takes a second.
const LIMIT: Duration = Duration::from_secs(120);

static PANICS: AtomicU64 = AtomicU64::new(0);
static LAST: Mutex<String> = Mutex::new(String::new());

/// A campaign's name and extent.
#[derive(Clone, Copy, Debug)]
pub struct Campaign {
    /// The test's name, for the command that repeats an episode.
    pub test: &'static str,
    /// Messages or packets of an episode.
    pub per_episode: u64,
}

impl Campaign {
    /// Runs `episode` until `OVS_DPD_FUZZ` things were tried; it gets its random numbers and how many
    /// things to try, and tells how many it tried.
    pub fn run(self, mut episode: impl FnMut(&mut SmallRng, u64) -> u64) {
        count_panics();
        let seed = number("OVS_DPD_FUZZ_SEED").unwrap_or(SEED);
        let count = number("OVS_DPD_FUZZ").unwrap_or(COUNT);
        let only = number("OVS_DPD_FUZZ_EPISODE");
        let begun = Instant::now();
        let mut tried = 0;
        let mut index = only.unwrap_or(0);
        while tried < count {
            let again = format!(
                "OVS_DPD_FUZZ_SEED={seed:#x} OVS_DPD_FUZZ_EPISODE={index} \
                 cargo test --profile fuzz -p fuzz --test {}",
                self.test
            );
            let watch = Watch::over(again.clone());
            let mut random =
                SmallRng::seed_from_u64(seed ^ index.wrapping_mul(0x9e37_79b9_7f4a_7c15));
            let before = PANICS.load(Relaxed);
            let ended = catch_unwind(AssertUnwindSafe(|| episode(&mut random, self.per_episode)));
            drop(watch);
            match ended {
                Ok(done) if PANICS.load(Relaxed) == before => tried += done.max(1),
                Ok(_) => {
                    let last = LAST.lock().unwrap_or_else(PoisonError::into_inner).clone();
                    panic!("the daemon panicked: {last}\nagain: {again}");
                }
                Err(panic) => {
                    eprintln!("again: {again}");
                    resume_unwind(panic);
                }
            }
            if only.is_some() {
                break;
            }
            index += 1;
        }
        let took = begun.elapsed();
        println!(
            "{}: {tried} in {index} episodes from seed {seed:#x}, {:.1} s, {:.0}/s",
            self.test,
            took.as_secs_f64(),
            tried as f64 / took.as_secs_f64()
        );
    }
}

/// How many threads have panicked since the first campaign.
pub fn panics() -> u64 {
    PANICS.load(Relaxed)
}

/// Counts panics from now on, also those that somebody catches.
pub fn count_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let default = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            PANICS.fetch_add(1, Relaxed);
            *LAST.lock().unwrap_or_else(PoisonError::into_inner) = info.to_string();
            default(info);
        }));
    });
}

/// A number from the environment, decimal or 0x.
pub fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    let parsed = match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.replace('_', "").parse(),
    };
    Some(parsed.unwrap_or_else(|error| panic!("{name}={text}: {error}")))
}

/// Ends the process if it isn't dropped in time.
struct Watch(Arc<()>);

impl Watch {
    fn over(again: String) -> Self {
        static WATCHED: Mutex<Vec<(Instant, std::sync::Weak<()>, String)>> = Mutex::new(Vec::new());
        static ONCE: Once = Once::new();
        let alive = Arc::new(());
        {
            let mut watched = WATCHED.lock().unwrap_or_else(PoisonError::into_inner);
            watched.retain(|(_, weak, _)| weak.strong_count() > 0);
            watched.push((Instant::now() + LIMIT, Arc::downgrade(&alive), again));
        }
        ONCE.call_once(|| {
            std::thread::spawn(|| {
                loop {
                    std::thread::sleep(Duration::from_secs(1));
                    let watched = WATCHED.lock().unwrap_or_else(PoisonError::into_inner);
                    let late = watched
                        .iter()
                        .find(|(end, weak, _)| Instant::now() > *end && weak.strong_count() > 0);
                    if let Some((_, _, again)) = late {
                        eprintln!("an episode doesn't end\nagain: {again}");
                        std::process::abort();
                    }
                }
            });
        });
        Self(alive)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        debug_assert_eq!(Arc::strong_count(&self.0), 1);
    }
}
