//! What a server tells of itself (`petal status`).

use super::*;

impl Server {
    pub(super) fn status(&self) -> ServerStatus {
        let counters = &self.data.counters;
        let counter = |name: &str, value: u64| (name.to_string(), value);
        let [disk_read, disk_write] = self.disk_times.worst(self.now);
        ServerStatus {
            server: self.me,
            incarnation: self.incarnation,
            state_index: self.state().map_or(0, |s| s.index),
            ring_leader: self.global.as_ref().and_then(GlobalState::leader),
            lease: self.liveness.lease(self.now).is_some(),
            connected: self.connected.keys().copied().collect(),
            slots_acting: self.data.acting(),
            disks: self.stores.status(self.data.is_full()),
            counters: vec![
                counter("reads", counters.reads),
                counter("writes", counters.writes),
                counter("refused", counters.refused),
                counter("replicated", counters.replicated),
                counter("settlements", counters.settlements),
                counter("settled_elements", counters.settled_elements),
                counter("reclaimed_rows", counters.reclaimed_rows),
                counter("reclaims_left", self.data.reclaims() as u64),
                counter("disk_errors", self.watch.errors()),
                counter("bad_blocks", counters.bad_blocks),
                counter("repaired_blocks", counters.repaired_blocks),
                counter("slots_lost_by_lying_disks", counters.lost_by_others),
                counter("recovering_slots", self.data.recovery().0 as u64),
                counter("recovering_elements_left", self.data.recovery().1 as u64),
                counter("recovered_elements", counters.recovered_elements),
                counter("recovered_blocks", counters.recovered_blocks),
                counter("disk_read_p95_us", disk_read),
                counter("disk_write_p95_us", disk_write),
            ],
        }
    }
}
