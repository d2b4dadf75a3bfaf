//! What data access counts, for status.

/// What is counted for status; since the server started.
#[derive(Debug, Default, Clone)]
pub struct Counters {
    /// Reads answered.
    pub reads: u64,
    /// Writes and zeroes acknowledged.
    pub writes: u64,
    /// Messages passed on to servers for clients which cannot reach those.
    pub relayed: u64,
    /// Requests refused, whatever the reason.
    pub refused: u64,
    /// Messages of streams applied as replica.
    pub replicated: u64,
    /// Settlements finished.
    pub settlements: u64,
    /// Elements that a settlement had to change on some replica.
    pub settled_elements: u64,
    /// Blocks whose checksum did not match, or that could not be read.
    pub bad_blocks: u64,
    /// Of these, made good from another copy.
    pub repaired_blocks: u64,
    /// Slots in which a member came back with less than it had told to have on stable storage.
    pub lost_by_others: u64,
    /// Elements copied to members that were brought back.
    pub recovered_elements: u64,
    /// Blocks that travelled for that.
    pub recovered_blocks: u64,
    /// Rows dropped that nobody could see any more.
    pub reclaimed_rows: u64,
}
