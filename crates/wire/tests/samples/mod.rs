//! One message of each kind, small and with every field different, for the golden bytes and as the
//! seed of the hostile ones.

use bytes::Bytes;
use petal::global_state::{Command, Entry};
use petal::ids::*;
use petal::message::*;
use petal::space::{SpacePart, SpaceQuestion};
use petal::store::{BlockSum, ElementImage, Place, RowImage};

fn version(term: u64, sequence: u64) -> Version {
    Version { term, sequence }
}

fn slot() -> SlotId {
    SlotId { gmap: GmapId(3), slot: 5 }
}

fn element() -> ElementKey {
    ElementKey { family: FamilyId(4), element: 300 }
}

fn need() -> Need {
    Need { revision: 11, term: 12 }
}

fn access() -> Access {
    Access { tag: 1, vdisk: VdiskId(2), session: SessionId(3), need: need(), relay: None }
}

fn block(byte: u8) -> Bytes {
    Bytes::from(vec![byte; 4096])
}

fn crc(byte: u8) -> BlockSum {
    BlockSum::Crc(stdx::checksum::crc32c(&[byte; 4096]))
}

fn image() -> ElementImage {
    let mut sums = [BlockSum::Zero; BLOCKS_PER_ELEMENT];
    sums[2] = crc(2);
    sums[3] = crc(3);
    ElementImage {
        version: version(12, 7),
        ids: vec![RequestId { session: SessionId(3), number: 21 }],
        rows: vec![RowImage { lineage: LineageId(1), epoch: Epoch(2), sums }],
    }
}

fn replicate(part: Part, data: Vec<Bytes>) -> Body {
    let watermark = version(12, 6);
    Body::Replicate(Replicate { slot: slot(), term: 12, stream: 1, number: 8, watermark, part, data: Payload(data) })
}

fn id() -> CommandId {
    CommandId { proposer: 0x1234, number: 2, finished_below: 1 }
}

