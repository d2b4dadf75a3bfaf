//! How redundant the data are: which slots have fewer copies in sync than their scheme, why, and which have
//! none that answers. A question to the global state alone, so `petal what-if` can ask it about servers that
//! are not down yet.
//!
//! The counts of what is still to be copied come from the servers (`ServerStatus`), since nobody else knows
//! them. Paper 2.7 (progress), 2.13 (what-if).

use petal::global_state::{SlotState, State};
use petal::ids::{ElementKey, GmapId, ServerId, SlotId, StateIndex};
use petal::message::ServerStatus;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};

/// What is said if all slots have a copy that can be reached.
pub const NOTHING_UNAVAILABLE: &str = "Nothing is unavailable.";

/// The slots of one number of copies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// All.
    pub slots: u64,
    /// With fewer live copies in sync than asked for, or none.
    pub degraded: u64,
    /// With none: nothing can be read or written there.
    pub unavailable: u64,
}

/// A server whose copies are missing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Missing {
    /// In so many slots.
    pub slots: u64,
    /// State index of the last command that took it out of one.
    pub since: StateIndex,
    /// It cannot be asked: down, or away.
    pub away: bool,
    /// State index of the command from which on it is brought back: it started, or was taken out while it ran.
    pub begun: StateIndex,
    /// Slots that it was brought back in since then.
    pub back: u64,
}

/// The answer.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Redundancy {
    /// By copies asked for.
    pub schemes: BTreeMap<usize, Counts>,
    /// Who is missing.
    pub missing: BTreeMap<ServerId, Missing>,
    /// Servers of the slots of which nothing is available.
    pub needed: BTreeSet<ServerId>,
    /// Slots that are short, with whether they are unavailable.
    short: BTreeMap<(GmapId, u32), bool>,
    /// Slots that are being brought back, and elements left to copy there, as their primaries told.
    pub recovering: (u64, u64),
}

impl Redundancy {
    /// Of the state, where those in `away` do not answer (declared down or not).
    pub fn of(state: &State, away: &BTreeSet<ServerId>) -> Redundancy {
        let is_away = |s: ServerId| away.contains(&s) || state.servers.get(&s).is_none_or(|s| s.down);
        let mut all = Redundancy::default();
        for (id, slot) in state.all_slots() {
            let copies = state.gmaps.get(&id.gmap).map_or(slot.tuple.len(), |g| g.scheme.copies());
            all.count(id, slot, copies, &is_away);
        }
        for (server, missing) in &mut all.missing {
            let begun = state.servers.get(server).map_or(0, |s| s.up).max(missing.since);
            // Whoever is brought back begins a new term; a start itself renews those that it was in sync in.
            let is_back = |slot: &&SlotState| slot.term > begun && slot.in_sync().any(|s| s == *server);
            missing.begun = begun;
            missing.back = state.all_slots().map(|(_, slot)| slot).filter(is_back).count() as u64;
        }
        all
    }

    fn count(&mut self, id: SlotId, slot: &SlotState, copies: usize, is_away: &impl Fn(ServerId) -> bool) {
        let good = slot.in_sync().filter(|s| !is_away(*s)).count();
        let counts = self.schemes.entry(copies).or_default();
        counts.slots += 1;
        if good >= copies {
            return;
        }
        counts.degraded += 1;
        counts.unavailable += u64::from(good == 0);
        self.short.insert((id.gmap, id.slot), good == 0);
        for member in slot.tuple.iter().filter(|m| !m.in_sync || is_away(m.server)) {
            let missing = self.missing.entry(member.server).or_default();
            missing.slots += 1;
            if !member.in_sync {
                missing.since = missing.since.max(member.out);
            }
            missing.away = is_away(member.server);
        }
        if good == 0 {
            self.needed.extend(slot.in_sync());
        }
    }

