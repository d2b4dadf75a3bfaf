//! Which life of the server this is: how the cluster takes it, or refuses it, and what shows later that it must not go on
//! (2.5): disks that were put back to an earlier moment, or copied.

use super::{Output, Server, Stage};
use crate::global_state::{CommandError, GlobalState};
use crate::ids::{DiskId, Lives, ServerId, StateIndex};
use crate::message::CommandId;
use crate::sabotage::Sabotage;

impl Server {
    /// The disks that this life stands on: without one that it had, the cluster refuses it.
    pub(super) fn disks_to_tell(&self, global: &GlobalState) -> Vec<(DiskId, Lives, u64)> {
        let mut disks = self.disks_found.clone();
        if self.sabotage == Sabotage::MissingDisk {
            let known = global.state().servers.get(&self.me).into_iter().flat_map(|s| &s.disks);
            let missing = known.filter(|(id, _)| disks.iter().all(|(found, ..)| found != *id));
            let missing: Vec<_> = missing.map(|(id, disk)| (*id, disk.incarnation.into(), disk.capacity)).collect();
            disks.extend(missing);
        }
        disks
    }

    /// From here on this server acts: it knows that its last life is over everywhere.
    pub(super) fn on_own_server_up(&mut self, id: CommandId) {
        if self.refused.is_some() {
            return;
        }
        let result = self.global().state().result(&id).map(|(_, result)| result.clone());
        match result {
            // A copy of an old disk. Its life must not stand on it, or at the next try it would pass for one that the
            // cluster has not heard of yet.
            Some(Err(error @ (CommandError::OldIncarnation { .. } | CommandError::DiskFromThePast { .. }))) => {
                let found: Vec<Lives> = self.disks_found.iter().map(|(_, lives, _)| lives.clone()).collect();
                self.refused = Some(match &error {
                    CommandError::DiskFromThePast { disk, .. } => error.to_string().replace("PATH", self.path_of(*disk)),
                    _ => error.to_string(),
                });
                self.stores.take_life_back(&found);
            }
            Some(Err(CommandError::NoSuchServer(me))) => self.out.push_back(Output::Fatal(format!(
                "{me} was removed from the cluster; to use its disks again make them anew, as a new server (`petal join --help`)"
            ))),
            Some(Err(error)) => self.out.push_back(Output::Fatal(error.to_string())),
            _ => {
                self.stage = Stage::Running;
                self.stores.note_taken();
                self.follow_state(None);
                self.data.want_sweep();
                let state = self.global.as_ref().expect("it has decided").state();
                self.data.want_reclaim_of_all(state);
                self.data.begin_to_leave(state);
                self.settle_leaving();
                self.close_gate_of_all();
                self.with_data(|data, ctx| data.run_scrub(ctx, true));
                self.out.push_back(Output::Ready);
            }
        }
    }

    fn path_of(&self, disk: DiskId) -> &str {
        let at = self.disks_found.iter().position(|(found, ..)| *found == disk);
        at.map_or("PATH", |at| self.stores.path(at))
    }

    /// A ring of one, whose disk knows less than others were told.
    pub(super) fn end_as_forgetful(&mut self, teller: ServerId, told: StateIndex) {
        let known = self.global().accepted_end();
        self.out.push_back(Output::Fatal(format!(
            "{teller} knows decision {told} of this cluster, and this server, which decides alone, only {known}: its disk was \
             put back to an earlier moment (a restored copy), or has lost what it acknowledged. Nothing is changed; put the \
             right disk in its place and start it again"
        )));
    }

    /// Only a copy of the disks can do that: the life of a process ends before the next one begins on the same.
    pub(super) fn end_if_another_life_began(&mut self) {
        let known = self.state().and_then(|s| s.servers.get(&self.me)).map(|s| s.incarnation);
        if let Some(later) = known.filter(|known| *known > self.incarnation) {
            self.out.push_back(Output::Fatal(format!(
                "{} has begun its life {} elsewhere, and this process is its life {}: somebody runs it with a copy of these \
                 disks. This process ends",
                self.me, later, self.incarnation
            )));
        }
    }
}
