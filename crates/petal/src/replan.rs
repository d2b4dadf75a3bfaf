//! The planner of changes: a new GMap for other servers or weights that moves little.
//!
//! A pure function, as [`crate::placement`], whose shares it aims at. That layout would move nearly all
//! data when a server is added; this one keeps every copy where it is, but for those of servers that go
//! and those that a server has above its share. `mover.rs` starts such a change.
//!
//! Promises of [`replan`]: as many slots as before, each with as many copies as the scheme has (the tuples of a map whose
//! scheme has just changed have more or fewer); the servers of a tuple differ, and a tuple has no fewer
//! domains than the servers that stay in it had; the result depends on nothing but the arguments.

use crate::ids::{GmapId, ServerId};
use crate::placement::{Candidate, PlanError, apportion, shares};
use crate::translator::gmap::Gmap;

/// Plans the GMap that follows `from` when the candidates are those that may hold data. Candidates without
/// weight, and servers that are no candidates, hold nothing in the new one.
pub fn replan(id: GmapId, from: &Gmap, candidates: &[Candidate]) -> Result<Gmap, PlanError> {
    let copies = from.scheme.copies();
    let mut servers: Vec<Candidate> = candidates.iter().filter(|c| c.weight > 0).copied().collect();
    servers.sort_by_key(|c| c.server);
    servers.dedup_by_key(|c| c.server);
    if servers.len() < copies {
        return Err(PlanError::TooFewServers { copies, servers: servers.len() });
    }
    let place_of = |server: ServerId| servers.binary_search_by_key(&server, |c| c.server).ok();
    let slots = from.slots.len();
    let shares = shares(&servers, copies);
    let wanted: Vec<i64> = apportion(slots * copies, &shares).into_iter().map(|n| n.min(slots) as i64).collect();
    let mut held = vec![0i64; servers.len()];
    // Indexes of the servers; none where one goes.
    let mut layout: Vec<Vec<Option<usize>>> =
        from.slots.iter().map(|tuple| tuple.iter().map(|s| place_of(*s)).collect()).collect();
    for i in layout.iter().flatten().flatten() {
        held[*i] += 1;
    }
    // The changes are scattered over the slots, so that no part of a disk moves all at once.
    let order: Vec<usize> = scattered(slots);

    // A scheme of fewer copies: who goes, goes first; then whoever is most above the share.
    for slot in &order {
        let tuple = &mut layout[*slot];
        while tuple.len() > copies {
            let above = |place: &usize| tuple[*place].map_or(i64::MAX, |i| held[i] - wanted[i]);
            let place = (0..tuple.len()).rev().max_by_key(above).expect("it has members");
            if let Some(i) = tuple.remove(place) {
                held[i] -= 1;
            }
        }
        tuple.resize(copies, None);
    }
    for slot in &order {
        for place in 0..copies {
            if layout[*slot][place].is_none() {
                let tuple = &layout[*slot];
                let next = (0..servers.len())
                    .filter(|i| !tuple.contains(&Some(*i)))
                    .max_by_key(|i| {
                        let new = tuple.iter().flatten().all(|t| servers[*t].domain != servers[*i].domain);
                        (new, wanted[*i] - held[*i], std::cmp::Reverse(*i))
                    })
                    .expect("checked: as many servers as copies");
                held[next] += 1;
                layout[*slot][place] = Some(next);
            }
        }
    }
    let mut layout: Vec<Vec<usize>> = layout.into_iter().map(|t| t.into_iter().flatten().collect()).collect();

    // Each exchange is from a server above its share to one below: there are as many as that takes. Where even the one that
    // is farthest below would gain nothing nobody is looked for: 1,000 servers are not asked for each of 65,536 slots.
    let farthest = |held: &[i64]| wanted.iter().zip(held).map(|(wanted, held)| wanted - held).max().expect("a server");
    let mut most_below = farthest(&held);
    for slot in order.iter().cycle().take(slots * copies) {
        let tuple = &layout[*slot];
        let domains = |tuple: &[usize]| {
            let mut domains: Vec<u32> = tuple.iter().map(|i| servers[*i].domain).collect();
            domains.sort_unstable();
            domains.dedup();
            domains.len()
        };
        let place = (0..copies).max_by_key(|p| held[tuple[*p]] - wanted[tuple[*p]]).expect("a copy or more");
        let above = held[tuple[place]] - wanted[tuple[place]];
        if above <= 0 || above + most_below <= 2 {
            continue;
        }
        let with = |i: usize| {
            let mut other = tuple.clone();
            other[place] = i;
            other
        };
        let next = (0..servers.len())
            .filter(|i| held[*i] < wanted[*i] && !tuple.contains(i) && domains(&with(*i)) >= domains(tuple))
            // One above its share and one below: both are as near as whole copies come.
            .filter(|i| above + wanted[*i] - held[*i] > 2)
            .max_by_key(|i| (wanted[*i] - held[*i], std::cmp::Reverse(*i)));
        if let Some(next) = next {
            held[tuple[place]] -= 1;
            held[next] += 1;
            layout[*slot][place] = next;
            most_below = farthest(&held);
        }
    }
    // Who is first is primary. What moves anyway is ordered so that everybody is it in his share of slots.
    let moves =
        |slot: usize, tuple: &[usize]| !tuple.iter().map(|i| servers[*i].server).eq(from.slots[slot].iter().copied());
    let wanted: Vec<i64> = apportion(slots, &shares).into_iter().map(|n| n as i64).collect();
    let mut first = vec![0i64; servers.len()];
    for (_, tuple) in layout.iter().enumerate().filter(|(slot, tuple)| !moves(*slot, tuple)) {
        first[tuple[0]] += 1;
    }
    for slot in order {
        if moves(slot, &layout[slot]) {
            let tuple = &mut layout[slot];
            let place = (0..copies).max_by_key(|p| (wanted[tuple[*p]] - first[tuple[*p]], std::cmp::Reverse(*p)));
            let place = place.expect("a copy or more");
            tuple[..=place].rotate_right(1);
            first[tuple[0]] += 1;
        }
    }
    let slots = layout.into_iter().map(|t| t.into_iter().map(|i| servers[i].server).collect()).collect();
    Ok(Gmap { id, scheme: from.scheme, slots })
}

