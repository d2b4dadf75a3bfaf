//! Full disks (2.6 step 1): what is stored can be written over, whoever was promised the room before.

use petal::global_state::Attachment;
use petal_sim::options::Overrides;
use petal_sim::scenario::Scenario;
use stdx::Duration;

/// Elements of the disk: far more than the servers' disks hold of one block each.
const ELEMENTS: u64 = 600;

#[test]
fn a_full_pool_takes_overwrites() {
    for seed in 1..=6 {
        let mut s = Scenario::new(seed, &Overrides { full: true, ..Overrides::default() });
        let disk = s.create("vol", ELEMENTS);
        for client in 1..=2 {
            assert!(s.attach(client, "vol", Attachment::Shared));
        }
        // Several at a time, so that what is promised follows what is free; then one after the other to the last.
        let mut stored = Vec::new();
        for element in 0..ELEMENTS {
            let (before, at) = (s.refused_for_space(), s.now());
            s.write(1 + element as usize % 2, disk, element);
            let waited = s.now().since(at);
            assert!(
                waited < Duration::from_millis(500),
                "seed {seed}: element {element} had its answer after {waited:?}"
            );
            if s.refused_for_space() == before {
                stored.push(element);
            }
        }
        let refused = s.refused_for_space();
        assert!(refused > 0 && stored.len() > 120, "seed {seed}: {refused} refused, {} stored", stored.len());
        for round in 0..3 {
            for (at, element) in stored.iter().enumerate() {
                s.begin_write(1 + (at + round) % 2, disk, *element);
                if at % 8 == 7 {
                    s.idle(1);
                    s.idle(2);
                }
            }
            s.idle(1);
            s.idle(2);
            assert_eq!(s.refused_for_space(), refused, "seed {seed}: overwrites were refused in round {round}");
        }
        let complaints = s.finish();
        assert!(complaints.is_empty(), "seed {seed}: {complaints:#?}");
    }
}

/// Whole elements, many at a time: what a batch gives back can be handed out again only when the next one is durable,
/// and nobody is refused for that.
#[test]
fn a_full_pool_takes_many_large_overwrites_at_once() {
    for seed in 11..=16 {
        let mut s = Scenario::new(seed, &Overrides { full: true, ..Overrides::default() });
        let disk = s.create("vol", ELEMENTS);
        assert!(s.attach(1, "vol", Attachment::Exclusive));
        let mut stored = Vec::new();
        for element in 0..40 {
            let before = s.refused_for_space();
            s.begin_write_blocks(1, disk, element * 16, 16);
            s.idle(1);
            if s.refused_for_space() == before {
                stored.push(element);
            }
        }
        let refused = s.refused_for_space();
        assert!(refused > 0 && stored.len() > 4, "seed {seed}: {refused} refused, {} stored", stored.len());
        for _ in 0..5 {
            for element in &stored {
                s.begin_write_blocks(1, disk, element * 16, 16);
            }
            s.idle(1);
            assert_eq!(s.refused_for_space(), refused, "seed {seed}: overwrites were refused");
        }
        let complaints = s.finish();
        assert!(complaints.is_empty(), "seed {seed}: {complaints:#?}");
    }
}
