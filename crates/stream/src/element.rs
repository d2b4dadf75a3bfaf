//! One element of a stream, as whoever applies it wants it.

use crate::{BLOCK_SIZE, BLOCKS_PER_ELEMENT, ELEMENT_SIZE};

/// An element's record. The data were checked; the stream they come from may still be refused later, so nothing
/// may be shown as complete before [`crate::Item::End`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Element<'a> {
    /// Byte offset in the disk divided by 64 KiB.
    pub number: u64,
    /// Blocks with data, the lowest bit is the first block.
    pub data: u16,
    /// Blocks that are zeros now. None in a full stream.
    pub zero: u16,
    /// The blocks of `data`, one behind the other.
    pub bytes: &'a [u8],
    /// Bytes of the disk: the last block may reach beyond.
    pub(crate) disk_size: u64,
}

/// Bytes of a disk, one behind the other, that are all data or all zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run<'a> {
    /// Byte in the disk.
    pub offset: u64,
    /// Bytes; never beyond the end of the disk.
    pub length: u64,
    /// The data, `length` bytes; none for zeros.
    pub data: Option<&'a [u8]>,
}

impl<'a> Element<'a> {
    /// What is to be done to the disk, in ascending order, in as few pieces as there can be.
    pub fn runs(&self) -> impl Iterator<Item = Run<'a>> + use<'a> {
        let element = *self;
        let (mut block, mut rest) = (0, element.bytes);
        std::iter::from_fn(move || {
            let is = |mask: u16, block: usize| block < BLOCKS_PER_ELEMENT && mask >> block & 1 == 1;
            let first = (block..BLOCKS_PER_ELEMENT).find(|b| is(element.data | element.zero, *b))?;
            let mask = if is(element.data, first) { element.data } else { element.zero };
            let end = (first..).find(|b| !is(mask, *b)).expect("masks end");
            block = end;
            let offset = element.number * ELEMENT_SIZE as u64 + (first * BLOCK_SIZE) as u64;
            let length = (((end - first) * BLOCK_SIZE) as u64).min(element.disk_size - offset);
            let data = (mask == element.data).then(|| {
                let (data, behind) = rest.split_at((end - first) * BLOCK_SIZE);
                rest = behind;
                &data[..length as usize]
            });
            Some(Run { offset, length, data })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_cover_the_masks_in_order_and_end_with_the_disk() {
        let bytes: Vec<u8> = (0..4).flat_map(|b| vec![b; BLOCK_SIZE]).collect();
        let disk_size = 2 * ELEMENT_SIZE as u64 - 3584;
        let element = Element { number: 1, data: 0b1000_0000_0000_1011, zero: 0b0111, bytes: &bytes, disk_size };
        let element = Element { zero: element.zero & !element.data | 0x4000, ..element };
        let runs: Vec<(u64, u64, Option<u8>)> =
            element.runs().map(|r| (r.offset - 65536, r.length, r.data.map(|d| d[0]))).collect();
        let expected = [
            (0, 8192, Some(0)),
            (8192, 4096, None),
            (12288, 4096, Some(2)),
            (57344, 4096, None),
            (61440, 512, Some(3)),
        ];
        assert_eq!(runs, expected);
        assert!(element.runs().all(|r| r.data.is_none_or(|d| d.len() as u64 == r.length)));
    }

    #[test]
    fn a_whole_element_is_one_run() {
        let bytes = vec![7; ELEMENT_SIZE];
        let element = Element { number: 3, data: 0xffff, zero: 0, bytes: &bytes, disk_size: 1 << 30 };
        let run = Run { offset: 3 << 16, length: 65536, data: Some(&bytes) };
        assert_eq!(element.runs().collect::<Vec<_>>(), [run]);
        let zeros = Element { data: 0, zero: 0xffff, bytes: &[], ..element };
        assert_eq!(zeros.runs().collect::<Vec<_>>(), [Run { data: None, ..run }]);
    }
}
