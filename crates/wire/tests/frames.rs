//! What was encoded decodes to the same, however it is cut; what is hostile is refused and never
//! panics.

mod samples;

use bytes::{Bytes, BytesMut};
use petal::ids::*;
use petal::limits::{FRAME_BODY_MAX, FRAME_PAYLOAD_MAX};
use petal::message::*;
use petal::store::BlockSum;
use petal_wire::*;
use proptest::prelude::*;
use samples::samples;
use stdx::Prng;
use stdx::checksum::crc32c;

const SERVER: Limits = Limits::from_server(VERSION);

/// Header, body and payload in one piece.
fn whole(message: &Message) -> BytesMut {
    let mut bytes = BytesMut::new();
    encode(message, VERSION, &mut bytes).unwrap();
    if let Some(payload) = message.body.payload() {
        payload.0.iter().for_each(|piece| bytes.extend_from_slice(piece));
    }
    bytes
}

/// Writes length and checksum of a frame anew after its body was changed.
fn reseal(body: &[u8], payload: &[u8]) -> BytesMut {
    let mut frame = vec![0; header::HEADER_LENGTH];
    frame.extend_from_slice(body);
    header::seal(&mut frame, VERSION, header::Kind::Message, payload.len() as u32);
    frame.extend_from_slice(payload);
    BytesMut::from(&frame[..])
}

/// The same message with its payload in one piece, as a receiver has it.
fn received(mut message: Message) -> Message {
    if let Some(payload) = message.body.payload_mut() {
        *payload = if payload.is_empty() { Payload::default() } else { payload.to_bytes().into() };
    }
    message
}

fn frame(decoded: Result<Decoded, WireError>) -> Message {
    match decoded {
        Ok(Decoded::Frame(Frame::Message(message))) => message,
        other => panic!("not a message: {other:?}"),
    }
}

#[test]
fn every_kind_of_message_comes_back_as_it_was() {
    for message in samples() {
        let mut bytes = whole(&message);
        assert_eq!(frame(decode(&mut bytes, &SERVER)), received(message));
        assert!(bytes.is_empty());
    }
}

#[test]
fn frames_come_out_one_by_one_however_the_stream_is_cut() {
    let all = samples();
    let stream: Vec<u8> = all.iter().flat_map(|m| whole(m).to_vec()).collect();
    let mut prng = Prng::new(1);
    for _ in 0..50 {
        let (mut buffer, mut got, mut at) = (BytesMut::new(), Vec::new(), 0);
        while at < stream.len() {
            let n = (prng.between(1, 3000) as usize).min(stream.len() - at);
            buffer.extend_from_slice(&stream[at..at + n]);
            at += n;
            loop {
                match decode(&mut buffer, &SERVER).unwrap() {
                    Decoded::Frame(Frame::Message(message)) => got.push(message),
                    Decoded::Frame(other) => panic!("{other:?}"),
                    Decoded::Need(need) => {
                        assert!(need > buffer.len());
                        break;
                    }
                }
            }
        }
        assert_eq!(got, all.iter().cloned().map(received).collect::<Vec<_>>());
    }
}

#[test]
fn a_payload_is_a_slice_of_what_was_read() {
    let write = samples().into_iter().find(|m| matches!(m.body, Body::ReadReply(_))).unwrap();
    let mut bytes = whole(&write);
    let place = bytes.as_ptr() as usize + bytes.len() - 4096;
    let message = frame(decode(&mut bytes, &SERVER));
    assert_eq!(message.body.payload().unwrap().0[0].as_ptr() as usize, place);
}

#[test]
fn every_truncation_asks_for_more_and_takes_nothing() {
    for message in samples() {
        let bytes = whole(&message);
        for end in (0..bytes.len()).filter(|n| *n < 200 || n % 97 == 0) {
            let mut part = BytesMut::from(&bytes[..end]);
            assert!(matches!(decode(&mut part, &SERVER), Ok(Decoded::Need(n)) if n > end && n <= bytes.len()));
            assert_eq!(part.len(), end);
        }
    }
}

