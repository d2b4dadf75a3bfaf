//! Messages through the wire format, and in words.

use bytes::{BufMut, Bytes, BytesMut};
use petal::message::{Message, Payload};
use petal::store::{DiskCommand, OpId};
use petal_wire::{Decoded, Frame, Limits, VERSION};

/// Bytes of a frame.
pub fn encode(message: &Message) -> Result<Bytes, String> {
    let payload = message.body.payload().map_or(0, Payload::len);
    let mut out = BytesMut::with_capacity(256 + payload);
    petal_wire::encode(message, VERSION, &mut out).map_err(|e| format!("{e}: {}", describe(message)))?;
    for piece in message.body.payload().into_iter().flat_map(|p| &p.0) {
        out.put_slice(piece);
    }
    Ok(out.freeze())
}

/// The message of a frame.
pub fn decode(frame: Bytes, from_client: bool) -> Result<Message, String> {
    let limits = if from_client { Limits::from_client(VERSION) } else { Limits::from_server(VERSION) };
    let mut buffer = match frame.try_into_mut() {
        Ok(buffer) => buffer,
        Err(shared) => BytesMut::from(&shared[..]),
    };
    match petal_wire::decode(&mut buffer, &limits) {
        Ok(Decoded::Frame(Frame::Message(message))) if buffer.is_empty() => Ok(message),
        Ok(other) => Err(format!("not one whole message: {other:?}, {} bytes behind it", buffer.len())),
        Err(e) => Err(e.to_string()),
    }
}

/// A message in one line, without its bulk data.
pub fn describe(message: &Message) -> String {
    let bulk = message.body.payload().map_or(0, Payload::len);
    let mut small = message.clone();
    if let Some(payload) = small.body.payload_mut() {
        *payload = Payload::default();
    }
    let mut words = format!("@{} {:?}", small.state_index, small.body);
    shorten(&mut words, 400);
    if bulk > 0 {
        words.push_str(&format!(" + {bulk} bytes"));
    }
    words
}

/// A disk command in one line, without its bulk data.
pub fn describe_command(op: OpId, command: &DiskCommand) -> String {
    match command {
        DiskCommand::Write { offset, pieces } => {
            format!("{op} Write {} bytes at {offset}", pieces.iter().map(Bytes::len).sum::<usize>())
        }
        DiskCommand::PmapCommit { changes } => format!("{op} PmapCommit of {} changes", changes.len()),
        other => format!("{op} {other:?}"),
    }
}

fn shorten(words: &mut String, most: usize) {
    if let Some((at, _)) = words.char_indices().nth(most) {
        words.truncate(at);
        words.push('…');
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use petal::ids::{Need, SessionId, VdiskId};
    use petal::message::{Access, Body, Write};

    #[test]
    fn a_message_survives_the_wire_and_its_bulk_data_is_not_printed() {
        let data = Bytes::from(vec![7; 4096]);
        let access = Access { tag: 1, vdisk: VdiskId(2), session: SessionId(3), need: Need::default(), relay: None };
        let write = Write {
            access,
            number: 1,
            finished_below: 1,
            element: 9,
            offset: 4096,
            crcs: vec![stdx::checksum::crc32c(&data)],
            data: Payload(vec![data.slice(..100), data.slice(100..)]),
        };
        let message = Message { state_index: 5, body: Body::Write(write) };
        let mut back = decode(encode(&message).unwrap(), true).unwrap();
        let payload = back.body.payload_mut().unwrap();
        assert_eq!(payload.to_bytes(), data);
        *payload = message.body.payload().unwrap().clone();
        assert_eq!(back, message);
        assert!(describe(&message).len() < 500 && describe(&message).ends_with("+ 4096 bytes"));
    }
}
