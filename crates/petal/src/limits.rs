//! Every bound of the system, with the sum that chose it. A full queue is a reply, not a wait.

use stdx::Duration;

/// Versions of a slot that may be unfinished at one time. The watermark is a prefix, so one hung
/// write keeps everything behind it busy: this bounds what a promise has to list.
pub const SLOT_UNFINISHED_MAX: usize = 4096;
/// How long a watermark may wait for other traffic to carry it.
pub const WATERMARK_DELAY: Duration = Duration::from_millis(5);
/// Requests of one client connection that a server holds at one time; the next is refused as busy.
/// 1,024 elements of 64 KiB are 64 MiB, two of the largest NBD requests.
pub const CLIENT_REQUESTS_MAX: usize = 1024;
/// Element operations that one client keeps in flight to one server: below the server's bound, so
/// that a client of ours is never refused for it.
pub const CLIENT_WINDOW: usize = 512;
/// Blocks that a replica promises to one primary ahead (2-fold the largest NBD request).
pub const CREDIT_BLOCKS_MAX: u64 = 16384;
/// And so many at least while there is room: four elements.
pub const CREDIT_BLOCKS_MIN: u64 = 64;
/// Largest frame body (without payload) that a peer may send: the global state's snapshot is the
/// largest, 10,000 disks and 256 slots per GMap fit into 8 MiB.
pub const FRAME_BODY_MAX: usize = 16 << 20;
/// Largest payload of a frame: one element of one epoch, or the blocks of one settled element.
pub const FRAME_PAYLOAD_MAX: usize = 8 << 20;
/// Elements in one answer to a list request (promise) or a map request.
pub const LIST_ELEMENTS_MAX: usize = 1024;
/// Batches of one disk that may be on their way at one time.
pub const BATCHES_IN_FLIGHT_MAX: usize = 4;
/// Bytes of data in one batch: larger groups gain nothing and delay the first.
pub const BATCH_DATA_MAX: usize = 4 << 20;
/// Slots of a new GMap per server, at least.
pub const SLOTS_PER_SERVER_MIN: u32 = 64;
/// Members of a slot at most: three of the old tuple and three of the new one (2.8).
pub const TUPLE_MAX: usize = 6;
/// Slots of a GMap at most.
pub const SLOTS_MAX: u32 = 1 << 16;
/// Messages of clients that a server passes on to servers which those cannot reach, unanswered at one time: 64 MiB,
/// a quarter of what may wait in a connection between servers.
pub const RELAYS_MAX: usize = 1024;
/// Servers of a cluster at most (ids are 16 bits; 1,000 are designed for).
pub const SERVERS_MAX: usize = 1024;
/// Virtual disks of a cluster at most.
pub const VDISKS_MAX: usize = 100_000;

