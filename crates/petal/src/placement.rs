//! The planner: which servers hold which slot of a new GMap (paper 2.4, chained declustering).
//!
//! A pure function. With equal weights it is the paper's layout: slot i on server i mod N of a ring, the
//! next copies on the servers that follow. So when a server fails its reads go to both neighbours, whose
//! own reads shift on around the ring, and every survivor carries N/(N-1) of its load.
//!
//! ```text
//!   slot       0       1       2       3       4   ..
//!   chained  (a, b)  (b, c)  (c, d)  (d, a)  (a, b)        ring a, b, c, d
//! ```
//!
//! Ring order alternates failure domains: of two sites one holds the even places and the other the odd
//! ones, so that every tuple has a server in each. With unequal weights the same shape is kept as far as
//! the shares allow: primaries follow each other in a smooth weighted round, and each further copy goes to
//! the server that is most behind its share, the next in the round among equals.
//!
//! Promises of [`plan`]: the servers of a tuple differ; their domains differ where the labels allow it;
//! copies are shared by weight (never more than one copy of a slot on a server, whatever its weight);
//! primaries are shared by weight too; the result depends on nothing but the arguments.

use crate::ids::{GmapId, ServerId};
use crate::limits::{SLOTS_MAX, SLOTS_PER_SERVER_MIN};
use crate::translator::gmap::{Gmap, Scheme};

/// Weights are compared in this many steps of the largest: servers whose capacities differ by a per cent
/// (other partition tables, other file systems) count as equal and get the paper's layout.
const WEIGHT_STEPS: u64 = 64;

/// A server that may hold slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// The server.
    pub server: ServerId,
    /// Share of the data that it should hold, in any unit (bytes of its disks). Zero: none.
    pub weight: u64,
    /// Failure domain (site, rack); servers of one domain may fail together.
    pub domain: u32,
}

/// Why there is no plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// A tuple cannot have different servers.
    #[error("{copies} copies need {copies} servers, and there are {servers}")]
    TooFewServers {
        /// Copies of the scheme.
        copies: usize,
        /// Servers with a weight.
        servers: usize,
    },
    /// More servers than a GMap has slots for.
    #[error("a map of at most {SLOTS_MAX} slots cannot serve {0} servers")]
    TooManyServers(usize),
}

/// Plans the initial layout of a GMap. Candidates without weight take no part; the order of the
/// candidates does not matter.
pub fn plan(id: GmapId, scheme: Scheme, candidates: &[Candidate]) -> Result<Gmap, PlanError> {
    let copies = scheme.copies();
    let mut servers: Vec<Candidate> = candidates.iter().filter(|c| c.weight > 0).copied().collect();
    servers.sort_by_key(|c| c.server);
    servers.dedup_by_key(|c| c.server);
    if servers.len() < copies {
        return Err(PlanError::TooFewServers { copies, servers: servers.len() });
    }
    let slots = slot_count(servers.len())?;
    let ring = ring_order(&servers, copies);
    let shares = shares(&ring, copies);
    let slots = if shares.windows(2).all(|w| w[0] == w[1]) {
        chained_layout(&ring, copies, slots)
    } else {
        weighted_layout(&ring, &shares, copies, slots)
    };
    Ok(Gmap { id, scheme, slots })
}

/// The least power of two that gives every server enough slots.
fn slot_count(servers: usize) -> Result<usize, PlanError> {
    let least = servers.saturating_mul(SLOTS_PER_SERVER_MIN as usize).next_power_of_two();
    if least > SLOTS_MAX as usize { Err(PlanError::TooManyServers(servers)) } else { Ok(least) }
}

