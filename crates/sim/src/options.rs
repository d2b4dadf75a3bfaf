//! What one seed's run looks like: drawn before anything else, and printed first.
//!
//! Swarm testing: instead of one mixture of everything, each run draws which kinds of faults and
//! operations it has at all, and how fast everything is. A fault that only does harm when another is
//! absent (a slow disk without crashes that reset it, say) is then met by some runs.

use crate::disk::DiskTimes;
use crate::net::NetTimes;
use petal::sabotage::Sabotage;
use stdx::{Duration, Prng};

/// Everything that is drawn per seed.
#[derive(Clone, Debug)]
pub struct Options {
    /// Servers, 1..=5.
    pub servers: usize,
    /// How many of them are the ring: 1 or 3.
    pub ring: usize,
    /// Learners that join while faults are already injected.
    pub late_learners: bool,
    /// Disks per server, 1 or 2.
    pub disks: usize,
    /// Bytes of a disk.
    pub disk_size: u64,
    /// Bytes of its journal, if not what the store would choose: small ones are checkpointed often.
    pub journal: Option<u64>,
    /// Bytes of its data region, likewise: in small ones freed blocks are soon used again.
    pub data: Option<u64>,
    /// Disks behave like raw devices: all of it may be written from the start.
    pub raw_disks: bool,
    /// Copies that new virtual disks have: 1, 2, 3, each at most as many as there are servers.
    pub copies: Vec<usize>,
    /// Stripe unit of new virtual disks.
    pub stripe_unit: u64,
    /// Element entries that a server keeps in memory.
    pub cache_elements: usize,
    /// Clients at one time, 1..=4.
    pub clients: usize,
    /// Operations that a client keeps outstanding.
    pub depth: usize,
    /// Deadline of clients' requests; `None` = for ever.
    pub client_deadline: Option<Duration>,
    /// Operations of the whole run, about.
    pub operations: u64,
    /// Virtual time with faults.
    pub faulty: Duration,
    /// The network's speed.
    pub net: NetTimes,
    /// The disks' speed.
    pub disk_times: DiskTimes,
    /// A server's thread takes up its inputs at most so late.
    pub run_delay: Duration,
    /// Clocks run fast or slow by up to so many parts per million.
    pub drift: u64,
    /// Mean time between two faults; `None` = no faults at all.
    pub fault_interval: Option<Duration>,
    /// A dead server or client starts again after at most so long.
    pub restart_delay: Duration,
    /// A dead server is declared down after at most so long, if it is still dead.
    pub bury_after: Option<Duration>,
    /// How likely each fault is, relative to the others.
    pub faults: FaultWeights,
    /// How likely each operation is, relative to the others.
    pub mix: Mix,
    /// One disk, that everybody shares, with few hot blocks.
    pub crowded: bool,
    /// The hot blocks take nearly all of the space.
    pub full: bool,
    /// Servers that die are declared down and stay away while writes go on, to many elements of one slot: much is
    /// to be copied when they come back.
    pub recovering: bool,
    /// Time of a round of scrub.
    pub scrub_period: Option<Duration>,
    /// Whether the end of the run is a loss of power before everything is read again.
    pub power_loss_at_end: bool,
    /// Every second client only reads: it does not learn from its own writes who acts by now.
    pub readers: bool,
    /// For how much those ask at one time, at most: where not asked for, for no more than the checker of a cell can
    /// follow (128 operations of all clients).
    pub reads_max: usize,
    /// What is done with snapshots and clones, if anything.
    pub snapshots: Option<SnapshotMix>,
    /// Who is down for so many seconds is replaced, once the operator has said so.
    pub replace_after: Option<u32>,
    /// One failure at a time: the next one is not before everything has been whole for a while.
    pub alone: bool,
    /// Nobody does anything by himself: a scenario asks for everything.
    pub scripted: bool,
    /// A rule that is left out on purpose.
    pub sabotage: Sabotage,
}