    /// Adds what the primaries tell of their copying.
    pub fn with_progress<'a>(mut self, statuses: impl Iterator<Item = &'a ServerStatus>) -> Redundancy {
        for status in statuses {
            let counter = |name: &str| status.counters.iter().find(|(n, _)| n == name).map_or(0, |(_, value)| *value);
            self.recovering.0 += counter("recovering_slots");
            self.recovering.1 += counter("recovering_elements_left");
        }
        self
    }

    /// Every slot has as many copies in sync as asked for.
    pub fn is_full(&self) -> bool {
        self.short.is_empty()
    }

    /// Slots without a copy that answers.
    pub fn unavailable(&self) -> u64 {
        self.schemes.values().map(|c| c.unavailable).sum()
    }

    /// Of the slots that a disk's address space goes to: `(all, short, unavailable)`.
    pub fn of_disk(&self, state: &State, disk: &petal::translator::vdir::Vdisk) -> Counts {
        let Some(family) = state.families.get(&disk.family) else { return Counts::default() };
        let slots = state.slots.get(&family.gmap).map_or(0, |s| s.len() as u64);
        let elements_per_unit = family.stripe_unit / petal::ids::ELEMENT_SIZE;
        let units = disk.size.div_ceil(family.stripe_unit).min(slots);
        let of_unit = |unit: u64| {
            let element = ElementKey { family: disk.family, element: unit * elements_per_unit };
            state.slot_of(element.family, element.element)
        };
        let mut counts = Counts { slots: units, ..Counts::default() };
        for slot in (0..units).filter_map(of_unit) {
            if let Some(unavailable) = self.short.get(&(slot.gmap, slot.slot)) {
                counts.degraded += 1;
                counts.unavailable += u64::from(*unavailable);
            }
        }
        counts
    }

    /// In sentences, one a line. `why` tells of a server in a few words why it is missing.
    pub fn sentences(&self, why: impl Fn(ServerId, &Missing) -> String) -> Vec<String> {
        if self.schemes.is_empty() {
            return vec!["Redundancy: there is no disk yet.".into()];
        }
        if self.is_full() {
            return vec![format!("Redundancy: all data on {}.", self.copies())];
        }
        let mut lines = Vec::new();
        for (copies, counts) in self.schemes.iter().filter(|(_, c)| c.degraded > 0) {
            let Counts { slots, degraded, .. } = counts;
            let scheme = if *copies == 1 { "1 copy".into() } else { format!("{copies} copies") };
            lines.push(format!("Redundancy: {degraded} of {slots} slots of {scheme} have fewer in sync."));
        }
        for (server, missing) in &self.missing {
            lines.push(format!("  {server} is missing in {}: {}.", slots(missing.slots), why(*server, missing)));
        }
        if self.recovering.0 > 0 {
            let (in_slots, left) = self.recovering;
            // A few slots at a time; how much the others lack is known when their turn comes.
            let others = (self.short.len() as u64).saturating_sub(in_slots);
            let then = if others > 0 { format!(", then come {others} more") } else { String::new() };
            lines.push(format!(
                "  Catching up in {}: {left} elements of 64 KiB left to copy there{then}.",
                slots(in_slots)
            ));
        }
        lines.push(match self.unavailable() {
            0 => NOTHING_UNAVAILABLE.into(),
            none => {
                let needed: Vec<String> = self.needed.iter().map(ToString::to_string).collect();
                let needed = needed.join(", ");
                format!("UNAVAILABLE: {}: I/O there waits until its server is back (of {needed}).", slots(none))
            }
        });
        lines
    }

    fn copies(&self) -> String {
        let counts: Vec<String> = self.schemes.keys().map(ToString::to_string).collect();
        match counts.as_slice() {
            [one] if one == "1" => "1 copy, as asked for: the loss of one server makes part of it unavailable".into(),
            [one] => format!("{one} copies"),
            several => format!("{} copies, as asked for", several.join(" or ")),
        }
    }

    /// For programs.
    pub fn json(&self) -> Value {
        let schemes = self.schemes.iter().map(|(copies, c)| {
            json!({"copies": copies, "slots": c.slots, "degraded": c.degraded, "unavailable": c.unavailable})
        });
        let missing = self.missing.iter().map(
            |(server, m)| json!({"server": server.to_string(), "slots": m.slots, "since": m.since, "away": m.away, "back": m.back}),
        );
        json!({
            "full": self.is_full(),
            "available": self.unavailable() == 0,
            "schemes": schemes.collect::<Vec<_>>(),
            "missing": missing.collect::<Vec<_>>(),
            "recovering_slots": self.recovering.0,
            "recovering_elements_left": self.recovering.1,
        })
    }
}

