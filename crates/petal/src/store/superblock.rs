//! The superblock: who a disk belongs to, and where its regions are (design 2.10).
//!
//! Two copies, at bytes 0 and 4096, written in turn: generation g goes to [`Superblock::copy_offset`],
//! so a torn write hits only the copy that is being replaced, and [`Superblock::choose`] finds the
//! other. A start writes one (its incarnation) before it does anything else.
//!
//! Failures: everything read is checked; strange bytes are an error that says what to do, never a
//! panic. Invariant: at any instant after formatting at least one copy is valid, if the disk keeps
//! the assumptions in docs/on-disk-format.md, which also has the picture of the bytes.

use super::layout::{Layout, LayoutError};
use crate::global_state::Genesis;
use crate::ids::*;
use bytes::Bytes;
use serde::{Deserialize, Serialize};

/// Bytes of one copy.
pub const SUPERBLOCK_SIZE: usize = 4096;
/// The first bytes of a disk of Petal.
pub const MAGIC: [u8; 8] = *b"PETALDSK";
/// The format. Magic, format and checksum stay in their places in every format.
pub const FORMAT: u32 = 6;

const FORMAT_AT: usize = 8;
const LENGTH_AT: usize = 12;
const CHECKSUM_AT: usize = 16;
const BODY_AT: usize = 24;
/// Bytes of the body at most.
pub const BODY_MAX: usize = SUPERBLOCK_SIZE - BODY_AT;

/// Identity and layout of a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Superblock {
    /// Counts the times that it was written; the copy with the higher valid one counts.
    pub generation: u64,
    /// The cluster, its first ring: enough to find the others.
    pub genesis: Genesis,
    /// The server that owns the disk.
    pub server: ServerId,
    /// The server's present life.
    pub incarnation: Incarnation,
    /// This disk.
    pub disk: DiskId,
    /// All disks of the server, this one included: it refuses to start without one of them.
    pub disks: Vec<DiskId>,
    /// Its regions.
    pub layout: Layout,
    /// The first configuration of the ring in which the server may vote: what it voted in earlier ones is lost. Zero:
    /// nothing was lost.
    pub votes_from: u32,
    /// A batch of the journal that was durable, with all before it: a journal that ends before it is damaged.
    pub journal_mark: u64,
    /// See [`Lives`].
    pub taken: Incarnation,
    /// See [`Lives`]; the present one is among them.
    pub open: Vec<Incarnation>,
}

/// Why bytes are not a superblock.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SuperblockError {
    /// It does not begin with the magic.
    #[error("this is not a disk of Petal; check the path, or format it with 'petal init' or 'petal join'")]
    NotPetal,
    /// Written by a newer program.
    #[error("the disk has format {found}, this program knows formats up to {known}; use a newer program")]
    NewerFormat {
        /// The disk's.
        found: u32,
        /// The newest known here.
        known: u32,
    },
    /// Written by a program that is too old.
    #[error("the disk has format {found}, this program knows format {known} only; use an older program")]
    OlderFormat {
        /// The disk's.
        found: u32,
        /// The one known here.
        known: u32,
    },
    /// Torn or rotten.
    #[error("the superblock does not match its checksum; if both copies are damaged, replace the disk")]
    BadChecksum,
    /// The checksum is right and the content is not: written by a program with a mistake.
    #[error("the superblock makes no sense ({0}); replace the disk, and keep it for whoever looks for the mistake")]
    Garbage(String),
    /// Not even the bytes of one copy.
    #[error("the disk ends within the superblock, after {0} bytes; check the path and the file's length")]
    Truncated(usize),
    /// The copies belong to different disks.
    #[error("the superblock's copies belong to the disks {0} and {1}: formatting was interrupted; format again")]
    TwoDisks(DiskId, DiskId),
}

