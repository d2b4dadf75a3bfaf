//! What a message must look like whatever it means, so that the cores may rely on it.
//!
//! Checked here: numbers that would overflow when one is added, blocks and bytes outside of their
//! element, lists of the wrong length or order, data that does not have the length that its checksums
//! say. Not checked here: anything that needs state, names of disks (a person gets a sentence from
//! the global state instead of a closed connection), and the checksums of data, which are compared
//! where the data is used.

use crate::WireError;
use petal::ids::*;
use petal::limits::{FRAME_PAYLOAD_MAX, LIST_ELEMENTS_MAX, SERVERS_MAX, SLOTS_MAX};
use petal::message::*;
use petal::store::{BlockSum, ElementImage, RowImage};

/// Counters of honest peers stay below this for ever; so `+ 1` never overflows.
pub const COUNTER_MAX: u64 = 1 << 62;
/// Elements of the largest disk: their byte offsets fit into 64 bits.
pub const ELEMENT_NUMBER_MAX: u64 = u64::MAX / ELEMENT_SIZE;
/// Blocks of the largest payload.
pub const PAYLOAD_BLOCKS_MAX: usize = FRAME_PAYLOAD_MAX / BLOCK_SIZE as usize;

type Check = Result<(), &'static str>;

/// Name of a message, as in the docs.
pub fn name(body: &Body) -> &'static str {
    match body {
        Body::Read(_) => "Read",
        Body::Write(_) => "Write",
        Body::Zero(_) => "Zero",
        Body::Map(_) => "Map",
        Body::ReadReply(_) => "ReadReply",
        Body::WriteReply(_) => "WriteReply",
        Body::MapReply(_) => "MapReply",
        Body::Admin(_) => "Admin",
        Body::AdminReply(_) => "AdminReply",
        Body::Replicate(_) => "Replicate",
        Body::StreamAck(_) => "StreamAck",
        Body::CreditReturned(_) => "CreditReturned",
        Body::Watermarks(_) => "Watermarks",
        Body::Promise(_) => "Promise",
        Body::Promised(_) => "Promised",
        Body::List(_) => "List",
        Body::Listed(_) => "Listed",
        Body::Fetch(_) => "Fetch",
        Body::Fetched(_) => "Fetched",
        Body::Ring(_) => "Ring",
        Body::Propose(_) => "Propose",
        Body::Learn(_) => "Learn",
        Body::Entries(_) => "Entries",
        Body::Snapshot(_) => "Snapshot",
        Body::Settle(_) => "Settle",
        Body::Settled(_) => "Settled",
        Body::Index => "Index",
        Body::Heartbeat(_) => "Heartbeat",
        Body::Grant(_) => "Grant",
        Body::Compare(_) => "Compare",
        Body::Compared(_) => "Compared",
    }
}

/// Checks the shape of a message, its payload included.
pub fn validate(message: &Message) -> Result<(), WireError> {
    counters(&[message.state_index])
        .and_then(|()| check(&message.body))
        .map_err(|why| WireError::Invalid { message: name(&message.body), why })
}

fn check(body: &Body) -> Check {
    match body {
        Body::Read(m) => read(m),
        Body::Write(m) => write(m),
        Body::Zero(m) => zero(m),
        Body::Map(m) => map(m),
        Body::ReadReply(m) => read_reply(m),
        Body::WriteReply(m) => need(&m.need),
        Body::MapReply(m) => map_reply(m),
        Body::Replicate(m) => replicate(m),
        Body::StreamAck(m) => {
            credit(&m.credit)?;
            m.slots.iter().try_for_each(|s| {
                counters(&[s.term, s.stream, s.through])?;
                version(s.durable_watermark)
            })
        }
        Body::CreditReturned(m) => counters(&[m.blocks]),
        Body::Watermarks(m) => m.slots.iter().try_for_each(|s| {
            counters(&[s.term])?;
            version(s.watermark)?;
            version(s.lowest)
        }),
        Body::Promise(m) => m.slots.iter().try_for_each(|(_, term)| counters(&[*term])),
        Body::Promised(m) => {
            credit(&m.credit)?;
            terms_and_versions(&m.slots)
        }
        Body::List(m) => {
            counters(&[m.term])?;
            version(m.above)?;
            m.after.map_or(Ok(()), |after| element(after.element))
        }
        Body::Listed(m) => images(m.term, &m.elements),
        Body::Compared(m) => images(m.term, &m.elements),
        Body::Compare(m) => {
            counters(&[m.term])?;
            require(m.elements.len() <= LIST_ELEMENTS_MAX, "too many elements")?;
            require(m.elements.is_sorted_by(|a, b| a < b), "its elements do not ascend")?;
            m.elements.iter().try_for_each(|key| element(key.element))
        }
        Body::Fetch(m) => {
            counters(&[m.term])?;
            element(m.element.element)?;
            require(m.places.len() <= PAYLOAD_BLOCKS_MAX, "more blocks than a payload holds")?;
            require(
                m.places.iter().all(|p| usize::from(p.block) < BLOCKS_PER_ELEMENT),
                "a block outside of the element",
            )
        }
        Body::Fetched(m) => fetched(m),
        Body::Learn(m) => counters(&[m.from]),
        Body::Entries(m) => {
            counters(&[m.from])?;
            m.entries.iter().try_for_each(|e| command_id(&e.id))
        }
        Body::Propose(m) => command_id(&m.id),
        Body::Settle(m) => counters(&[m.index]),
        Body::Settled(m) => counters(&[m.index]),
        Body::Admin(m) => match &m.request {
            AdminRequest::Execute { id, .. } => command_id(id),
            AdminRequest::Verify { after: Some(after) } => element(after.element),
            AdminRequest::Space(question) => {
                counters(&[question.at])?;
                element(question.first_element)?;
                require(question.going.len() <= VdiskId::AT_ONCE_MAX, "too many disks")?;
                require(question.going.is_sorted_by(|a, b| a < b), "its disks do not ascend")
            }
            _ => Ok(()),
        },
        Body::Heartbeat(m) => {
            counters(&[m.incarnation.0, m.sequence, m.applied, m.answered])?;
            require(m.sequence > 0, "heartbeats begin with 1")?;
            require(m.silent.len() <= SERVERS_MAX, "too many servers")?;
            require(m.silent.is_sorted_by(|a, b| a < b), "its servers do not ascend")
        }
        Body::Grant(m) => counters(&[m.sequence]),
        Body::AdminReply(_) | Body::Ring(_) | Body::Snapshot(_) | Body::Index => Ok(()),
    }
}