/// How likely each fault is, relative to the others.
#[derive(Clone, Copy, Debug)]
pub struct FaultWeights {
    /// Kill one server.
    pub crash_one: u64,
    /// Kill some.
    pub crash_several: u64,
    /// Kill all.
    pub crash_all: u64,
    /// Ask one server to stop.
    pub stop: u64,
    /// Reset a connection.
    pub reset: u64,
    /// Stall a connection.
    pub stall: u64,
    /// Slow a disk down.
    pub slow_disk: u64,
    /// Slow a server's thread down.
    pub slow_server: u64,
    /// Kill a client.
    pub crash_client: u64,
    /// Lie in wait for a moment that matters, and kill somebody then.
    pub ambush: u64,
    /// Lie in wait for a stream's message or acknowledgement, and reset its connection then.
    pub cut: u64,
    /// Lie in wait for a stream's message, and hold it up with all behind it.
    pub hold: u64,
    /// Lie in wait for a stream's message, and kill its sender at once.
    pub strand: u64,
    /// What a write carries to a replica is altered on the way, checksums too, and the replica dies before
    /// it is acknowledged. Never drawn: no disk and no network does that; only settlement must survive it.
    pub differ: u64,
    /// A stream's message comes again long after. Never drawn: connections do not do that, and before there
    /// is failover there is nobody else from whom a message of an older term could come.
    pub ghost: u64,
    /// Cut a server off for longer than a lease, or a bit less.
    pub partition: u64,
    /// Stop a server for as long, and let it go on.
    pub freeze: u64,
    /// Cut a server off from another one, or from all others, but not from clients.
    pub sever: u64,
    /// Lie in wait for what is sent to a member that is being brought back, and kill it, its source, or everybody.
    pub relapse: u64,
    /// Lie in wait for the last messages before a member is in sync again, hold them up, and kill their sender.
    pub lag: u64,
    /// An `InSync` of an older term or life is decided when its member is being brought back again, and the slot's
    /// primary dies.
    pub late: u64,
    /// A block on some disk, of which another server has a good copy, rots or cannot be read any more.
    pub spoil: u64,
    /// A server loses one of its disks, or all, while others have everything, and is made anew.
    pub lose: u64,
    /// A disk answers nothing for 2 to 20 seconds; one at a time.
    pub hang: u64,
    /// A disk fails for good, where all data have other copies; once in a run.
    pub fail: u64,
    /// A disk fails one write.
    pub stumble: u64,
    /// A server is killed, and one of its disks has lost the last of what it had acknowledged. Drawn only by itself: any
    /// other failure before the others have put it back is a second one.
    pub lie: u64,
    /// Cut a server off from all others, and not from clients, until others act in its place and longer.
    pub isolate: u64,
    /// Cut two servers off from each other, and one of them from all others at about the moment at which it is taken
    /// out of its slots for that.
    pub oust: u64,
    /// Cut a client off from one server, which all others reach.
    pub estrange: u64,
    /// A bit of what is sent to a replica turns over on the way.
    pub damage: u64,
    /// An operator drains a server, lets one hold its share again, or turns back what is under way.
    pub shift: u64,
}

/// How likely each operation is, relative to the others.
#[derive(Clone, Copy, Debug)]
pub struct Mix {
    /// Read a range.
    pub read: u64,
    /// Write a range.
    pub write: u64,
    /// Zero a range.
    pub zero: u64,
    /// Discard a range.
    pub discard: u64,
    /// Zero or discard everything.
    pub zero_all: u64,
    /// Ask for extents.
    pub extents: u64,
    /// Detach.
    pub detach: u64,
    /// Management calls per hundred operations.
    pub admin_percent: u64,
    /// Disks may shrink.
    pub shrink: bool,
}

