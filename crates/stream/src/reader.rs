//! The reading end: believes nothing.
//!
//! ```text
//!  open --> between records --next_item--> ... --> ended: the end mark was right, and nothing follows
//!                 |
//!                 | the first thing that is wrong
//!                 v
//!              refused, for good
//! ```

use crate::element::Element;
use crate::error::{Fault, Part, Place, StreamError};
use crate::header::{self, Header};
use crate::record::{Counts, HEAD_SIZE, Hash, Head, MARK_SIZE, RecordKind, Tally};
use crate::{ELEMENT_SIZE, MAGIC};
use std::io::{BufReader, ErrorKind, Read};
use stdx::checksum::crc32c;

/// What is read ahead.
const BUFFER_SIZE: usize = 4 * ELEMENT_SIZE;

/// What comes next in a stream.
#[derive(Debug)]
pub enum Item<'a> {
    /// Blocks of an element.
    Element(Element<'a>),
    /// A check mark: everything up to here is what was written.
    Mark(Mark),
    /// The end. Only now is the stream known to be whole.
    End(Summary),
}

/// A check mark.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    /// Byte of the stream where it begins.
    pub offset: u64,
    /// The last element before it.
    pub last_element: Option<u64>,
    /// How much came before it.
    pub counts: Counts,
    /// Stands for every byte before it.
    pub hash: Hash,
}

impl Mark {
    pub(crate) fn at(tally: &mut Tally) -> Mark {
        let hash = tally.hash();
        Mark { offset: tally.offset, last_element: tally.last, counts: tally.counts, hash }
    }
}

/// A whole stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Its header.
    pub header: Header,
    /// How much it holds.
    pub counts: Counts,
    /// Its check marks, the end mark included.
    pub marks: u64,
    /// Its bytes.
    pub bytes: u64,
    /// The hash in its end mark: stands for every byte before that.
    pub hash: Hash,
}

enum State {
    Open,
    Refused,
    Ended(Hash),
}

/// Reads a stream, item after item.
pub struct Reader<R: Read> {
    input: BufReader<R>,
    header: Header,
    tally: Tally,
    state: State,
    /// A body. Never longer than an element.
    body: Vec<u8>,
}

/// Reads a stream to its end, and looks at every bit.
pub fn verify<R: Read>(input: R) -> Result<Summary, StreamError> {
    Reader::open(input)?.drain(|_| ())
}

impl<R: Read> Reader<R> {
    /// Reads the header. `input` ends where the stream ends, or the stream is refused at its end.
    pub fn open(input: R) -> Result<Reader<R>, StreamError> {
        let mut input = BufReader::with_capacity(BUFFER_SIZE, input);
        let bytes = read_header(&mut input).map_err(|(offset, fault)| StreamError {
            offset: offset as u64,
            place: Place::Header,
            fault,
        })?;
        let decoded = Header::decode_body(&bytes[header::HEAD_SIZE..]);
        let offset = header::HEAD_SIZE as u64;
        let header = decoded.map_err(|e| StreamError { offset, place: Place::Header, fault: e.into() })?;
        let tally = Tally::begin(&bytes);
        Ok(Reader { input, header, tally, state: State::Open, body: Vec::with_capacity(ELEMENT_SIZE) })
    }

    /// The header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Bytes of the stream that were found right.
    pub fn offset(&self) -> u64 {
        self.tally.offset
    }

    /// The last element so far.
    pub fn last_element(&self) -> Option<u64> {
        self.tally.last
    }

    /// How much came so far.
    pub fn counts(&self) -> Counts {
        self.tally.counts
    }