fn require(holds: bool, why: &'static str) -> Check {
    if holds { Ok(()) } else { Err(why) }
}

fn credit(m: &Credit) -> Check {
    counters(&[m.window, m.returned, m.keep.unwrap_or(0)])
}

fn counters(numbers: &[u64]) -> Check {
    require(numbers.iter().all(|n| *n < COUNTER_MAX), "a counter above 2^62")
}

fn version(version: Version) -> Check {
    counters(&[version.term, version.sequence])
}

fn need(need: &Need) -> Check {
    counters(&[need.revision, need.term])
}

fn element(element: u64) -> Check {
    require(element <= ELEMENT_NUMBER_MAX, "an element beyond 2^64 bytes")
}

fn command_id(id: &CommandId) -> Check {
    counters(&[id.number, id.finished_below])
}

fn terms_and_versions(slots: &[(SlotId, Term, Version)]) -> Check {
    slots.iter().try_for_each(|(_, term, v)| counters(&[*term]).and_then(|()| version(*v)))
}

/// Bytes `offset .. offset + length` lie within an element, and there are some.
fn range(offset: u32, length: u64) -> Check {
    require(length > 0, "it concerns no bytes")?;
    require(u64::from(offset) + length <= ELEMENT_SIZE, "it reaches over the end of its element")
}

fn request(number: u64, finished_below: u64) -> Check {
    counters(&[number])?;
    require(number > 0, "request numbers begin with 1")?;
    require(finished_below <= number, "the request itself is declared finished")
}

fn read(m: &Read) -> Check {
    need(&m.access.need)?;
    element(m.element)?;
    require(m.blocks > 0, "it concerns no blocks")?;
    let end = usize::from(m.first_block) + usize::from(m.blocks);
    require(end <= BLOCKS_PER_ELEMENT, "it reaches over the end of its element")
}

fn write(m: &Write) -> Check {
    need(&m.access.need)?;
    request(m.number, m.finished_below)?;
    element(m.element)?;
    let length = m.data.len() as u64;
    range(m.offset, length)?;
    let (first, last) = (u64::from(m.offset) / BLOCK_SIZE, (u64::from(m.offset) + length - 1) / BLOCK_SIZE);
    require(m.crcs.len() as u64 == last - first + 1, "not one checksum per block")
}

fn zero(m: &Zero) -> Check {
    need(&m.access.need)?;
    request(m.number, m.finished_below)?;
    element(m.element)?;
    if (m.offset, m.length) == (0, 0) {
        return Ok(()); // A row by itself.
    }
    range(m.offset, u64::from(m.length))
}

fn map(m: &Map) -> Check {
    need(&m.access.need)?;
    require(m.first_element <= m.end_element, "its end is before its beginning")?;
    require(m.end_element <= ELEMENT_NUMBER_MAX + 1, "an element beyond 2^64 bytes")
}

/// One block of data for each checksum that is not "zero".
fn data_of(sums: &[BlockSum], data: &Payload) -> Check {
    let blocks = sums.iter().filter(|s| **s != BlockSum::Zero).count();
    require(data.len() == blocks * BLOCK_SIZE as usize, "its data is not as long as its checksums say")
}

fn no_data(data: &Payload) -> Check {
    require(data.is_empty(), "a refusal with data")
}