/// Copies that `to` places on servers that have none of that slot in `from`.
pub fn copies_to_move(from: &Gmap, to: &Gmap) -> usize {
    from.slots.iter().zip(&to.slots).map(|(old, new)| new.iter().filter(|s| !old.contains(s)).count()).sum()
}

/// The numbers below `count`, a power of two, with their bits reversed.
pub(crate) fn scattered(count: usize) -> Vec<usize> {
    let bits = count.trailing_zeros();
    (0..count).map(|i| if bits == 0 { i } else { i.reverse_bits() >> (usize::BITS - bits) }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::placement::plan;
    use crate::translator::gmap::Scheme;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    const SCHEMES: [Scheme; 3] = [Scheme::Striped, Scheme::Chained, Scheme::Chained3];

    fn equal(n: u16) -> Vec<Candidate> {
        (1..=n).map(|i| Candidate { server: ServerId(i), weight: 1 << 30, domain: u32::from(i) }).collect()
    }

    fn held(gmap: &Gmap, server: u16) -> usize {
        gmap.slots.iter().flatten().filter(|s| s.0 == server).count()
    }

    fn check(gmap: &Gmap, servers: &[Candidate]) {
        let mean = gmap.slots.len() * gmap.scheme.copies() / servers.len();
        for tuple in &gmap.slots {
            assert_eq!(tuple.iter().collect::<BTreeSet<_>>().len(), gmap.scheme.copies(), "{tuple:?}");
        }
        for s in servers {
            let n = held(gmap, s.server.0);
            assert!(n.abs_diff(mean) <= 2, "{n} copies on {:?}, mean {mean}", s.server);
        }
        let all: usize = servers.iter().map(|s| held(gmap, s.server.0)).sum();
        assert_eq!(all, gmap.slots.len() * gmap.scheme.copies(), "a copy is on a server that is no candidate");
    }

    #[test]
    fn the_same_servers_move_nothing() {
        for scheme in SCHEMES {
            let from = plan(GmapId(1), scheme, &equal(5)).unwrap();
            assert_eq!(replan(GmapId(2), &from, &equal(5)).unwrap().slots, from.slots);
        }
    }

    #[test]
    fn fewer_servers_than_copies_are_refused() {
        let from = plan(GmapId(1), Scheme::Chained3, &equal(3)).unwrap();
        let refused = replan(GmapId(2), &from, &equal(2));
        assert_eq!(refused, Err(PlanError::TooFewServers { copies: 3, servers: 2 }));
    }

    #[test]
    fn two_sites_still_hold_a_copy_of_everything() {
        let site = |n: u16| -> Vec<_> {
            (1..=n).map(|i| Candidate { server: ServerId(i), weight: 5, domain: u32::from(i % 2) }).collect()
        };
        let from = plan(GmapId(1), Scheme::Chained, &site(6)).unwrap();
        for n in [4, 5, 7, 8] {
            let to = replan(GmapId(2), &from, &site(n)).unwrap();
            assert!(to.slots.iter().all(|t| t[0].0 % 2 != t[1].0 % 2), "{n} servers");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn a_server_added_moves_its_share(n in 4u16..40) {
            for scheme in SCHEMES {
                let from = plan(GmapId(1), scheme, &equal(n)).unwrap();
                let to = replan(GmapId(2), &from, &equal(n + 1)).unwrap();
                check(&to, &equal(n + 1));
                let all = (to.slots.len() * scheme.copies()) as f64;
                let moved = copies_to_move(&from, &to) as f64;
                prop_assert!(moved <= 1.1 * all / f64::from(n + 1), "{moved} of {all} moved");
                let first = to.slots.iter().filter(|t| t[0].0 == n + 1).count();
                let share = to.slots.len() / usize::from(n + 1);
                prop_assert!(first.abs_diff(share) <= 2 + share / 4, "primary in {first} of {share}");
            }
        }

        #[test]
        fn another_number_of_copies_moves_only_the_copies_that_are_added(n in 3u16..40, from in 0usize..3, to in 0usize..3) {
            let old = plan(GmapId(1), SCHEMES[from], &equal(n)).unwrap();
            let new = replan(GmapId(1), &Gmap { scheme: SCHEMES[to], ..old.clone() }, &equal(n)).unwrap();
            check(&new, &equal(n));
            let added = SCHEMES[to].copies().saturating_sub(SCHEMES[from].copies()) * old.slots.len();
            let moved = copies_to_move(&old, &new);
            prop_assert!(moved <= added + old.slots.len() / 8, "{moved} copies are made, {added} are more than before");
        }

        #[test]
        fn a_server_drained_moves_what_it_holds(n in 5u16..40, which in 0u16..40) {
            for scheme in SCHEMES {
                let from = plan(GmapId(1), scheme, &equal(n)).unwrap();
                let mut left = equal(n);
                let gone = left.remove(usize::from(which % n)).server.0;
                let to = replan(GmapId(2), &from, &left).unwrap();
                check(&to, &left);
                let (moved, had) = (copies_to_move(&from, &to) as f64, held(&from, gone) as f64);
                prop_assert!(moved <= 1.1 * had + 4.0, "{moved} moved, {had} on the server that goes");
            }
        }
    }
}