/// What is done with snapshots and clones: how likely each operation is, relative to the others.
#[derive(Clone, Copy, Debug, Default)]
pub struct SnapshotMix {
    /// Time between two of them, about.
    pub every: Duration,
    /// Snapshot of one disk.
    pub one: u64,
    /// Snapshots of several disks at one instant.
    pub several: u64,
    /// Clone of a snapshot.
    pub clone_snapshot: u64,
    /// Clone of a disk as it is.
    pub clone_disk: u64,
    /// A disk goes back to a snapshot.
    pub rollback: u64,
    /// Delete a snapshot, a clone, a parent, or several of them.
    pub delete: u64,
    /// Another name for a snapshot.
    pub rename: u64,
    /// Protect, release.
    pub protect: u64,
    /// Set a policy.
    pub policy: u64,
    /// End somebody's session.
    pub evict: u64,
    /// Flatten a clone, or a disk that was rolled back.
    pub flatten: u64,
    /// In so many of a hundred times somebody attaches what is being made before the call has returned.
    pub eager_percent: u64,
    /// Snapshots and clones at one time: with so many the next thing is to delete one.
    pub most: usize,
}

/// What the caller wants instead of what the seed draws.
#[derive(Clone, Debug, Default)]
pub struct Overrides {
    /// The rule to leave out.
    pub sabotage: Sabotage,
    /// Servers.
    pub servers: Option<usize>,
    /// Disks per server.
    pub disks: Option<usize>,
    /// Copies of every virtual disk.
    pub copies: Option<usize>,
    /// Operations.
    pub operations: Option<u64>,
    /// Mean time between faults.
    pub fault_interval: Option<Duration>,
    /// Only crashes of servers, no other faults.
    pub only_crashes: bool,
    /// No faults at all.
    pub no_faults: bool,
    /// One shared disk with few hot blocks: many operations of different clients on each.
    pub crowded: bool,
    /// Disks never shrink.
    pub no_shrink: bool,
    /// Operations in quick succession, on elements of one slot: whoever dies or is cut off leaves many unfinished,
    /// and is back before they are asked again.
    pub busy: bool,
    /// With `crowded`: one small disk, of which the hot blocks take nearly all, so that what one write frees is
    /// soon used by another.
    pub full: bool,
    /// With `crowded`: servers that die stay away for a while, and hot blocks lie in many elements of one slot.
    pub recovering: bool,
    /// A fast network, fast disks, a ring of three and much time: where it is measured how long something takes.
    pub swift: bool,
    /// Every second client only reads; and the run is long enough for several leases to end.
    pub readers: bool,
    /// Snapshots are made, also where the seed draws none; with `crowded` nothing but snapshots.
    pub snapshots: bool,
    /// Servers are drained and filled all the time, whatever else the seed draws.
    pub shifts: bool,
    /// One failure at a time.
    pub alone: bool,
    /// Nobody does anything by himself, and there are no faults.
    pub scripted: bool,
    /// These faults only.
    pub faults: Option<FaultWeights>,
}