#[test]
fn every_flipped_bit_of_header_or_body_is_noticed() {
    for message in samples() {
        let bytes = whole(&message);
        let payload = message.body.payload().map_or(0, Payload::len);
        for bit in 0..(bytes.len() - payload) * 8 {
            let mut bad = bytes.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            match decode(&mut bad, &SERVER) {
                // A length that became longer waits for bytes that never come (and times out).
                Err(_) | Ok(Decoded::Need(_)) => {}
                Ok(Decoded::Frame(other)) => panic!("bit {bit} of {message:?} went unnoticed: {other:?}"),
            }
        }
    }
}

/// Checksums right, contents wild: what a hostile peer would send.
#[test]
fn mutated_bodies_never_panic_and_never_decode_to_what_validate_refuses() {
    let mut prng = Prng::new(2);
    let (mut good, mut bad) = (0, 0);
    for round in 0..400 {
        for message in samples() {
            let mut encoded = BytesMut::new();
            encode(&message, VERSION, &mut encoded).unwrap();
            let mut body = encoded[header::HEADER_LENGTH..].to_vec();
            let mut payload = message.body.payload().map(|p| p.to_bytes().to_vec()).unwrap_or_default();
            for _ in 0..=round % 4 {
                mutate(&mut prng, &mut body);
            }
            if prng.chance(1, 8) {
                payload.truncate(prng.below(payload.len() as u64 + 1) as usize);
            }
            match decode(&mut reseal(&body, &payload), &SERVER) {
                Ok(Decoded::Frame(Frame::Message(m))) => {
                    assert_eq!(validate(&m), Ok(()));
                    good += 1;
                }
                Ok(other) => panic!("{other:?}"),
                Err(_) => bad += 1,
            }
        }
    }
    assert!(good > 500 && bad > 500, "{good} accepted, {bad} refused: the mutations are of no use");
}

fn mutate(prng: &mut Prng, body: &mut Vec<u8>) {
    let at = prng.below(body.len() as u64) as usize;
    match prng.below(5) {
        0 => body[at] = prng.next_u64() as u8,
        1 => body[at] ^= 1 << prng.below(8),
        2 => {
            body.insert(at, 0xff);
        }
        3 => {
            body.remove(at);
            if body.is_empty() {
                body.push(0);
            }
        }
        // The longest number that postcard knows: lengths and counters.
        _ => {
            body.splice(at..at, [0xff; 9]);
        }
    }
}

#[test]
fn random_bytes_are_refused_at_the_fourth() {
    let mut prng = Prng::new(3);
    for _ in 0..1000 {
        let bytes: Vec<u8> = (0..prng.between(4, 200)).map(|_| prng.next_u64() as u8).collect();
        let limits = if prng.chance(1, 2) { SERVER } else { Limits::GREETING };
        assert!(matches!(decode(&mut BytesMut::from(&bytes[..]), &limits), Err(WireError::NotPetal(_))));
    }
}

#[test]
fn what_is_too_long_is_refused_by_its_header_alone() {
    let claim = |body: u32, payload: u32| {
        let mut bytes = whole(&samples()[0]);
        bytes[8..12].copy_from_slice(&body.to_le_bytes());
        bytes[12..16].copy_from_slice(&payload.to_le_bytes());
        bytes.truncate(32);
        bytes
    };
    let client = Limits::from_client(VERSION);
    for (limits, body, payload) in [(SERVER, FRAME_BODY_MAX, FRAME_PAYLOAD_MAX), (client, 64 << 10, 64 << 10)] {
        let (body, payload) = (body as u32, payload as u32);
        assert!(matches!(decode(&mut claim(body, payload), &limits), Ok(Decoded::Need(_))));
        assert!(matches!(decode(&mut claim(body + 1, 0), &limits), Err(WireError::BodyTooLong { .. })));
        assert!(matches!(decode(&mut claim(u32::MAX, 0), &limits), Err(WireError::BodyTooLong { .. })));
        assert!(matches!(decode(&mut claim(0, payload + 1), &limits), Err(WireError::PayloadTooLong { .. })));
    }
}