/// Why a disk cannot be formatted so.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// Its size does not do.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// Names, addresses and disks do not fit into a superblock.
    #[error(
        "the cluster's name, addresses and the server's disks need {needed} bytes, a superblock has {room}; shorten them"
    )]
    TooLarge {
        /// Bytes needed.
        needed: usize,
        /// Bytes there are.
        room: usize,
    },
    /// The disk is not among the server's disks, or twice.
    #[error("disk {0} must be exactly once among the disks of its server")]
    NotAmongDisks(DiskId),
}

/// What a new disk is made from.
#[derive(Clone, Debug)]
pub struct FormatParams {
    /// The cluster.
    pub genesis: Genesis,
    /// The owner.
    pub server: ServerId,
    /// The disk's id, drawn at random.
    pub disk: DiskId,
    /// All disks of the server, this one included.
    pub disks: Vec<DiskId>,
    /// Bytes of the disk.
    pub size: u64,
    /// The server's last life: zero, but for a disk that replaces a lost one.
    pub incarnation: Incarnation,
    /// See [`Superblock::votes_from`].
    pub votes_from: u32,
}

/// `(byte offset, bytes)`: writes to be done in order, each on stable storage before the next begins.
pub type FormatWrites = Vec<(u64, Bytes)>;

impl Superblock {
    /// A superblock of a new disk: generation and incarnation 0. Checks that every later generation
    /// of it fits, so that [`Superblock::encode`] cannot fail.
    pub fn new(params: FormatParams) -> Result<Superblock, FormatError> {
        let FormatParams { genesis, server, disk, disks, size, incarnation, votes_from } = params;
        let layout = Layout::for_size(size)?;
        let superblock = Superblock {
            generation: 0,
            genesis,
            server,
            incarnation,
            disk,
            disks,
            layout,
            votes_from,
            journal_mark: 0,
            taken: incarnation,
            open: Vec::new(),
        };
        superblock.check_fits()?;
        match superblock.knows_itself() {
            true => Ok(superblock),
            false => Err(FormatError::NotAmongDisks(disk)),
        }
    }

    /// Whether it fits into its place, whatever its numbers become. To be asked before
    /// anything else in it is changed.
    pub fn check_fits(&self) -> Result<(), FormatError> {
        let largest = Superblock {
            generation: u64::MAX,
            incarnation: Incarnation(u64::MAX),
            votes_from: u32::MAX,
            journal_mark: u64::MAX,
            taken: Incarnation(u64::MAX),
            open: vec![Incarnation(u64::MAX); Lives::OPEN_MAX],
            ..self.clone()
        };
        match largest.body().len() {
            needed if needed > BODY_MAX => Err(FormatError::TooLarge { needed, room: BODY_MAX }),
            _ => Ok(()),
        }
    }

    /// What it knows of its server's lives.
    pub fn lives(&self) -> Lives {
        Lives { last: self.incarnation, taken: self.taken, open: self.open.clone() }
    }

    /// The same, written down.
    pub fn set_lives(&mut self, lives: Lives) {
        Lives { last: self.incarnation, taken: self.taken, open: self.open } = lives;
    }

    /// Bytes of the data region.
    pub fn data_capacity(&self) -> u64 {
        self.layout.data.length
    }

    /// Where a generation is written.
    pub fn copy_offset(generation: u64) -> u64 {
        (generation % 2) * SUPERBLOCK_SIZE as u64
    }

    /// The 4 KiB of one copy. Panics if it does not fit (see [`Superblock::check_fits`]).
    pub fn encode(&self) -> Bytes {
        let body = self.body();
        assert!(body.len() <= BODY_MAX, "a superblock of {} bytes was not checked when it was changed", body.len());
        let mut bytes = vec![0; SUPERBLOCK_SIZE];
        bytes[..FORMAT_AT].copy_from_slice(&MAGIC);
        bytes[FORMAT_AT..LENGTH_AT].copy_from_slice(&FORMAT.to_le_bytes());
        bytes[LENGTH_AT..CHECKSUM_AT].copy_from_slice(&(body.len() as u32).to_le_bytes());
        bytes[BODY_AT..BODY_AT + body.len()].copy_from_slice(&body);
        let crc = checksum(&bytes);
        bytes[CHECKSUM_AT..CHECKSUM_AT + 4].copy_from_slice(&crc.to_le_bytes());
        Bytes::from(bytes)
    }