impl Options {
    /// Draws a run.
    pub fn draw(prng: &mut Prng, overrides: &Overrides) -> Options {
        let servers = overrides.servers.unwrap_or_else(|| *prng.pick(&[1, 2, 2, 3, 3, 3, 4, 4, 5]));
        let ring = if servers >= 3 && prng.chance(3, 4) { 3 } else { 1 };
        let mut options = Options {
            servers,
            ring,
            late_learners: prng.chance(1, 4),
            disks: overrides.disks.unwrap_or_else(|| prng.between(1, 2) as usize),
            disk_size: *prng.pick(&[256 << 20, 1 << 30]),
            journal: *prng.pick(&[Some(512 << 10), Some(512 << 10), Some(1 << 20), None]),
            data: *prng.pick(&[Some(4 << 20), Some(6 << 20), Some(24 << 20), None]),
            raw_disks: prng.chance(1, 3),
            copies: draw_copies(prng, servers),
            stripe_unit: *prng.pick(&[64 << 10, 128 << 10, 1 << 20]),
            cache_elements: *prng.pick(&[4, 64, 4096]),
            clients: prng.between(1, 4) as usize,
            depth: *prng.pick(&[1, 2, 4, 8]),
            client_deadline: prng.chance(1, 4).then(|| Duration::from_millis(prng.between(50, 3000))),
            operations: prng.between(200, 1200),
            faulty: Duration::from_millis(prng.between(500, 6000)),
            net: draw_net(prng),
            disk_times: draw_disk_times(prng),
            run_delay: Duration::from_micros(*prng.pick(&[1, 20, 200, 2000])),
            drift: *prng.pick(&[0, 100, 10_000]),
            fault_interval: prng.chance(9, 10).then(|| Duration::from_millis(*prng.pick(&[25, 100, 300, 1000]))),
            restart_delay: Duration::from_millis(*prng.pick(&[2, 20, 300, 1500, 4000])),
            bury_after: prng.chance(1, 2).then(|| Duration::from_millis(*prng.pick(&[1, 20, 300]))),
            faults: FaultWeights::draw(prng),
            mix: Mix::draw(prng),
            crowded: false,
            full: false,
            recovering: false,
            scrub_period: Some(petal::scrub::PERIOD_DEFAULT),
            readers: false,
            reads_max: 48,
            power_loss_at_end: prng.chance(1, 2),
            snapshots: None,
            replace_after: None,
            alone: overrides.alone,
            scripted: overrides.scripted,
            sabotage: overrides.sabotage,
        };
        // Drawn apart, so that the rest of a seed's run stays what it was.
        let mut more = Prng::new(prng.clone().next_u64() ^ 0x5ca1ab1e);
        if servers > 1 && !overrides.crowded && more.chance(1, 3) {
            options.recover(&mut more);
        }
        let mut last = Prng::new(more.clone().next_u64() ^ 0x0a57);
        options.readers = last.chance(1, 4);
        options.faults.isolate = *last.pick(&[0, 1, 3]);
        options.faults.oust = *last.pick(&[0, 1, 2]);
        options.faults.estrange = *last.pick(&[0, 1, 3]);
        options.faults.damage = *last.pick(&[0, 1, 3]);
        if !overrides.crowded {
            let millis = *more.pick(&[None, Some(300), Some(1000), Some(5000)]);
            options.scrub_period = millis.map(Duration::from_millis);
            options.faults.hang = *more.pick(&[0, 0, 1, 3]);
            options.faults.fail = *more.pick(&[0, 0, 1, 3]);
            options.faults.stumble = *more.pick(&[0, 1, 3]);
        }
        let mut newest = Prng::new(last.clone().next_u64() ^ 0x5a4b);
        // Where it is measured how long something takes: a failure while a gate is closed may cost more (P6).
        if overrides.snapshots || !overrides.crowded && !overrides.swift && newest.chance(1, 2) {
            options.take_snapshots(&mut newest, overrides.crowded);
        }
        let mut shifting = Prng::new(newest.clone().next_u64() ^ 0x5417);
        let draws_shifts = servers > 2 && !overrides.crowded && !overrides.swift && shifting.chance(1, 3);
        if draws_shifts || overrides.shifts {
            options.shift(&mut shifting, overrides.shifts);
        }
        let mut lone = Prng::new(shifting.clone().next_u64() ^ 0x0a10);
        let draws_alone = servers > 2 && !overrides.crowded && !overrides.swift && lone.chance(1, 10);
        if draws_alone && overrides.faults.is_none() || overrides.alone {
            options.fail_alone();
        }
        options.apply(overrides);
        if overrides.recovering {
            options.recovering = true;
            options.restart_delay = Duration::from_millis(*more.pick(&[100, 200, 400]));
            options.bury_after = Some(Duration::from_millis(1));
            let interval = Duration::from_millis(*more.pick(&[100, 200, 400]));
            options.fault_interval = overrides.fault_interval.or(Some(interval));
            options.faulty = Duration::from_millis(more.between(2000, 4000));
            options.operations = overrides.operations.unwrap_or(options.faulty.as_millis() as u64);
        }
        if overrides.readers {
            // Time for several leases to end while those who only read still ask whom they know.
            options.readers = true;
            options.reads_max = usize::MAX;
            options.recovering = true;
            options.faulty = Duration::from_millis(more.between(6000, 9000));
            options.operations = overrides.operations.unwrap_or(options.faulty.as_millis() as u64);
            options.fault_interval = overrides.fault_interval.or(Some(Duration::from_millis(1500)));
        }
        options
    }

