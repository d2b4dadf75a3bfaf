//! Every run of the model, with all rules and with one left out at a time.

use petal_model::{Action, Config, Rule, State};
use stateright::{Checker, Model, Property};

struct Slot(Config);

impl Model for Slot {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![self.0.first()]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        self.0.actions(state, actions);
    }

    fn next_state(&self, state: &State, action: Action) -> Option<State> {
        Some(self.0.next(state, action))
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("sound", |slot: &Slot, state: &State| slot.0.complaint(state).is_none()),
            Property::sometimes("all writes are acknowledged", |slot: &Slot, state: &State| {
                state.acknowledged() == slot.0.writes
            }),
            Property::sometimes("a primary comes back", |_, state: &State| state.has_come_back(0)),
            Property::sometimes("a secondary comes back", |_, state: &State| state.has_come_back(1)),
        ]
    }
}

fn config(copies: usize, writes: u8, crashes: u8, suspicions: u8, take_outs: u8) -> Config {
    Config { copies, writes, crashes, suspicions, take_outs, without: Rule::None }
}

/// Every state is looked at, none is wrong, and what is to happen does in some of them.
fn holds(config: Config) {
    let began = std::time::Instant::now();
    let checker = Slot(config).checker().threads(2).spawn_dfs().join();
    println!("{config:?}: {} states in {:?}", checker.unique_state_count(), began.elapsed());
    if checker.discovery("sound").is_some() {
        // The shortest way there says more.
        let checker = Slot(config).checker().spawn_bfs().join();
        let path = checker.discovery("sound").expect("it was found before");
        panic!("{:?} after {:#?}", config.complaint(path.last_state()), path.into_actions());
    }
    checker.assert_properties();
}

/// Without the rule a wrong state is found.
fn fails(without: Rule, config: Config) {
    let config = Config { without, ..config };
    let checker = Slot(config).checker().threads(2).spawn_dfs().join();
    let path = checker.discovery("sound").unwrap_or_else(|| panic!("nothing is wrong without {without:?}"));
    let complaint = config.complaint(path.last_state()).expect("it was found");
    println!("without {without:?}: {complaint}, among {} states", checker.unique_state_count());
}

/// Two writes, a death and a suspicion: takes a primary or a secondary out and brings it back.
#[test]
fn two_copies_survive_a_crash_and_a_suspicion() {
    holds(config(2, 2, 1, 1, 0));
}

#[test]
fn two_copies_survive_two_suspicions() {
    holds(config(2, 1, 0, 2, 0));
}

#[test]
fn two_copies_survive_a_take_out_and_a_suspicion() {
    holds(config(2, 1, 0, 1, 1));
}

#[test]
fn three_copies_survive_a_suspicion() {
    holds(config(3, 1, 0, 1, 0));
}

/// Too long for every run: `cargo test --release -p petal-model -- --ignored`.
#[test]
#[ignore = "takes minutes; run it when the protocol or the model has changed"]
fn two_copies_survive_a_crash_and_two_suspicions() {
    holds(config(2, 1, 1, 2, 0));
}

/// One write, and one server that is taken for dead.
fn small() -> Config {
    config(2, 1, 0, 1, 0)
}

#[test]
fn every_rule_about_writes_and_reads_is_needed() {
    fails(Rule::AckBeforeSecondary, small());
    fails(Rule::NoSettlement, small());
    fails(Rule::ServeBusy, small());
    fails(Rule::NoPromise, config(2, 2, 1, 0, 0));
}

#[test]
fn every_rule_about_leases_is_needed() {
    fails(Rule::DownWithinLease, small());
    fails(Rule::TakeOutWithoutWait, config(2, 1, 0, 0, 1));
}

#[test]
fn every_rule_about_recovery_is_needed() {
    fails(Rule::NewcomerNotCounted, small());
    fails(Rule::SendsOutstanding, small());
    fails(Rule::CopyOnlyIfNewer, small());
    fails(Rule::SurvivorsListOnly, small());
    fails(Rule::WatermarkWhileOut, small());
    fails(Rule::InSyncUnconditional, config(2, 1, 1, 1, 0));
    fails(Rule::LastMemberLeaves, config(2, 1, 0, 2, 0));
}