/// So many slots, in words.
pub fn slots(count: u64) -> String {
    if count == 1 { "1 slot".into() } else { format!("{count} slots") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use petal::global_state::{Command, Entry, Genesis, GenesisServer};
    use petal::ids::{ClusterId, DiskId, Incarnation};
    use petal::message::CommandId;
    use petal::translator::gmap::Scheme;

    fn state_of_four() -> State {
        let server = |i| GenesisServer { server: ServerId(i), addresses: vec![format!("unix:s{i}.sock")] };
        let genesis = Genesis { cluster: ClusterId(1), name: "test".into(), ring: (1..=4).map(server).collect() };
        let mut state = State::genesis(&genesis);
        for s in 1..=4 {
            run(
                &mut state,
                Command::ServerUp {
                    server: ServerId(s),
                    incarnation: Incarnation(1),
                    addresses: vec![format!("unix:s{s}.sock")],
                    disks: vec![(DiskId(u128::from(s)), Incarnation(0).into(), 1 << 30)],
                },
            );
        }
        let scheme = Scheme::Chained;
        run(&mut state, Command::CreateDisk { name: "a".into(), size: 1 << 40, scheme, stripe_unit: 1 << 20 });
        state
    }

    fn run(state: &mut State, command: Command) {
        let number = state.index + 1;
        let id = CommandId { proposer: 7, number, finished_below: number };
        state.apply(&Entry { id, command }).0.unwrap();
    }

    fn why(_: ServerId, missing: &Missing) -> String {
        format!("since {}", missing.since)
    }

    #[test]
    fn all_data_on_two_copies_while_nobody_is_missing() {
        let state = state_of_four();
        let redundancy = Redundancy::of(&state, &BTreeSet::new());
        assert!(redundancy.is_full());
        assert_eq!(redundancy.sentences(why), ["Redundancy: all data on 2 copies."]);
    }

    #[test]
    fn a_server_that_is_away_leaves_half_of_the_slots_short_and_two_neighbours_some_unavailable() {
        let state = state_of_four();
        let one = Redundancy::of(&state, &BTreeSet::from([ServerId(2)]));
        let counts = one.schemes[&2];
        assert_eq!((counts.degraded * 2, counts.unavailable), (counts.slots, 0));
        assert_eq!(one.sentences(why).last().unwrap(), "Nothing is unavailable.");
        let disk = state.vdisk_named("a").unwrap();
        assert_eq!(one.of_disk(&state, disk), counts);

        let two = Redundancy::of(&state, &BTreeSet::from([ServerId(2), ServerId(3)]));
        assert_eq!(two.schemes[&2].unavailable * 4, counts.slots);
        assert_eq!(two.needed, BTreeSet::from([ServerId(2), ServerId(3)]));
        let across = Redundancy::of(&state, &BTreeSet::from([ServerId(2), ServerId(4)]));
        assert_eq!((across.schemes[&2].degraded, across.unavailable()), (counts.slots, 0));
    }

    #[test]
    fn a_server_that_was_declared_down_is_missing_since_that_command() {
        let mut state = state_of_four();
        let (server, incarnation) = (ServerId(3), Incarnation(1));
        run(&mut state, Command::Suspect { server, incarnation });
        let suspect = state.index;
        run(&mut state, Command::ServerDown { server, incarnation, suspect });
        let redundancy = Redundancy::of(&state, &BTreeSet::new());
        assert_eq!(redundancy.missing.keys().collect::<Vec<_>>(), [&server]);
        assert_eq!(redundancy.missing[&server].since, state.index);
        assert!(redundancy.missing[&server].away && !redundancy.is_full());
    }
}