/// Ring order: at each place the domain with most servers left, but none of those that the last
/// `copies - 1` places had (if that cannot be, the one that was had longest ago). With all domains
/// different, and with none, this is the order of the ids.
fn ring_order(servers: &[Candidate], copies: usize) -> Vec<Candidate> {
    let mut left: Vec<Candidate> = servers.to_vec();
    let mut ring: Vec<Candidate> = Vec::with_capacity(left.len());
    while !left.is_empty() {
        let remaining = |domain: u32| left.iter().filter(|c| c.domain == domain).count();
        // How long ago the domain was had, as far as it matters.
        let distance =
            |domain: u32| ring.iter().rev().take(copies - 1).position(|c| c.domain == domain).unwrap_or(copies);
        let best = (0..left.len())
            .min_by_key(|i| {
                let domain = left[*i].domain;
                (std::cmp::Reverse((distance(domain), remaining(domain))), left[*i].server)
            })
            .expect("there is one left");
        ring.push(left.remove(best));
    }
    ring
}

/// Each server's share of all copies in steps, cut so that nobody has more than one copy of a slot.
pub(crate) fn shares(ring: &[Candidate], copies: usize) -> Vec<u64> {
    let largest = ring.iter().map(|c| c.weight).max().expect("checked: there are servers");
    let in_steps = |weight: u64| {
        let steps = (u128::from(weight) * u128::from(WEIGHT_STEPS) + u128::from(largest) / 2) / u128::from(largest);
        (steps as u64).max(1)
    };
    // In units small enough that a cut share is still a whole number.
    let mut shares: Vec<u64> = ring.iter().map(|c| in_steps(c.weight) << 20).collect();
    // A server above 1/copies of the whole is cut to what the others can pair with; this makes the whole
    // smaller, so others may be above it then. At most `copies - 1` servers can be above.
    let mut cut = vec![false; shares.len()];
    for done in 0..copies.saturating_sub(1) {
        let rest: u64 = shares.iter().zip(&cut).filter(|(_, cut)| !**cut).map(|(s, _)| *s).sum();
        let Some(i) = (0..shares.len()).filter(|i| !cut[*i]).max_by_key(|i| (shares[*i], std::cmp::Reverse(*i))) else {
            break;
        };
        // Of the copies not taken by servers already cut (one each), this one may have one.
        let others = rest - shares[i];
        let allowed = others / (copies - done - 1) as u64;
        if shares[i] <= allowed {
            break;
        }
        cut[i] = true;
    }
    let rest: u64 = shares.iter().zip(&cut).filter(|(_, cut)| !**cut).map(|(s, _)| *s).sum();
    let cuts = cut.iter().filter(|c| **c).count();
    for (share, _) in shares.iter_mut().zip(&cut).filter(|(_, cut)| **cut) {
        *share = rest / (copies - cuts) as u64;
    }
    shares
}

/// The paper's layout.
fn chained_layout(ring: &[Candidate], copies: usize, slots: usize) -> Vec<Vec<ServerId>> {
    let server = |place: usize| ring[place % ring.len()].server;
    (0..slots).map(|slot| (0..copies).map(|copy| server(slot + copy)).collect()).collect()
}

/// The layout for unequal shares.
fn weighted_layout(ring: &[Candidate], shares: &[u64], copies: usize, slots: usize) -> Vec<Vec<ServerId>> {
    let primaries = apportion(slots, shares);
    let total = apportion(slots * copies, shares);
    let round = smooth_round(&primaries);
    // Copies that each server should have beyond its primaries, and has got so far.
    let wanted: Vec<i64> = (0..ring.len()).map(|i| total[i].min(slots) as i64 - primaries[i] as i64).collect();
    let mut got = vec![0i64; ring.len()];
    let mut layout = Vec::with_capacity(slots);
    for (slot, primary) in round.into_iter().enumerate() {
        let mut tuple = vec![primary];
        while tuple.len() < copies {
            let next = (0..ring.len())
                .filter(|i| !tuple.contains(i))
                .max_by_key(|i| {
                    let new_domain = tuple.iter().all(|t| ring[*t].domain != ring[*i].domain);
                    // Scaled by the number of slots: how far behind its share it is after this slot.
                    let behind = wanted[*i] * (slot as i64 + 1) - got[*i] * slots as i64;
                    let places_on = (i + ring.len() - tuple[0]) % ring.len();
                    (new_domain, behind, std::cmp::Reverse(places_on))
                })
                .expect("checked: as many servers as copies");
            got[next] += 1;
            tuple.push(next);
        }
        layout.push(tuple.into_iter().map(|i| ring[i].server).collect());
    }
    layout
}