    /// Reads one copy (the first 4 KiB of `bytes`).
    pub fn decode(bytes: &[u8]) -> Result<Superblock, SuperblockError> {
        let bytes = bytes.get(..SUPERBLOCK_SIZE).ok_or(SuperblockError::Truncated(bytes.len()))?;
        if bytes[..FORMAT_AT] != MAGIC {
            return Err(SuperblockError::NotPetal);
        }
        // Before the format: a torn copy must not look like one from the future.
        if word(bytes, CHECKSUM_AT) != checksum(bytes) {
            return Err(SuperblockError::BadChecksum);
        }
        match word(bytes, FORMAT_AT) {
            FORMAT => {}
            found if found > FORMAT => return Err(SuperblockError::NewerFormat { found, known: FORMAT }),
            found => return Err(SuperblockError::OlderFormat { found, known: FORMAT }),
        }
        let garbage = |what: &str| SuperblockError::Garbage(what.into());
        let length = word(bytes, LENGTH_AT) as usize;
        let body = bytes[BODY_AT..].get(..length).ok_or_else(|| garbage("its length"))?;
        let (superblock, rest) = postcard::take_from_bytes::<Superblock>(body).map_err(|e| garbage(&e.to_string()))?;
        if !rest.is_empty() {
            return Err(garbage("something follows the body"));
        }
        if superblock.open.len() > Lives::OPEN_MAX {
            return Err(garbage("its lives"));
        }
        superblock.layout.check().map_err(|e| garbage(&e.to_string()))?;
        if !superblock.knows_itself() {
            return Err(garbage("the disk is not once among its server's disks"));
        }
        // A canonical body fits again after every change of its counters.
        superblock.check_fits().map_err(|e| garbage(&e.to_string()))?;
        Ok(superblock)
    }

    /// The present superblock from its two copies: the valid one with the higher generation. If
    /// neither is valid, the error that says most. A copy of a newer format is refused even beside
    /// a valid one: the newer program may have changed more than this.
    pub fn choose(a: &[u8], b: &[u8]) -> Result<Superblock, SuperblockError> {
        match (Superblock::decode(a), Superblock::decode(b)) {
            (Err(newer @ SuperblockError::NewerFormat { .. }), _) => Err(newer),
            (_, Err(newer @ SuperblockError::NewerFormat { .. })) => Err(newer),
            (Ok(a), Ok(b)) if a.disk != b.disk => Err(SuperblockError::TwoDisks(a.disk, b.disk)),
            (Ok(a), Ok(b)) => Ok(if b.generation > a.generation { b } else { a }),
            (Ok(one), Err(_)) | (Err(_), Ok(one)) => Ok(one),
            (Err(a), Err(b)) => Err(if b.telling() > a.telling() { b } else { a }),
        }
    }

    /// The write that makes it the disk of a server with other disks beside it (after some were replaced), and the
    /// superblock that is then on it.
    pub fn regroup(&self, disks: Vec<DiskId>, votes_from: u32) -> Result<(Superblock, (u64, Bytes)), FormatError> {
        let generation = self.generation + 1;
        let superblock = Superblock { generation, disks, votes_from: self.votes_from.max(votes_from), ..self.clone() };
        superblock.check_fits()?;
        if !superblock.knows_itself() {
            return Err(FormatError::NotAmongDisks(self.disk));
        }
        let write = (Superblock::copy_offset(generation), superblock.encode());
        Ok((superblock, write))
    }

    /// The writes that make a new disk, in order, and the superblock that is then on it.
    ///
    /// First both old copies go: a disk that is formatted again and loses power on the way must not
    /// come back as the old one with an empty journal. Then the beginning of the journal is zeroed. An
    /// empty PMap store must be in its region before the last two of these writes are done; the bytes of
    /// it are not ours.
    pub fn format(params: FormatParams) -> Result<(Superblock, FormatWrites), FormatError> {
        let first = Superblock::new(params)?;
        let second = Superblock { generation: 1, ..first.clone() };
        let zeros = |length: usize| Bytes::from(vec![0; length]);
        let writes = vec![
            (0, zeros(2 * SUPERBLOCK_SIZE)),
            (first.layout.journal.offset, zeros(BLOCK_SIZE as usize)),
            (Superblock::copy_offset(0), first.encode()),
            (Superblock::copy_offset(1), second.encode()),
        ];
        Ok((second, writes))
    }