    /// Disks are snapshotted, cloned and rolled back, and there is mostly room for that.
    fn take_snapshots(&mut self, prng: &mut Prng, crowded: bool) {
        self.snapshots = Some(if crowded { SnapshotMix::crowded(prng) } else { SnapshotMix::draw(prng) });
        if !crowded {
            self.data = *prng.pick(&[Some(6 << 20), Some(24 << 20), Some(24 << 20), None]);
            self.operations = self.operations.max(600);
            self.faulty = self.faulty.max(Duration::from_millis(1500));
        }
    }

    /// Servers are drained and filled: there is room for what moves, and time.
    fn shift(&mut self, prng: &mut Prng, often: bool) {
        self.faults.shift = if often { 8 } else { *prng.pick(&[1, 3, 8]) };
        self.data = *prng.pick(&[Some(24 << 20), None]);
        // Where a copy was before, its blocks are free, and hold the same for a while: what looks at disks to see
        // whether there is another good copy takes them for one.
        self.faults.spoil = 0;
        let mut apart = Prng::new(prng.clone().next_u64() ^ 0xa3a7);
        self.replace_after = *apart.pick(&[None, Some(1), Some(2)]);
        self.copies.retain(|copies| *copies > 1);
        if self.copies.is_empty() {
            self.copies = vec![2];
        }
        self.faulty = self.faulty.max(Duration::from_millis(prng.between(3000, 8000)));
        self.operations = self.operations.max(self.faulty.as_millis() as u64 / 3);
        self.fault_interval = self.fault_interval.or(Some(Duration::from_millis(300)));
    }

    /// Servers stay away for a while and miss much.
    fn recover(&mut self, prng: &mut Prng) {
        self.recovering = true;
        self.stripe_unit = 1 << 20;
        self.operations = prng.between(1000, 3000);
        self.faulty = Duration::from_millis(prng.between(3000, 8000));
        self.fault_interval = Some(Duration::from_millis(*prng.pick(&[100, 300, 1000])));
        self.restart_delay = Duration::from_millis(*prng.pick(&[300, 1000, 2000, 4000]));
        self.bury_after = prng.chance(3, 4).then_some(Duration::from_millis(1));
        self.mix = Mix { write: 40, ..self.mix };
    }

    /// A fast network, fast disks, a ring of three and much time.
    fn be_swift(&mut self) {
        self.ring = self.servers.min(3);
        self.net = NetTimes { min: Duration::from_micros(20), max: Duration::from_millis(1), spike_one_in: 300 };
        let (min, max) = (Duration::from_micros(20), Duration::from_micros(500));
        self.disk_times = DiskTimes { min, max, commit_factor: 3 };
        self.run_delay = Duration::from_micros(20);
        self.faulty = Duration::from_secs(10);
        self.client_deadline = None;
    }

    /// One failure after the other, and everything else is as good as it can be: nothing may stand for long.
    fn fail_alone(&mut self) {
        self.be_swift();
        self.alone = true;
        self.replace_after = None;
        self.servers = self.servers.max(3);
        self.ring = 3;
        self.late_learners = false;
        self.copies = vec![2];
        self.data = None;
        self.full = false;
        self.mix.shrink = false;
        self.snapshots = None;
        self.recovering = false;
        self.readers = false;
        self.faulty = Duration::from_secs(20);
        self.operations = 6000;
        self.power_loss_at_end = false;
        self.restart_delay = Duration::from_millis(1500);
        self.bury_after = None;
        self.fault_interval = Some(Duration::from_millis(200));
        self.faults = FaultWeights {
            crash_one: 2,
            stop: 1,
            partition: 4,
            freeze: 2,
            sever: 2,
            isolate: 2,
            estrange: 1,
            hang: 1,
            ..FaultWeights::NONE
        };
    }