/// Slots of all GMaps together, the common ones and those that a family has by itself: about 50 bytes of global state each,
/// so 13 MB. With four servers a map has 256.
pub const SLOTS_ALL_MAX: usize = 1 << 18;
/// Disks and snapshots of one family: an element can have a row for each, and all of them must fit into one record of the smallest
/// journal, 2 MiB with 256 bytes for each (`Disk::check_room`); a quarter is left for rows that are being reclaimed.
pub const FAMILY_MEMBERS_MAX: usize = 6000;
/// Lineages that one may inherit from, one behind the other: a first write to an element of a clone tells them
/// all, 8 bytes each.
pub const ANCESTORS_MAX: usize = 1024;
/// Snapshots of one kind that a policy keeps at most: hourly for six weeks.
pub const POLICY_KEEPS_MAX: u16 = 1024;
/// Sessions of one disk at most: a shared file system on every server, or a thousand readers.
pub const SESSIONS_PER_DISK_MAX: usize = 1024;
/// Disks of one server at most.
pub const DISKS_PER_SERVER_MAX: usize = 256;
/// Addresses of one server at most, and bytes of each.
pub const ADDRESSES_MAX: usize = 16;
/// Bytes of an address, or of a session's holder, at most.
pub const TEXT_MAX: usize = 256;
/// Proposers whose commands are remembered. Every run of the program is one; a command could be executed
/// twice only if its second copy came after 4,096 newer proposers. 4,096 of 60 bytes are 240 KiB of state.
pub const PROPOSERS_MAX: usize = 4096;
/// Results remembered of one proposer: it has at most so many commands unfinished.
pub const RESULTS_PER_PROPOSER_MAX: usize = 256;
/// Commands that one server proposes at one time, and that a ring leader has undecided: what is more is
/// dropped, and proposed again by whoever wants it.
pub const PROPOSALS_MAX: usize = 4096;
/// Entries in one message to a learner.
pub const ENTRIES_PER_MESSAGE_MAX: usize = 512;
/// Bytes in one value of the ring's durable metadata; what is longer is cut into parts.
pub const RING_VALUE_MAX: usize = 128 << 10;
/// Bytes of a disk's name at most.
pub const NAME_MAX: usize = 200;
/// Size of a disk at most for block clients: 2^63 - 1 rounded down to blocks.
pub const DISK_SIZE_MAX: u64 = (1 << 63) - crate::ids::BLOCK_SIZE;
/// Default stripe unit: 1 MiB. Large requests go to one server in one send, and a disk of a few
/// hundred MiB still spreads over all slots of a small cluster.
pub const STRIPE_UNIT_DEFAULT: u64 = 1 << 20;
/// Lease of a server: how long a majority's grants last, from when they were asked for.
pub const LEASE: Duration = Duration::from_secs(1);
/// Nobody holds a lease any more that was granted before a moment this long ago: the holder's clock may
/// be slow by 1 % and that of who waits fast by 1 %, `LEASE * (1 + 0.01) / (1 - 0.01)`, rounded up.
pub const LEASE_SURELY_OVER: Duration = Duration::from_nanos(LEASE.as_nanos() as u64 * 101 / 99 + 1);
/// Silence after which a server is suspected, and the lag behind the log after which it gets no grant.
pub const HALF_LEASE: Duration = Duration::from_millis(LEASE.as_millis() as u64 / 2);
/// Time between two heartbeats: three may be lost within half a lease.
pub const HEARTBEAT: Duration = Duration::from_millis(150);
/// A server that runs this much later than it wanted to has not been listening: it may not judge who was
/// silent meanwhile.
pub const STALL: Duration = Duration::from_millis(100);
/// A replica that has not answered for so long is taken out of its slots: while it is not connected, and
/// while it is but stays silent.
pub const SILENCE_DISCONNECTED: Duration = Duration::from_millis(500);
/// The second of these.
pub const SILENCE_CONNECTED: Duration = Duration::from_millis(1000);
/// Whoever was taken out for that and has been silent for so long in all is taken out of all slots. By then it would have
/// been asked back, a lease after it was taken out.
pub const SILENCE_CUT_OFF: Duration = Duration::from_millis(2500);
/// How long one slot's stream may stand still at a receiver that answers in other slots, before it is taken out of
/// that slot: what is slow for a while must not look like it.
pub const SILENCE_SLOT: Duration = Duration::from_secs(5);
/// First delay before something unanswered is sent again.
pub const RETRY_MIN: Duration = Duration::from_millis(20);
/// Longest delay between two tries.
pub const RETRY_MAX: Duration = Duration::from_secs(1);
/// How long a management call waits to settle before it says for whom it waits.
pub const SETTLE_DEADLINE: Duration = Duration::from_secs(10);
/// Seconds for which a server may be down before its data is copied to others: longer than a machine takes to restart, and
/// short enough that a second failure is unlikely meanwhile.
pub const REPLACE_AFTER_DEFAULT: u32 = 600;
/// Bytes of an encoded command at most: with what is around it, it fits into a frame of a client, which has 64 KiB.
/// Names, holders and addresses are bounded one by one when the command is applied; this keeps monsters out of the log.
pub const COMMAND_MAX: usize = (64 << 10) - 256;
/// Log entries that the ring keeps behind its snapshot.
pub const LOG_KEEP: usize = 1024;
/// Longest read or write that a client takes in one request: two of the largest NBD requests, 1,024
/// elements.
pub const REQUEST_LENGTH_MAX: u64 = 64 << 20;
/// Bytes of requests that one client works on at one time; further ones wait whole, in order. Four of
/// the largest, and what 512 operations of 64 KiB at each of eight servers carry.
pub const CLIENT_BYTES_MAX: u64 = 256 << 20;
/// Requests that may wait in a client behind `CLIENT_BYTES_MAX`; the next is refused.
pub const CLIENT_REQUESTS_WAITING_MAX: usize = 65536;
/// Reads of one client that are watched for being slow; what is more is not hedged. 100,000 reads per second that
/// take up to 150 ms are 15,000.
pub const HEDGES_WATCHED_MAX: usize = 16384;
/// Numbers of a session between the oldest unfinished write and the newest. One hung write lets this
/// many others pass; servers remember the ids of all of them, in the elements, 16 bytes each.
pub const SESSION_NUMBERS_MAX: usize = 65536;
/// A zeroing request of more elements than this asks which exist before it writes zeros.
pub const ZERO_ELEMENTS_MAX: u64 = 64;
/// Elements with data that one `Extents` answer is made from; what lies behind is asked for again.
pub const EXTENT_ELEMENTS_MAX: usize = 8192;
/// How often every copy of a block is tried before a read gives up.
pub const BAD_COPY_ROUNDS_MAX: u32 = 3;
/// How long a request waits in silence before a person is told for whom it waits.
pub const WARNING_FIRST: Duration = Duration::from_secs(10);
/// Time between two such warnings.
pub const WARNING_AGAIN: Duration = Duration::from_secs(60);
/// Elements of one slot whose change is remembered by version, on one disk: 50 bytes each while a member of
/// the slot is away, so 100 MiB for 256 slots in the worst case. What was forgotten is found by a scan.
pub const CHANGES_PER_SLOT_MAX: usize = 8192;