#[test]
fn what_comes_at_the_wrong_time_is_refused() {
    let message = whole(&samples()[0]);
    assert_eq!(decode(&mut message.clone(), &Limits::GREETING), Err(WireError::MessageBeforeHello));
    let mut hello = BytesMut::new();
    encode_hello(&Hello::new(None, Role::Client), &mut hello);
    assert_eq!(decode(&mut hello.clone(), &SERVER), Err(WireError::SecondHello));
    let other = Limits::from_server(VERSION + 1);
    let error = WireError::Version { theirs: VERSION, agreed: VERSION + 1 };
    assert_eq!(decode(&mut message.clone(), &other), Err(error));
}

#[test]
fn a_reject_of_any_time_is_understood_and_cannot_move_a_cursor() {
    let reject = Reject::new(RejectCode::Other(999), format!("\x1b[2Jboo\n{}", "é".repeat(3000)));
    let mut bytes = BytesMut::new();
    encode_reject(&reject, &mut bytes);
    for limits in [Limits::GREETING, SERVER] {
        let Ok(Decoded::Frame(Frame::Reject(got))) = decode(&mut bytes.clone(), &limits) else { panic!() };
        assert_eq!(got.code, RejectCode::Other(999));
        assert!(got.sentence.starts_with(" [2Jboo é"), "{}", got.sentence);
        assert!(got.sentence.len() <= hello::SENTENCE_MAX && !got.sentence.contains(char::is_control));
    }
}

#[test]
fn a_payload_where_none_belongs_and_bytes_behind_a_message_are_refused() {
    let read = whole(&samples()[0]);
    let body = &read[header::HEADER_LENGTH..];
    assert_eq!(decode(&mut reseal(body, b"x"), &SERVER), Err(WireError::UnexpectedPayload("Read")));
    let longer = [body, b"x"].concat();
    assert_eq!(decode(&mut reseal(&longer, b""), &SERVER), Err(WireError::TrailingBytes(1)));
}