    fn apply(&mut self, overrides: &Overrides) {
        if let Some(copies) = overrides.copies {
            self.copies = vec![copies];
        }
        if let Some(operations) = overrides.operations {
            self.operations = operations;
        }
        if let Some(interval) = overrides.fault_interval {
            self.fault_interval = Some(interval);
        }
        if overrides.only_crashes {
            let crashes =
                FaultWeights { crash_one: 4, crash_several: 2, crash_all: 3, ambush: 9, ..FaultWeights::NONE };
            self.faults = crashes;
        }
        if overrides.full {
            self.full = true;
            self.disks = 1;
            self.data = Some(1 << 20);
        }
        if let Some(faults) = overrides.faults {
            self.faults = faults;
        }
        if overrides.swift {
            self.be_swift();
        }
        if overrides.no_faults || overrides.scripted {
            self.fault_interval = None;
            self.power_loss_at_end = false;
        }
        if overrides.no_shrink {
            self.mix.shrink = false;
        }
        if overrides.crowded {
            self.crowded = true;
            self.clients = self.clients.max(3);
            self.depth = self.depth.clamp(2, 4);
            self.mix = Mix { zero_all: 0, extents: 0, detach: 0, admin_percent: 0, ..self.mix };
        }
        if overrides.busy {
            self.clients = 4;
            self.depth = 4;
            self.client_deadline = None;
            self.stripe_unit = 1 << 20;
            self.faulty = self.faulty.clamp(Duration::from_millis(1000), Duration::from_millis(2500));
            self.operations = self.faulty.as_millis() as u64;
            self.fault_interval = overrides.fault_interval.or(Some(Duration::from_millis(50)));
            self.restart_delay = self.restart_delay.min(Duration::from_millis(20));
            self.mix = Mix { read: 40, write: 20, zero: 0, discard: 0, ..self.mix };
        }
    }
}

impl FaultWeights {
    /// No faults.
    pub const NONE: FaultWeights = FaultWeights {
        crash_one: 0,
        crash_several: 0,
        crash_all: 0,
        stop: 0,
        reset: 0,
        stall: 0,
        slow_disk: 0,
        slow_server: 0,
        crash_client: 0,
        ambush: 0,
        cut: 0,
        hold: 0,
        strand: 0,
        differ: 0,
        ghost: 0,
        partition: 0,
        freeze: 0,
        sever: 0,
        relapse: 0,
        lag: 0,
        late: 0,
        spoil: 0,
        lose: 0,
        hang: 0,
        fail: 0,
        stumble: 0,
        lie: 0,
        isolate: 0,
        oust: 0,
        estrange: 0,
        damage: 0,
        shift: 0,
    };

    fn draw(prng: &mut Prng) -> FaultWeights {
        let mut some = |often: u64| *prng.pick(&[0, 1, often]);
        FaultWeights {
            crash_one: some(6),
            crash_several: some(3),
            crash_all: some(3),
            stop: some(1),
            reset: some(6),
            stall: some(4),
            slow_disk: some(2),
            slow_server: some(2),
            crash_client: some(2),
            ambush: some(8),
            cut: some(6),
            hold: some(4),
            strand: some(4),
            differ: 0,
            ghost: 0,
            partition: some(3),
            freeze: some(3),
            sever: some(2),
            relapse: some(6),
            lag: some(3),
            late: some(2),
            spoil: some(8),
            lose: some(2),
            hang: 0,
            fail: 0,
            stumble: 0,
            lie: 0,
            isolate: 0,
            oust: 0,
            estrange: 0,
            damage: 0,
            shift: 0,
        }
    }