fn read_reply(m: &ReadReply) -> Check {
    need(&m.need)?;
    match &m.result {
        Ok(sums) => {
            require((1..=BLOCKS_PER_ELEMENT).contains(&sums.len()), "not 1 to 16 blocks")?;
            data_of(sums, &m.data)
        }
        Err(_) => no_data(&m.data),
    }
}

fn map_reply(m: &MapReply) -> Check {
    let Ok(part) = &m.result else {
        return Ok(());
    };
    require(part.elements.len() <= LIST_ELEMENTS_MAX, "too many elements")?;
    require(part.not_here.len() <= SLOTS_MAX as usize, "too many slots")?;
    require(part.elements.is_sorted_by(|a, b| a.0 < b.0), "its elements do not ascend")?;
    require(part.complete_below <= ELEMENT_NUMBER_MAX + 1, "an element beyond 2^64 bytes")?;
    part.elements.last().map_or(Ok(()), |last| element(last.0))
}

fn replicate(m: &Replicate) -> Check {
    counters(&[m.term, m.stream, m.number])?;
    require(m.number > 0, "stream numbers begin with 1")?;
    version(m.watermark)?;
    match &m.part {
        Part::Write { element: key, version: v, id, finished_below, first_block, sums, .. } => {
            element(key.element)?;
            version(*v)?;
            counters(&[id.number, *finished_below])?;
            let end = usize::from(*first_block) + sums.len();
            require(end <= BLOCKS_PER_ELEMENT, "it reaches over the end of its element")?;
            data_of(sums, &m.data)
        }
        Part::Ahead { element: key, rows, blocks } => {
            element(key.element)?;
            row_images(rows)?;
            row_blocks(blocks, rows.len())?;
            require(m.data.len() == blocks.len() * BLOCK_SIZE as usize, "its data is not as long as its list of blocks")
        }
        Part::Copy { element: key, image, blocks, twins, finished_below, .. } => {
            element(key.element)?;
            require(finished_below.len() <= image.ids.len(), "more sessions than request ids")?;
            finished_below.iter().try_for_each(|(_, below)| counters(&[*below]))?;
            element_image(image)?;
            row_blocks(blocks, image.rows.len())?;
            row_twins(twins, image.rows.len())?;
            require(m.data.len() == blocks.len() * BLOCK_SIZE as usize, "its data is not as long as its list of blocks")
        }
        Part::Skip { version: v } => version(*v).and_then(|()| no_data(&m.data)),
        Part::Mark { state_index } => counters(&[*state_index]).and_then(|()| no_data(&m.data)),
        Part::SettlementDone | Part::CaughtUp => no_data(&m.data),
    }
}

fn element_image(image: &ElementImage) -> Check {
    version(image.version)?;
    row_images(&image.rows)
}

fn row_images(rows: &[RowImage]) -> Check {
    require(rows.len() <= usize::from(u16::MAX) + 1, "too many rows")?;
    let ascend = rows.is_sorted_by(|a, b| (a.lineage, a.epoch) < (b.lineage, b.epoch));
    require(ascend, "the rows of an element do not ascend")
}

/// `(row, block, earlier row)`.
fn row_twins(twins: &[(u16, u8, u16)], rows: usize) -> Check {
    require(twins.len() <= rows * BLOCKS_PER_ELEMENT, "more shared blocks than there are")?;
    let inside = |(row, block, other): &(u16, u8, u16)| {
        usize::from(*row) < rows && usize::from(*block) < BLOCKS_PER_ELEMENT && other < row
    };
    require(twins.iter().all(inside), "a shared block outside of the element, or shared with a later row")
}

/// `(row, block)`, each once, ascending.
fn row_blocks(blocks: &[(u16, u8)], rows: usize) -> Check {
    require(blocks.len() <= PAYLOAD_BLOCKS_MAX, "more blocks than a payload holds")?;
    require(blocks.is_sorted_by(|a, b| a < b), "its blocks do not ascend")?;
    let inside = |(row, block): &(u16, u8)| usize::from(*row) < rows && usize::from(*block) < BLOCKS_PER_ELEMENT;
    require(blocks.iter().all(inside), "a block outside of the element")
}

fn images(term: u64, elements: &[(ElementKey, ElementImage)]) -> Check {
    counters(&[term])?;
    require(elements.len() <= LIST_ELEMENTS_MAX, "too many elements")?;
    require(elements.is_sorted_by(|a, b| a.0 < b.0), "its elements do not ascend")?;
    elements.iter().try_for_each(|(key, image)| element(key.element).and_then(|()| element_image(image)))
}

fn fetched(m: &Fetched) -> Check {
    counters(&[m.term])?;
    element(m.element.element)?;
    match m.result {
        // Who asked knows the checksums: it asked for blocks of an image that was listed to it.
        Ok(()) => require(m.data.len().is_multiple_of(BLOCK_SIZE as usize), "its data is not whole blocks"),
        Err(_) => no_data(&m.data),
    }
}