#[test]
fn messages_that_make_no_sense_are_refused_with_the_reason() {
    let refused = |change: &dyn Fn(&mut Body)| {
        let mut whys = Vec::new();
        for mut message in samples() {
            let before = message.clone();
            change(&mut message.body);
            if message != before {
                match validate(&message) {
                    Err(WireError::Invalid { message, why }) => whys.push(format!("{message}: {why}")),
                    other => panic!("{message:?}: {other:?}"),
                }
            }
        }
        assert!(!whys.is_empty());
        whys.dedup();
        whys.join("; ")
    };
    let over = "it reaches over the end of its element";
    let case = |change: &dyn Fn(&mut Body), expected: &str| assert_eq!(refused(change), expected);
    case(
        &|b| {
            if let Body::Heartbeat(m) = b {
                m.silent.reverse();
            }
        },
        "Heartbeat: its servers do not ascend",
    );
    case(
        &|b| {
            if let Body::Heartbeat(m) = b {
                m.silent = (0..2000).map(ServerId).collect();
            }
        },
        "Heartbeat: too many servers",
    );
    case(
        &|b| match b {
            Body::Heartbeat(m) => m.sequence = 0,
            Body::Grant(m) => m.sequence = u64::MAX,
            _ => {}
        },
        "Heartbeat: heartbeats begin with 1; Grant: a counter above 2^62",
    );
    case(
        &|b| {
            if let Body::Read(m) = b {
                m.first_block = 15
            }
        },
        &format!("Read: {over}"),
    );
    case(
        &|b| {
            if let Body::Read(m) = b {
                m.blocks = 0
            }
        },
        "Read: it concerns no blocks",
    );
    case(
        &|b| {
            if let Body::Read(m) = b {
                m.blocks = 255
            }
        },
        &format!("Read: {over}"),
    );
    case(
        &|b| {
            if let Body::Read(m) = b {
                m.element = 1 << 48
            }
        },
        "Read: an element beyond 2^64 bytes",
    );
    case(
        &|b| {
            if let Body::Read(m) = b {
                m.access.need.term = u64::MAX
            }
        },
        "Read: a counter above 2^62",
    );
    case(
        &|b| {
            if let Body::Write(m) = b {
                m.offset = 65_530
            }
        },
        &format!("Write: {over}"),
    );
    case(
        &|b| {
            if let Body::Write(m) = b {
                m.offset = u32::MAX
            }
        },
        &format!("Write: {over}"),
    );
    case(
        &|b| {
            if let Body::Write(m) = b {
                m.offset = 4090
            }
        },
        "Write: not one checksum per block",
    );
    case(
        &|b| {
            if let Body::Write(m) = b {
                m.data = Payload::default()
            }
        },
        "Write: it concerns no bytes",
    );
    case(
        &|b| {
            if let Body::Write(m) = b {
                m.number = 0
            }
        },
        "Write: request numbers begin with 1",
    );
    case(
        &|b| {
            if let Body::Write(m) = b {
                m.finished_below = 22
            }
        },
        "Write: the request itself is declared finished",
    );
    case(
        &|b| {
            if let Body::Zero(m) = b {
                m.length = 65_536
            }
        },
        &format!("Zero: {over}"),
    );
    case(
        &|b| {
            if let Body::Zero(m) = b {
                m.length = u32::MAX
            }
        },
        &format!("Zero: {over}"),
    );
    case(
        &|b| {
            if let Body::Map(m) = b {
                m.first_element = 401
            }
        },
        "Map: its end is before its beginning",
    );
    let sums = "its data is not as long as its checksums say";
    case(
        &|b| {
            if let Body::ReadReply(ReadReply { result: Ok(sums), .. }) = b {
                sums.push(BlockSum::Crc(1));
            }
        },
        &format!("ReadReply: {sums}"),
    );
    case(
        &|b| {
            if let Body::ReadReply(m @ ReadReply { result: Err(_), .. }) = b {
                m.data = Bytes::from_static(b"x").into();
            }
        },
        "ReadReply: a refusal with data",
    );
    case(
        &|b| {
            if let Body::Replicate(Replicate { part: Part::Write { first_block, .. }, .. }) = b {
                *first_block = 15;
            }
        },
        &format!("Replicate: {over}"),
    );
    case(
        &|b| {
            if let Body::Replicate(Replicate { part: Part::Copy { blocks, .. }, .. }) = b {
                blocks[1] = (1, 3);
            }
        },
        "Replicate: a block outside of the element",
    );
    case(
        &|b| {
            if let Body::Replicate(Replicate { part: Part::Copy { blocks, .. }, .. }) = b {
                blocks[0] = (0, 3);
            }
        },
        "Replicate: its blocks do not ascend",
    );
    case(
        &|b| {
            if let Body::Listed(m) = b {
                m.elements.push(m.elements[0].clone());
            }
        },
        "Listed: its elements do not ascend",
    );
    case(
        &|b| {
            if let Body::MapReply(MapReply { result: Ok(part), .. }) = b {
                part.elements = (0..1025).map(|n| (n, 1)).collect();
            }
        },
        "MapReply: too many elements",
    );
}

#[test]
fn a_list_that_claims_to_be_huge_costs_no_memory() {
    // state index, StreamAck, 2^60 entries, and then nothing.
    let mut body = vec![1, 10];
    body.extend([0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x10]);
    assert!(matches!(decode(&mut reseal(&body, b""), &SERVER), Err(WireError::Body(_))));
}

#[test]
fn a_message_that_is_too_long_is_not_encoded_and_leaves_no_trace() {
    let mut out = BytesMut::from(&b"before"[..]);
    let state = vec![0; FRAME_BODY_MAX + 1];
    let message = Message { state_index: 1, body: Body::Snapshot(Snapshot { state }) };
    assert!(matches!(encode(&message, VERSION, &mut out), Err(WireError::BodyTooLong { .. })));
    assert_eq!(&out[..], b"before");
}

fn payload(length: usize, seed: u64, pieces: usize) -> Payload {
    let mut prng = Prng::new(seed);
    let bytes: Bytes = (0..length).map(|_| prng.next_u64() as u8).collect::<Vec<_>>().into();
    let step = length.div_ceil(pieces).max(1);
    Payload((0..length).step_by(step).map(|at| bytes.slice(at..(at + step).min(length))).collect())
}