    /// The weights in the order of the fields.
    pub fn list(&self) -> [u64; 32] {
        [
            self.crash_one,
            self.crash_several,
            self.crash_all,
            self.stop,
            self.reset,
            self.stall,
            self.slow_disk,
            self.slow_server,
            self.crash_client,
            self.ambush,
            self.cut,
            self.hold,
            self.strand,
            self.differ,
            self.ghost,
            self.partition,
            self.freeze,
            self.sever,
            self.relapse,
            self.lag,
            self.late,
            self.spoil,
            self.lose,
            self.hang,
            self.fail,
            self.stumble,
            self.lie,
            self.isolate,
            self.oust,
            self.estrange,
            self.damage,
            self.shift,
        ]
    }
}

impl SnapshotMix {
    fn draw(prng: &mut Prng) -> SnapshotMix {
        let mut some = |often: u64| *prng.pick(&[0, 1, often]);
        SnapshotMix {
            one: 2 + some(6),
            several: some(3),
            clone_snapshot: some(3),
            clone_disk: some(2),
            rollback: some(3),
            delete: some(3),
            rename: some(1),
            protect: some(1),
            policy: some(1),
            evict: some(2),
            every: Duration::from_millis(*prng.pick(&[20, 60, 200])),
            eager_percent: *prng.pick(&[0, 30, 100]),
            most: *prng.pick(&[3, 8, 20]),
            flatten: *prng.pick(&[0, 1, 3]),
        }
    }

    /// Nothing but snapshots of the one disk, in quick succession, and always somebody who reads them at once.
    fn crowded(prng: &mut Prng) -> SnapshotMix {
        let every = Duration::from_millis(*prng.pick(&[15, 40, 80]));
        SnapshotMix { every, one: 1, eager_percent: 100, most: 20, ..SnapshotMix::default() }
    }
}

impl Mix {
    fn draw(prng: &mut Prng) -> Mix {
        let mut some = |often: u64| *prng.pick(&[0, 1, often]);
        Mix {
            zero: some(8),
            discard: some(8),
            zero_all: some(1),
            extents: some(4),
            detach: some(1),
            read: 10 + some(40),
            write: 10 + some(40),
            admin_percent: some(4),
            // A smaller size needs an exclusive session whose holder has discarded the rest.
            shrink: true,
        }
    }
}

fn draw_copies(prng: &mut Prng, servers: usize) -> Vec<usize> {
    let all: &[&[usize]] = match servers {
        1 => &[&[1]],
        2 => &[&[2], &[2], &[1, 2]],
        _ => &[&[2], &[2], &[3], &[1, 2, 3], &[2, 3]],
    };
    prng.pick(all).to_vec()
}

fn draw_net(prng: &mut Prng) -> NetTimes {
    let (min, max) = *prng.pick(&[(20, 60), (20, 1000), (100, 10_000), (1000, 40_000)]);
    let spike_one_in = *prng.pick(&[30, 300, 1_000_000]);
    NetTimes { min: Duration::from_micros(min), max: Duration::from_micros(max), spike_one_in }
}

fn draw_disk_times(prng: &mut Prng) -> DiskTimes {
    let (min, max) = *prng.pick(&[(10, 30), (20, 500), (100, 5000), (1000, 30_000)]);
    let commit_factor = *prng.pick(&[1, 3, 20, 100]);
    DiskTimes { min: Duration::from_micros(min), max: Duration::from_micros(max), commit_factor }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_draws_the_same_run_and_the_bounds_hold() {
        let draw = |seed| Options::draw(&mut Prng::new(seed), &Overrides::default());
        for seed in 0..500 {
            let o = draw(seed);
            assert_eq!(format!("{o:?}"), format!("{:?}", draw(seed)));
            assert!((1..=5).contains(&o.servers) && (o.ring == 1 || o.ring == 3) && o.ring <= o.servers);
            assert!(o.copies.iter().all(|c| *c <= o.servers) && !o.copies.is_empty());
        }
    }
}