/// One of each kind (of `Replicate`, one of each part; of replies, also a refusal).
pub fn samples() -> Vec<Message> {
    let short = Bytes::from_static(b"a piece of a block");
    let bodies = vec![
        Body::Read(Read { access: access(), element: 300, first_block: 14, blocks: 2 }),
        Body::Write(Write {
            access: access(),
            number: 21,
            finished_below: 20,
            element: 300,
            offset: 512,
            crcs: vec![stdx::checksum::crc32c(&short)],
            data: short.into(),
        }),
        Body::Zero(Zero { access: access(), number: 22, finished_below: 20, element: 300, offset: 4096, length: 8192 }),
        Body::Map(Map { access: access(), first_element: 300, end_element: 400, than: Some(VdiskId(4)) }),
        Body::ReadReply(ReadReply {
            tag: 1,
            need: need(),
            result: Ok(vec![BlockSum::Zero, crc(3)]),
            data: block(3).into(),
        }),
        Body::ReadReply(ReadReply { tag: 1, need: need(), result: Err(Refusal::Busy), data: Payload::default() }),
        Body::WriteReply(WriteReply { tag: 1, need: need(), result: Ok(()) }),
        Body::WriteReply(WriteReply { tag: 1, need: need(), result: Err(Refusal::NoSpace) }),
        Body::MapReply(MapReply {
            tag: 1,
            result: Ok(MapPart { elements: vec![(300, 0x00ff), (310, 1)], complete_below: 320, not_here: vec![9] }),
        }),
        Body::Admin(Admin { tag: 1, request: AdminRequest::Hints { name: "vol0".into() } }),
        Body::Admin(Admin {
            tag: 1,
            request: AdminRequest::Space(SpaceQuestion {
                at: 9,
                family: FamilyId(5),
                first_element: 300,
                going: vec![VdiskId(3), VdiskId::made_by(7, 1)],
            }),
        }),
        Body::AdminReply(AdminReply { tag: 1, result: Err(AdminError::NoSuchDisk("vol0".into())) }),
        Body::AdminReply(AdminReply {
            tag: 1,
            result: Ok(AdminResponse::Space(Box::new(SpacePart {
                elements: 4,
                used: 40,
                back: 10,
                members: vec![(VdiskId(3), 30, 10)],
                next: Some(400),
                not_here: vec![9],
            }))),
        }),
        replicate(
            Part::Write {
                element: element(),
                version: version(12, 7),
                lineage: LineageId(1),
                epoch: Epoch(2),
                parents: vec![(LineageId(1), Epoch(1))],
                id: RequestId { session: SessionId(3), number: 21 },
                finished_below: 20,
                ended: vec![],
                first_block: 2,
                sums: vec![crc(2), BlockSum::Zero],
            },
            vec![block(2)],
        ),
        replicate(
            Part::Copy {
                element: element(),
                image: image(),
                blocks: vec![(0, 2), (0, 3)],
                twins: vec![],
                settles: true,
                finished_below: vec![(SessionId(3), 9)],
            },
            vec![block(2), block(3)],
        ),
        replicate(Part::SettlementDone, vec![]),
        replicate(Part::Skip { version: version(12, 8) }, vec![]),
        replicate(Part::Mark { state_index: 13 }, vec![]),
        replicate(
            Part::Ahead { element: element(), rows: image().rows, blocks: vec![(0, 2), (0, 3)] },
            vec![block(2), block(3)],
        ),
        Body::StreamAck(StreamAck {
            slots: vec![SlotAck { slot: slot(), term: 12, stream: 1, through: 8, durable_watermark: version(12, 6) }],
            again: vec![(slot(), 12)],
            credit: Credit { window: 1024, returned: 64, keep: Some(512), takes: Takes::Everything },
        }),
        Body::CreditReturned(CreditReturned { blocks: 576 }),
        Body::Watermarks(Watermarks {
            slots: vec![SlotWatermark { slot: slot(), term: 12, watermark: version(12, 6), lowest: version(10, 4) }],
        }),
        Body::Promise(Promise { slots: vec![(slot(), 12)] }),
        Body::Promised(Promised { slots: vec![(slot(), 12, version(10, 4))], credit: full_credit() }),
        Body::List(List { slot: slot(), term: 12, above: version(10, 4), after: Some(element()), attempt: 0 }),
        Body::Listed(Listed { slot: slot(), term: 12, elements: vec![(element(), image())], next: None, attempt: 7 }),
        Body::Fetch(Fetch {
            slot: slot(),
            term: 12,
            element: element(),
            places: vec![Place { lineage: LineageId(1), epoch: Epoch(2), block: 3 }],
        }),
        Body::Fetched(Fetched { slot: slot(), term: 12, element: element(), result: Ok(()), data: block(3).into() }),
        Body::Ring(Ring { configuration: 1, bytes: vec![1, 2, 3] }),
        Body::Propose(Propose { id: id(), command: Command::DeleteDisk { vdisk: VdiskId(2) }, forwarded: false }),
        Body::Learn(Learn { from: 13 }),
        Body::Entries(Entries { from: 13, entries: vec![Entry { id: id(), command: Command::Noop }] }),
        Body::Snapshot(Snapshot { state: vec![4, 5, 6] }),
        Body::Settle(Settle { index: 13, asker: ServerId(1), settler: ServerId(3) }),
        Body::Settled(Settled { index: 13, asker: ServerId(1), settler: ServerId(3) }),
        Body::Index,
        Body::Heartbeat(Heartbeat {
            incarnation: Incarnation(7),
            sequence: 40,
            applied: 13,
            answered: 39,
            silent: vec![ServerId(2), ServerId(5)],
        }),
        Body::Grant(Grant { sequence: 40, configuration: 1, granted: true }),
        Body::Compare(Compare { slot: slot(), term: 12, elements: vec![element()], attempt: 7 }),
        Body::Compared(Compared { slot: slot(), term: 12, elements: vec![(element(), image())], attempt: 7 }),
    ];
    bodies.into_iter().map(|body| Message { state_index: 13, body }).collect()
}

fn full_credit() -> Credit {
    Credit { window: 32, returned: 0, keep: None, takes: Takes::Overwrites }
}