prop_compose! {
    fn any_write()(
        numbers in (0..1u64 << 62, 0..u64::MAX, 0..u64::MAX, 0..1u64 << 62, 0..1u64 << 62),
        number in 1..1u64 << 62,
        element in 0..1u64 << 48,
        (offset, length) in (0..65_536u32).prop_flat_map(|o| (Just(o), 1..=65_536 - o)),
        seed in any::<u64>(),
        pieces in 1..5usize,
    ) -> Message {
        let (tag, vdisk, session, revision, term) = numbers;
        let data = payload(length as usize, seed, pieces);
        let all = data.to_bytes();
        let first = (4096 - offset as usize % 4096).min(all.len());
        let crcs = std::iter::once(&all[..first]).chain(all[first..].chunks(4096)).map(crc32c).collect();
        let need = Need { revision, term };
        let access = Access { tag, vdisk: VdiskId(vdisk), session: SessionId(session), need, relay: None };
        let body = Body::Write(Write { access, number, finished_below: number, element, offset, crcs, data });
        Message { state_index: term, body }
    }
}

prop_compose! {
    fn any_read_reply()(
        tag in any::<u64>(),
        blocks in prop::collection::vec(prop::option::of(any::<u8>()), 1..=16),
    ) -> Message {
        let data = Payload(blocks.iter().flatten().map(|b| Bytes::from(vec![*b; 4096])).collect());
        let sums = blocks.iter().map(|b| b.map_or(BlockSum::Zero, |b| BlockSum::Crc(crc32c(&[b; 4096])))).collect();
        let body = Body::ReadReply(ReadReply { tag, need: Need::default(), result: Ok(sums), data });
        Message { state_index: 0, body }
    }
}

prop_compose! {
    fn any_acks()(
        numbers in prop::collection::vec((any::<u64>(), any::<u32>(), 0..1u64 << 62, 0..1u64 << 62), 0..300),
        window in 0..1u64 << 62,
        returned in 0..1u64 << 62,
        takes in prop::sample::select(vec![Takes::Everything, Takes::Overwrites, Takes::Nothing]),
    ) -> Message {
        let slots = numbers.into_iter().map(|(gmap, slot, a, b)| SlotAck {
            slot: SlotId { gmap: GmapId(gmap), slot },
            term: a,
            stream: b,
            through: a,
            durable_watermark: Version { term: b, sequence: a },
        });
        let credit = Credit { window, returned, keep: Some(window / 2), takes };
        Message { state_index: 5, body: Body::StreamAck(StreamAck { slots: slots.collect(), again: Vec::new(), credit }) }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn round_trips(message in prop_oneof![any_write(), any_read_reply(), any_acks()]) {
        let mut bytes = whole(&message);
        prop_assert_eq!(frame(decode(&mut bytes, &SERVER)), received(message));
        prop_assert!(bytes.is_empty());
    }

    #[test]
    fn wild_bodies_never_panic(body in prop::collection::vec(any::<u8>(), 1..300), payload in 0..3usize) {
        let _ = decode(&mut reseal(&body, &vec![0; payload * 4096]), &SERVER);
    }

    #[test]
    fn wild_hellos_never_panic(body in prop::collection::vec(any::<u8>(), 0..200), kind in 1..3u8) {
        let mut bytes = reseal(&body, b"").to_vec();
        bytes[6] = kind;
        let crc = stdx::checksum::crc32c_append(crc32c(&bytes[..28]), &bytes[32..]);
        bytes[28..32].copy_from_slice(&crc.to_le_bytes());
        if let Ok(Decoded::Frame(Frame::Hello(hello))) = decode(&mut BytesMut::from(&bytes[..]), &Limits::GREETING) {
            let ours = Hello::new(Some(ClusterId(1)), Role::Server { id: ServerId(1), incarnation: Incarnation(1) });
            let _ = check_hello(&ours, &hello);
        }
    }
}