/// Divides `count` by the shares, whole numbers with the largest remainders rounded up.
pub(crate) fn apportion(count: usize, shares: &[u64]) -> Vec<usize> {
    let sum: u128 = shares.iter().map(|s| u128::from(*s)).sum();
    let exact = |i: usize| count as u128 * u128::from(shares[i]);
    let mut parts: Vec<usize> = (0..shares.len()).map(|i| (exact(i) / sum) as usize).collect();
    let mut order: Vec<usize> = (0..shares.len()).collect();
    order.sort_by_key(|i| (std::cmp::Reverse(exact(*i) % sum), *i));
    let missing = count - parts.iter().sum::<usize>();
    for i in order.into_iter().take(missing) {
        parts[i] += 1;
    }
    parts
}

/// A sequence in which `i` appears `times[i]` times, spread as evenly as can be.
fn smooth_round(times: &[usize]) -> Vec<usize> {
    let total: i64 = times.iter().map(|t| *t as i64).sum();
    let mut credit = vec![0i64; times.len()];
    (0..total)
        .map(|_| {
            for (c, t) in credit.iter_mut().zip(times) {
                *c += *t as i64;
            }
            let next = (0..times.len()).max_by_key(|i| (credit[*i], std::cmp::Reverse(*i))).expect("not empty");
            credit[next] -= total;
            next
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::{BTreeMap, BTreeSet};

    const SCHEMES: [Scheme; 3] = [Scheme::Striped, Scheme::Chained, Scheme::Chained3];

    fn equal(n: u16) -> Vec<Candidate> {
        (1..=n).map(|i| Candidate { server: ServerId(i), weight: 1 << 30, domain: u32::from(i) }).collect()
    }

    fn counts(gmap: &Gmap, place: impl Fn(usize) -> bool) -> BTreeMap<ServerId, usize> {
        let mut counts = BTreeMap::new();
        for tuple in &gmap.slots {
            for (_, server) in tuple.iter().enumerate().filter(|(i, _)| place(*i)) {
                *counts.entry(*server).or_default() += 1;
            }
        }
        counts
    }

    #[test]
    fn four_equal_servers_get_the_layout_of_the_paper() {
        let gmap = plan(GmapId(1), Scheme::Chained, &equal(4)).unwrap();
        assert_eq!(gmap.slots.len(), 256);
        let s = |n| ServerId(n);
        assert_eq!(gmap.slots[..5], [[s(1), s(2)], [s(2), s(3)], [s(3), s(4)], [s(4), s(1)], [s(1), s(2)]]);
    }

    #[test]
    fn small_differences_of_capacity_count_as_equal() {
        let mut servers = equal(4);
        servers[2].weight += servers[2].weight / 200;
        let equal = plan(GmapId(1), Scheme::Chained, &equal(4)).unwrap();
        assert_eq!(plan(GmapId(1), Scheme::Chained, &servers).unwrap(), equal);
    }

    #[test]
    fn two_sites_each_hold_a_copy_of_everything() {
        let servers: Vec<_> =
            (1..=6).map(|i| Candidate { server: ServerId(i), weight: 5, domain: u32::from(i > 3) }).collect();
        let gmap = plan(GmapId(1), Scheme::Chained, &servers).unwrap();
        for tuple in &gmap.slots {
            assert_ne!(tuple[0].0 > 3, tuple[1].0 > 3, "{tuple:?} is on one site");
        }
    }

    #[test]
    fn three_racks_each_hold_a_copy_of_three() {
        let servers: Vec<_> =
            (0..9).map(|i| Candidate { server: ServerId(i + 1), weight: 5, domain: u32::from(i / 3) }).collect();
        let gmap = plan(GmapId(1), Scheme::Chained3, &servers).unwrap();
        for tuple in &gmap.slots {
            let racks: BTreeSet<_> = tuple.iter().map(|s| (s.0 - 1) / 3).collect();
            assert_eq!(racks.len(), 3, "{tuple:?} is not on three racks");
        }
    }

    #[test]
    fn a_server_larger_than_all_others_together_holds_one_copy_of_nearly_everything() {
        let mut servers = equal(4);
        servers[0].weight *= 10;
        let gmap = plan(GmapId(1), Scheme::Chained, &servers).unwrap();
        let copies = counts(&gmap, |_| true)[&ServerId(1)];
        assert!(copies >= gmap.slots.len() - 2, "{copies} of {}", gmap.slots.len());
    }

    #[test]
    fn too_few_and_too_many_servers_are_refused() {
        assert_eq!(
            plan(GmapId(1), Scheme::Chained, &equal(1)),
            Err(PlanError::TooFewServers { copies: 2, servers: 1 })
        );
        let mut servers = equal(3);
        servers[1].weight = 0;
        assert_eq!(
            plan(GmapId(1), Scheme::Chained3, &servers),
            Err(PlanError::TooFewServers { copies: 3, servers: 2 })
        );
        assert_eq!(plan(GmapId(1), Scheme::Striped, &equal(1025)), Err(PlanError::TooManyServers(1025)));
    }

    fn candidates() -> impl Strategy<Value = Vec<Candidate>> {
        prop::collection::vec(1u64..=8, 3..20).prop_map(|weights| {
            (1..)
                .zip(weights)
                .map(|(i, weight)| Candidate { server: ServerId(i), weight: weight << 30, domain: u32::from(i) })
                .collect()
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn equal_servers_differ_by_rounding_only(n in 3u16..100) {
            for scheme in SCHEMES {
                let gmap = plan(GmapId(1), scheme, &equal(n)).unwrap();
                prop_assert!(gmap.slots.len().is_power_of_two());
                prop_assert!(gmap.slots.len() >= 64 * usize::from(n));
                for place in 0..scheme.copies() {
                    let counts = counts(&gmap, |p| p == place);
                    prop_assert_eq!(counts.len(), usize::from(n));
                    prop_assert!(counts.values().max().unwrap() - counts.values().min().unwrap() <= 1);
                }
            }
        }

        #[test]
        fn servers_of_a_tuple_differ_and_the_order_of_candidates_does_not_matter(
            servers in candidates(), seed: u64,
        ) {
            for scheme in SCHEMES {
                let gmap = plan(GmapId(1), scheme, &servers).unwrap();
                for tuple in &gmap.slots {
                    prop_assert_eq!(tuple.iter().collect::<BTreeSet<_>>().len(), scheme.copies());
                }
                let mut shuffled = servers.clone();
                stdx::Prng::new(seed).shuffle(&mut shuffled);
                prop_assert_eq!(plan(GmapId(1), scheme, &shuffled).unwrap(), gmap);
            }
        }

        #[test]
        fn copies_and_primaries_are_shared_by_weight(servers in candidates()) {
            for scheme in SCHEMES {
                let gmap = plan(GmapId(1), scheme, &servers).unwrap();
                let ring = ring_order(&servers, scheme.copies());
                let shares = shares(&ring, scheme.copies());
                let sum: u64 = shares.iter().sum();
                let slots = gmap.slots.len() as f64;
                let (all, first) = (counts(&gmap, |_| true), counts(&gmap, |p| p == 0));
                for (candidate, share) in ring.iter().zip(&shares) {
                    let share = *share as f64 / sum as f64;
                    let copies = all[&candidate.server] as f64;
                    let wanted = share * slots * scheme.copies() as f64;
                    prop_assert!((copies - wanted).abs() <= 3.0 + 0.02 * wanted, "{copies} copies, {wanted} wanted");
                    let primaries = first[&candidate.server] as f64;
                    let wanted = share * slots;
                    prop_assert!((primaries - wanted).abs() <= 2.0, "{primaries} primaries, {wanted} wanted");
                }
            }
        }
    }
}
