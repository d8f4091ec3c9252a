//! A datapath's meters by id: any u32, up to [`MAX_METERS`] of them.
//!
//! # Representation
//! A hash table whose directory never grows, sized so that a full table has about a dozen meters a
//! place. Each place is a snapshot: setting a meter copies those few entries, whatever else there is, so
//! that 200,000 meters set one by one cost as much each as the first.
//!
//! # Thread safety
//! Readers load a place and take no lock. Writers exclude each other by a mutex, a leaf: nothing is
//! taken under it. The last reader of a replaced place may be the one to free it: a few small
//! allocations.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use arc_swap::ArcSwapOption;

use super::Meter;

/// Meters that a datapath may have (`OVS_METER_ATTR_MAX_METERS`): as many as the module's.
pub const MAX_METERS: u32 = 200_000;

/// Places in the directory, as a power of two.
const PLACES_LOG2: u32 = 14;

/// There are [`MAX_METERS`] already.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{MAX_METERS} meters are there already")]
pub struct Full;

type Place = Vec<(u32, Arc<Meter>)>;
type Directory = Box<[ArcSwapOption<Place>]>;

/// The meters of a datapath.
#[derive(Debug, Default)]
pub struct Meters {
    /// Made with the first meter.
    directory: OnceLock<Directory>,
    /// How many there are; held while one is put or taken.
    count: Mutex<u32>,
}

impl Meters {
    /// The meter of that id.
    pub fn get(&self, id: u32) -> Option<Arc<Meter>> {
        self.with(id, Arc::clone)
    }

    /// Lends the meter of that id to `work`, for the packet path: no count is taken.
    #[inline]
    pub fn with<R>(&self, id: u32, work: impl FnOnce(&Arc<Meter>) -> R) -> Option<R> {
        let place = place(self.directory.get()?, id)?.load();
        let (_, meter) = place.as_ref()?.iter().find(|(known, _)| *known == id)?;
        Some(work(meter))
    }

    /// Puts a meter; returns the one that had the id.
    ///
    /// # Errors
    /// None had it, and there is no room for more.
    pub fn put(&self, id: u32, meter: Arc<Meter>) -> Result<Option<Arc<Meter>>, Full> {
        let directory = self.directory.get_or_init(|| {
            (0..1 << PLACES_LOG2)
                .map(|_| ArcSwapOption::empty())
                .collect()
        });
        let mut count = self.lock();
        let Some(place) = place(directory, id) else {
            return Err(Full);
        };
        let mut entries = entries(place);
        let before = match entries.iter_mut().find(|(known, _)| *known == id) {
            Some((_, slot)) => Some(std::mem::replace(slot, meter)),
            None if *count >= MAX_METERS => return Err(Full),
            None => {
                entries.push((id, meter));
                *count += 1;
                None
            }
        };
        place.store(Some(Arc::new(entries)));
        Ok(before)
    }

    /// Takes the meter of that id out.
    pub fn take(&self, id: u32) -> Option<Arc<Meter>> {
        let mut count = self.lock();
        let place = place(self.directory.get()?, id)?;
        let mut entries = entries(place);
        let at = entries.iter().position(|(known, _)| *known == id)?;
        let (_, meter) = entries.swap_remove(at);
        *count -= 1;
        place.store((!entries.is_empty()).then(|| Arc::new(entries)));
        Some(meter)
    }

    /// How many there are.
    pub fn len(&self) -> u32 {
        *self.lock()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn lock(&self) -> MutexGuard<'_, u32> {
        self.count.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn entries(place: &ArcSwapOption<Place>) -> Place {
    place
        .load()
        .as_ref()
        .map(|entries| Vec::clone(entries))
        .unwrap_or_default()
}

/// Spread by the golden ratio (Knuth, The Art of Computer Programming 3, 6.4): ids come in runs.
fn place(directory: &Directory, id: u32) -> Option<&ArcSwapOption<Place>> {
    let hash = id.wrapping_mul(0x9e37_79b9) >> (u32::BITS - PLACES_LOG2);
    directory.get(hash as usize)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use rand::rngs::SmallRng;
    use rand::{Rng, SeedableRng};

    use super::*;
    use crate::meter::{Count, Unit};

    /// A meter that can be told from others by when it was made.
    fn meter(made_ms: u64) -> Arc<Meter> {
        Arc::new(Meter::new(Unit::Packets, None, Count::default(), made_ms))
    }

    fn mark(meter: &Arc<Meter>) -> u64 {
        meter.report().used_ms
    }

    #[test]
    fn it_does_what_a_map_does() {
        let meters = Meters::default();
        let mut model = HashMap::new();
        let mut random = SmallRng::seed_from_u64(3);
        for step in 0..20_000_u64 {
            // Few enough that ids come again, and with ids that share a place.
            let id = random.random_range(0..300_u32) << (24 * random.random_range(0..2_u32));
            if random.random_range(0..3) == 0 {
                assert_eq!(meters.take(id).map(|m| mark(&m)), model.remove(&id));
            } else {
                let before = meters.put(id, meter(step)).unwrap();
                assert_eq!(before.map(|m| mark(&m)), model.insert(id, step));
            }
            assert_eq!(meters.get(id).map(|m| mark(&m)), model.get(&id).copied());
            assert_eq!(meters.len() as usize, model.len());
        }
        for (id, step) in &model {
            assert_eq!(meters.with(*id, mark), Some(*step));
        }
    }

    #[test]
    fn there_is_room_for_200_000_meters_with_any_ids_and_for_none_more() {
        let meters = Meters::default();
        let one = meter(1);
        // As Open vSwitch numbers them, and in strides that collide in the module's table.
        let id = |n: u32| match n % 2 {
            0 => n / 2,
            _ => 54_545_401_u32.wrapping_add(n / 2 * 1024),
        };
        for n in 0..MAX_METERS {
            assert_eq!(meters.put(id(n), Arc::clone(&one)).map(|_| ()), Ok(()));
        }
        assert_eq!(meters.len(), MAX_METERS);
        assert_eq!(meters.put(u32::MAX, meter(2)).unwrap_err(), Full);
        let before = meters.put(id(77), meter(2)).unwrap();
        assert_eq!(before.map(|m| mark(&m)), Some(1));
        assert!(meters.take(id(5)).is_some());
        assert!(meters.put(u32::MAX, meter(2)).unwrap().is_none());
    }

    /// What setting a meter copies is what its place has.
    #[test]
    fn the_last_meter_costs_a_few_entries_more_to_set_than_the_first() {
        let runs = |n: u32| n;
        let strides = |n: u32| n.wrapping_mul(1024);
        let orders: [&dyn Fn(u32) -> u32; 2] = [&runs, &strides];
        for (nth, id) in orders.into_iter().enumerate() {
            let (meters, one) = (Meters::default(), meter(1));
            for n in 0..MAX_METERS {
                meters.put(id(n), Arc::clone(&one)).unwrap();
            }
            let places = meters.directory.get().unwrap();
            let longest = places.iter().map(|place| entries(place).len()).max();
            assert!(longest.is_some_and(|n| n < 100), "{nth}: {longest:?}");
        }
    }
}