    /// The next item; the end again and again once it was reached.
    pub fn next_item(&mut self) -> Result<Item<'_>, StreamError> {
        match self.state {
            State::Open => {}
            State::Ended(hash) => return Ok(Item::End(self.summary(hash))),
            State::Refused => return Err(self.refuse(0, Fault::RefusedBefore)),
        }
        // Until the record is found right.
        self.state = State::Refused;
        let bytes = self.read_head()?;
        let head = Head::decode(&bytes).map_err(|fault| self.refuse(0, fault))?;
        head.check(&self.header, self.tally.last).map_err(|fault| self.refuse(0, fault))?;
        self.read_body(&head)?;
        match head.kind {
            RecordKind::Element => self.element(&head, &bytes),
            RecordKind::Mark | RecordKind::End => self.mark(&head, &bytes),
        }
    }

    /// Reads to the end, and tells of every check mark on the way.
    pub fn drain(mut self, mut watch: impl FnMut(&Mark)) -> Result<Summary, StreamError> {
        loop {
            match self.next_item()? {
                Item::Element(_) => {}
                Item::Mark(mark) => watch(&mark),
                Item::End(summary) => return Ok(summary),
            }
        }
    }

    pub(crate) fn tally(&self) -> &Tally {
        &self.tally
    }

    fn element(&mut self, head: &Head, bytes: &[u8; HEAD_SIZE]) -> Result<Item<'_>, StreamError> {
        head.check_tail(&self.header, &self.body).map_err(|fault| self.refuse(HEAD_SIZE, fault))?;
        self.tally.element(head, [bytes, &self.body]);
        self.state = State::Open;
        let Head { number, data, zero, .. } = *head;
        let disk_size = self.header.size;
        Ok(Item::Element(Element { number, data, zero, bytes: &self.body, disk_size }))
    }

    fn mark(&mut self, head: &Head, bytes: &[u8; HEAD_SIZE]) -> Result<Item<'_>, StreamError> {
        if head.kind == RecordKind::Mark && self.tally.is_at_mark() {
            return Err(self.refuse(0, Fault::Record("a check mark for nothing")));
        }
        let mark = Mark::at(&mut self.tally);
        self.tally.check_mark(head, &self.body, mark.hash).map_err(|fault| self.refuse(0, fault))?;
        let mut whole = [0; MARK_SIZE];
        whole[..HEAD_SIZE].copy_from_slice(bytes);
        whole[HEAD_SIZE..].copy_from_slice(&self.body);
        self.tally.mark(&whole);
        if head.kind == RecordKind::Mark {
            self.state = State::Open;
            return Ok(Item::Mark(mark));
        }
        match fill(&mut self.input, &mut [0]) {
            Ok(0) => {}
            Ok(_) => return Err(self.refuse(0, Fault::Trailing)),
            Err(error) => return Err(self.refuse(0, error.into())),
        }
        self.state = State::Ended(mark.hash);
        Ok(Item::End(self.summary(mark.hash)))
    }

    fn summary(&self, hash: Hash) -> Summary {
        let Tally { counts, marks, offset, .. } = self.tally;
        Summary { header: self.header.clone(), counts, marks, bytes: offset, hash }
    }

    fn read_head(&mut self) -> Result<[u8; HEAD_SIZE], StreamError> {
        let mut bytes = [0; HEAD_SIZE];
        match fill(&mut self.input, &mut bytes) {
            Ok(HEAD_SIZE) => Ok(bytes),
            Ok(length) => Err(self.refuse(length, Fault::Cut { good: self.tally.good })),
            Err(error) => Err(self.refuse(0, error.into())),
        }
    }

    fn read_body(&mut self, head: &Head) -> Result<(), StreamError> {
        self.body.resize(head.body_length(), 0);
        match fill(&mut self.input, &mut self.body) {
            Ok(length) if length == self.body.len() => {}
            Ok(length) => return Err(self.refuse(HEAD_SIZE + length, Fault::Cut { good: self.tally.good })),
            Err(error) => return Err(self.refuse(HEAD_SIZE, error.into())),
        }
        if crc32c(&self.body) == head.body_crc {
            return Ok(());
        }
        let part = if head.kind == RecordKind::Element { Part::Data(head.number) } else { Part::Mark };
        Err(self.refuse(HEAD_SIZE, Fault::Damaged(part)))
    }

    /// So many bytes behind the beginning of the record.
    fn refuse(&self, behind: usize, fault: Fault) -> StreamError {
        let place = self.tally.last.map_or(Place::BeforeFirst, Place::After);
        StreamError { offset: self.tally.offset + behind as u64, place, fault }
    }
}

/// Head and body of a header; or what is wrong, and at which byte.
fn read_header(input: &mut impl Read) -> Result<Vec<u8>, (usize, Fault)> {
    let mut head = [0; header::HEAD_SIZE];
    let length = fill(input, &mut head).map_err(|e| (0, e.into()))?;
    if length == 0 {
        return Err((0, Fault::Empty));
    }
    let magic = length.min(MAGIC.len());
    if head[..magic] != MAGIC[..magic] {
        return Err((0, Fault::NotAStream));
    }
    if length < head.len() {
        return Err((length, Fault::NoHeader));
    }
    let (body_length, crc) = Header::decode_head(&head).map_err(|fault| (0, fault))?;
    let mut bytes = head.to_vec();
    bytes.resize(head.len() + body_length, 0);
    let body = &mut bytes[head.len()..];
    let length = fill(input, body).map_err(|e| (head.len(), e.into()))?;
    if length < body_length {
        return Err((head.len() + length, Fault::NoHeader));
    }
    match crc32c(body) == crc {
        true => Ok(bytes),
        false => Err((head.len(), Fault::Damaged(Part::Header))),
    }
}

/// Reads until `bytes` are full or the input ends; how many there were.
fn fill(input: &mut impl Read, bytes: &mut [u8]) -> std::io::Result<usize> {
    let mut length = 0;
    while length < bytes.len() {
        match input.read(&mut bytes[length..]) {
            Ok(0) => break,
            Ok(more) => length += more,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(length)
}