    fn knows_itself(&self) -> bool {
        self.disks.iter().filter(|disk| **disk == self.disk).count() == 1
    }

    fn body(&self) -> Vec<u8> {
        postcard::to_stdvec(self).expect("plain data is always serialised into memory")
    }
}

impl SuperblockError {
    /// How much it tells about the disk: of two errors the more telling one is shown.
    fn telling(&self) -> u8 {
        match self {
            SuperblockError::Truncated(_) => 0,
            SuperblockError::NotPetal => 1,
            SuperblockError::BadChecksum => 2,
            SuperblockError::Garbage(_) => 3,
            SuperblockError::OlderFormat { .. } => 4,
            SuperblockError::NewerFormat { .. } => 5,
            SuperblockError::TwoDisks(..) => 6,
        }
    }
}

/// CRC-32C of a copy, without the place of the checksum.
fn checksum(bytes: &[u8]) -> u32 {
    let crc = stdx::checksum::crc32c(&bytes[..CHECKSUM_AT]);
    stdx::checksum::crc32c_append(crc, &bytes[CHECKSUM_AT + 4..])
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::global_state::GenesisServer;
    use expect_test::expect;
    use proptest::prelude::*;
    use stdx::units::GIB;

    #[test]
    fn a_server_made_anew_keeps_the_first_configuration_that_it_may_vote_in() {
        let anew = Superblock { votes_from: 3, ..sample() };
        assert_eq!(Superblock::decode(&anew.encode()), Ok(anew.clone()));
        let disks = vec![anew.disk, DiskId(99)];
        let (regrouped, (at, bytes)) = anew.regroup(disks.clone(), 2).unwrap();
        assert_eq!((regrouped.disks.clone(), regrouped.votes_from, regrouped.generation), (disks, 3, 42));
        assert_eq!((at, Superblock::decode(&bytes)), (0, Ok(regrouped)));
        assert_eq!(anew.regroup(vec![DiskId(99)], 0).unwrap_err(), FormatError::NotAmongDisks(anew.disk));
    }

    fn params() -> FormatParams {
        let server = |n: u16| GenesisServer { server: ServerId(n), addresses: vec![format!("host{n}:4000")] };
        let genesis =
            Genesis { cluster: ClusterId(0xc1u128 << 120), name: "test".into(), ring: (1..=3).map(server).collect() };
        let disk = DiskId(7 << 100);
        let (server, disks, incarnation) = (ServerId(2), vec![DiskId(5), disk], Incarnation(0));
        FormatParams { genesis, server, disk, disks, size: 16 * GIB, incarnation, votes_from: 0 }
    }

    fn sample() -> Superblock {
        Superblock { generation: 41, incarnation: Incarnation(40), ..Superblock::new(params()).unwrap() }
    }

    /// A copy with other bytes at `at` and the right checksum for them.
    fn forged(at: usize, new: &[u8]) -> Vec<u8> {
        let mut bytes = sample().encode().to_vec();
        bytes[at..at + new.len()].copy_from_slice(new);
        let crc = checksum(&bytes);
        bytes[CHECKSUM_AT..CHECKSUM_AT + 4].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    #[test]
    fn what_was_encoded_is_decoded() {
        let bytes = sample().encode();
        assert_eq!(bytes.len(), SUPERBLOCK_SIZE);
        assert_eq!(Superblock::decode(&bytes), Ok(sample()));
        assert_eq!(sample().data_capacity(), sample().layout.data.length);
    }

    #[test]
    fn the_bytes_of_format_6_never_change() {
        let bytes = sample().encode();
        let used = bytes.iter().rposition(|b| *b != 0).unwrap() + 1;
        let lines: Vec<String> = bytes[..used]
            .chunks(16)
            .map(|line| line.iter().map(|b| format!("{b:02x}")).collect::<Vec<_>>().join(" "))
            .collect();
        expect![[r#"
            50 45 54 41 4c 44 53 4b 06 00 00 00 86 00 00 00
            9f df 92 0b 00 00 00 00 29 80 80 80 80 80 80 80
            80 80 80 80 80 80 80 80 80 80 82 03 04 74 65 73
            74 03 01 01 0a 68 6f 73 74 31 3a 34 30 30 30 02
            01 0a 68 6f 73 74 32 3a 34 30 30 30 03 01 0a 68
            6f 73 74 33 3a 34 30 30 30 02 28 80 80 80 80 80
            80 80 80 80 80 80 80 80 80 1c 02 05 80 80 80 80
            80 80 80 80 80 80 80 80 80 80 1c 80 80 80 80 40
            80 80 40 80 80 80 20 80 80 c0 20 80 80 80 80 04
            80 80 c0 a0 04 80 80 c0 df 3b"#]]
        .assert_eq(&lines.join("\n"));
    }

    #[test]
    fn generations_are_written_in_turn_and_the_higher_valid_one_is_chosen() {
        assert_eq!((Superblock::copy_offset(6), Superblock::copy_offset(7)), (0, 4096));
        let (old, new) = (sample(), Superblock { generation: 42, ..sample() });
        assert_eq!(Superblock::choose(&new.encode(), &old.encode()), Ok(new.clone()));
        assert_eq!(Superblock::choose(&old.encode(), &new.encode()), Ok(new.clone()));
        let mut torn = new.encode().to_vec();
        torn[512..].fill(0);
        torn[40] ^= 1;
        assert_eq!(Superblock::choose(&torn, &old.encode()), Ok(old.clone()));
        assert_eq!(Superblock::choose(&[], &old.encode()), Ok(old));
    }

    #[test]
    fn of_two_bad_copies_the_more_telling_error_is_shown() {
        let mut rotten = sample().encode().to_vec();
        rotten[100] ^= 4;
        let zeros = vec![0; SUPERBLOCK_SIZE];
        assert_eq!(Superblock::choose(&zeros, &zeros), Err(SuperblockError::NotPetal));
        assert_eq!(Superblock::choose(&zeros, &rotten), Err(SuperblockError::BadChecksum));
        assert_eq!(Superblock::choose(&rotten, &zeros), Err(SuperblockError::BadChecksum));
        assert_eq!(Superblock::choose(&zeros[..10], &[]), Err(SuperblockError::Truncated(10)));
    }

    #[test]
    fn another_format_is_refused_by_number_even_beside_a_valid_copy_if_it_is_newer() {
        let newer = forged(FORMAT_AT, &9u32.to_le_bytes());
        let error = SuperblockError::NewerFormat { found: 9, known: FORMAT };
        assert_eq!(Superblock::decode(&newer), Err(error.clone()));
        assert_eq!(Superblock::choose(&sample().encode(), &newer), Err(error));
        let older = forged(FORMAT_AT, &0u32.to_le_bytes());
        assert_eq!(Superblock::decode(&older), Err(SuperblockError::OlderFormat { found: 0, known: FORMAT }));
        assert_eq!(Superblock::choose(&sample().encode(), &older), Ok(sample()));
    }

    #[test]
    fn a_right_checksum_over_nonsense_is_garbage() {
        let mut strange = sample();
        strange.layout.data.offset = 0;
        assert!(matches!(Superblock::decode(&strange.encode()), Err(SuperblockError::Garbage(_))));
        let mut stranger = sample();
        stranger.disk = DiskId(6);
        assert!(matches!(Superblock::decode(&stranger.encode()), Err(SuperblockError::Garbage(_))));
        for length in [0u32, 3, 4000, u32::MAX] {
            let result = Superblock::decode(&forged(LENGTH_AT, &length.to_le_bytes()));
            assert!(matches!(result, Err(SuperblockError::Garbage(_))), "{result:?}");
        }
    }

    #[test]
    fn a_cluster_that_does_not_fit_is_refused_before_anything_is_written() {
        let mut wordy = params();
        wordy.genesis.ring[0].addresses = vec!["x".repeat(5000)];
        assert!(matches!(Superblock::format(wordy), Err(FormatError::TooLarge { needed: 5000.., room: BODY_MAX })));
        let mut small = params();
        small.size = 1;
        assert!(matches!(Superblock::format(small), Err(FormatError::Layout(LayoutError::TooSmall { .. }))));
        let mut alone = params();
        alone.disks.clear();
        assert_eq!(Superblock::format(alone).unwrap_err(), FormatError::NotAmongDisks(params().disk));
    }

    /// Applies the writes one after the other, and stops after each: what would a start find?
    #[test]
    fn formatting_again_and_losing_power_never_shows_the_old_disk_with_its_journal_gone() {
        let (old, old_writes) = Superblock::format(FormatParams { disk: DiskId(5), ..params() }).unwrap();
        let (new, new_writes) = Superblock::format(params()).unwrap();
        let journal = new.layout.journal.offset as usize;
        let mut disk = vec![0xffu8; journal + 4096];
        let apply = |disk: &mut Vec<u8>, (at, bytes): &(u64, Bytes)| {
            disk[*at as usize..*at as usize + bytes.len()].copy_from_slice(bytes)
        };
        let found = |disk: &[u8]| Superblock::choose(&disk[..4096], &disk[4096..8192]);
        old_writes.iter().for_each(|write| apply(&mut disk, write));
        assert_eq!(found(&disk), Ok(old.clone()));
        disk[journal] = 1;
        for write in &new_writes {
            apply(&mut disk, write);
            assert!(!found(&disk).is_ok_and(|s| s.disk == old.disk));
        }
        assert_eq!(found(&disk), Ok(new.clone()));
        assert_eq!((new.generation, new.incarnation, disk[journal]), (1, Incarnation(0), 0));
    }

    #[test]
    fn copies_of_two_disks_are_refused() {
        let other = Superblock { disk: DiskId(5), ..sample() };
        let result = Superblock::choose(&sample().encode(), &other.encode());
        assert_eq!(result, Err(SuperblockError::TwoDisks(sample().disk, DiskId(5))));
    }

    proptest! {
        #[test]
        fn hostile_bytes_are_errors_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..5000)) {
            prop_assert!(Superblock::decode(&bytes).is_err());
            let mut dressed = bytes.clone();
            dressed.resize(SUPERBLOCK_SIZE, 0);
            dressed[..8].copy_from_slice(&MAGIC);
            dressed[FORMAT_AT..LENGTH_AT].copy_from_slice(&FORMAT.to_le_bytes());
            let length = (dressed.len() as u32 - 24).min(bytes.len() as u32);
            dressed[LENGTH_AT..CHECKSUM_AT].copy_from_slice(&length.to_le_bytes());
            let crc = checksum(&dressed);
            dressed[CHECKSUM_AT..CHECKSUM_AT + 4].copy_from_slice(&crc.to_le_bytes());
            if let Ok(superblock) = Superblock::decode(&dressed) {
                superblock.encode();
            }
        }

        #[test]
        fn every_flipped_bit_is_noticed(at in 0..SUPERBLOCK_SIZE, bit in 0..8u32) {
            let mut bytes = sample().encode().to_vec();
            bytes[at] ^= 1 << bit;
            prop_assert!(Superblock::decode(&bytes).is_err());
        }

        #[test]
        fn a_changed_body_with_a_right_checksum_never_panics(at in BODY_AT..200usize, new in any::<[u8; 4]>()) {
            if let Ok(superblock) = Superblock::decode(&forged(at, &new)) {
                prop_assert_eq!(superblock.layout.check(), Ok(()));
                Superblock { generation: u64::MAX, ..superblock }.encode();
            }
        }
    }
}
