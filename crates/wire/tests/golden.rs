//! The bytes, fixed. A difference here is a change of the protocol: it needs a new version and a line
//! in docs/wire-protocol.md. Then `UPDATE_EXPECT=1 cargo test -p petal-wire` writes the new ones.

mod samples;

use bytes::BytesMut;
use expect_test::{Expect, expect};
use petal::ids::*;
use petal::message::*;
use petal_wire::*;
use samples::samples;
use std::fmt::Write as _;

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut s, b| {
        write!(s, "{b:02x}").unwrap();
        s
    })
}

fn lines(bytes: &[u8]) -> String {
    bytes.chunks(16).fold(String::new(), |s, line| s + &hex(line) + "\n")
}

fn check(actual: &str, expected: Expect) {
    expected.assert_eq(actual);
}

#[test]
fn the_header_and_the_hello_of_a_server_never_change() {
    let role = Role::Server { id: ServerId(0x0102), incarnation: Incarnation(0x1112_1314_1516_1718) };
    let cluster = ClusterId(0x2122_2324_2526_2728_292a_2b2c_2d2e_2f30);
    let hello = Hello { expects: Some(ServerId(0x0304)), ..Hello::new(Some(cluster), role) };
    let mut bytes = BytesMut::new();
    encode_hello(&hello, &mut bytes);
    check(
        &lines(&bytes),
        expect![[r#"
            5045544c050001004000000000000000
            00000000000000000000000062feb342
            05000500010000000201040300000000
            302f2e2d2c2b2a292827262524232221
            18171615141312110000000000000000
            00000000000000000000000000000000
        "#]],
    );
    assert_eq!(decode(&mut bytes, &Limits::GREETING), Ok(Decoded::Frame(Frame::Hello(hello))));
}

#[test]
fn the_hello_of_a_client_that_knows_nothing_never_changes() {
    let hello = Hello::new(None, Role::Client);
    let mut bytes = BytesMut::new();
    encode_hello(&hello, &mut bytes);
    check(
        &lines(&bytes),
        expect![[r#"
            5045544c050001004000000000000000
            000000000000000000000000553dde52
            05000500020000000000000000000000
            00000000000000000000000000000000
            00000000000000000000000000000000
            00000000000000000000000000000000
        "#]],
    );
    assert_eq!(decode(&mut bytes, &Limits::GREETING), Ok(Decoded::Frame(Frame::Hello(hello))));
}

#[test]
fn a_reject_never_changes() {
    let reject = Reject::new(RejectCode::StaleIncarnation, "s2 has been started again");
    let mut bytes = BytesMut::new();
    encode_reject(&reject, &mut bytes);
    check(
        &lines(&bytes),
        expect![[r#"
            5045544c050002001d00000000000000
            000000000000000000000000cf3fa400
            04000000733220686173206265656e20
            7374617274656420616761696e
        "#]],
    );
    assert_eq!(decode(&mut bytes, &Limits::GREETING), Ok(Decoded::Frame(Frame::Reject(reject))));
}

#[test]
fn the_numbers_of_reject_codes_never_change() {
    let names: Vec<String> = (1..=10).map(|n| format!("{n} {:?}", RejectCode::from_number(n))).collect();
    check(
        &names.join("\n"),
        expect![[r#"
        1 WrongCluster
        2 VersionTooOld
        3 VersionTooNew
        4 StaleIncarnation
        5 WrongServer
        6 TooManyConnections
        7 Malformed
        8 TooSlow
        9 Stopping
        10 Other(10)"#]],
    );
    assert!((0..2000).all(|n| RejectCode::from_number(n).number() == n));
}

/// Name of a message, with what tells two of one kind apart.
fn label(message: &Message) -> String {
    let name = validate::name(&message.body);
    match &message.body {
        Body::Replicate(m) => {
            let part = format!("{:?}", m.part);
            format!("{name} {}", part.split([' ', '{']).next().unwrap())
        }
        Body::ReadReply(ReadReply { result: Err(e), .. }) | Body::WriteReply(WriteReply { result: Err(e), .. }) => {
            format!("{name} {e:?}")
        }
        _ => name.to_string(),
    }
}

/// Body behind the 32 bytes of the header (whose checksum covers it), and length of the payload.
#[test]
fn one_message_of_each_kind_has_these_bytes() {
    let mut table = String::new();
    for message in samples() {
        let mut bytes = BytesMut::new();
        let payload = encode(&message, VERSION, &mut bytes).unwrap();
        let (header, body) = bytes.split_at(header::HEADER_LENGTH);
        writeln!(table, "{} +{payload}\n  {}\n  {}", label(&message), hex(&header[8..]), hex(body)).unwrap();
    }
    check(
        &table,
        expect![[r#"
            Read +0
              0c000000000000000000000000000000000000004bc94495
              0d000102030b0c00ac020e02
            Write +18
              140000001200000000000000000000000000000008f35ffe
              0d010102030b0c001514ac02800401d0b085f20d
            Zero +0
              1000000000000000000000000000000000000000f1c3cdd6
              0d020102030b0c001614ac0280208040
            Map +0
              0e0000000000000000000000000000000000000036799948
              0d030102030b0c00ac0290030104
            ReadReply +4096
              0e00000000100000000000000000000000000000cb48a437
              0d04010b0c00020001e290d9910f
            ReadReply Busy +0
              0700000000000000000000000000000000000000fd43fcbe
              0d04010b0c0101
            WriteReply +0
              06000000000000000000000000000000000000001e298a60
              0d05010b0c00
            WriteReply NoSpace +0
              0700000000000000000000000000000000000000f83c3d64
              0d05010b0c0104
            MapReply +0
              1000000000000000000000000000000000000000077a09a0
              0d06010002ac02ff01b60201c0020109
            Admin +0
              0900000000000000000000000000000000000000bb76d93e
              0d07010104766f6c30
            Admin +0
              110000000000000000000000000000000000000040b0bdd2
              0d0701090905ac02020387808080808040
            AdminReply +0
              0a00000000000000000000000000000000000000c53e6589
              0d0801010204766f6c30
            AdminReply +0
              1100000000000000000000000000000000000000154c3a79
              0d0801000804280a01031e0a0190030109
            Replicate Write +4096
              21000000001000000000000000000000000000002b8e39e5
              0d0903050c01080c060004ac020c0701020101010315140002020194c5ddc60200
            Replicate Copy +8192
              390000000020000000000000000000000000000044c38e56
              0d0903050c01080c060104ac020c0701031501010200000194c5ddc60201e290d9910f00000000000000000000000002000200030001010309
            Replicate SettlementDone +0
              0a00000000000000000000000000000000000000c856141b
              0d0903050c01080c0602
            Replicate Skip +0
              0c00000000000000000000000000000000000000d724f56e
              0d0903050c01080c06030c08
            Replicate Mark +0
              0b00000000000000000000000000000000000000604472b5
              0d0903050c01080c06040d
            Replicate Ahead +8192
              2f00000000200000000000000000000000000000b0bb8c3d
              0d0903050c01080c060604ac0201010200000194c5ddc60201e290d9910f0000000000000000000000000200020003
            StreamAck +0
              1100000000000000000000000000000000000000a7728072
              0d0a0103050c01080c060103050c800800
            Watermarks +0
              0a000000000000000000000000000000000000009a5b3d7a
              0d0b0103050c0c060a04
            Promise +0
              0600000000000000000000000000000000000000f9e75866
              0d0c0103050c
            Promised +0
              0b0000000000000000000000000000000000000075f4b542
              0d0d0103050c0a04800401
            List +0
              0c00000000000000000000000000000000000000523adb5a
              0d0e03050c0a040104ac0200
            Listed +0
              2d000000000000000000000000000000000000008076937b
              0d0f03050c0104ac020c0701031501010200000194c5ddc60201e290d9910f0000000000000000000000000007
            Fetch +0
              0c0000000000000000000000000000000000000089cdfd80
              0d1003050c04ac0201010203
            Fetched +4096
              09000000001000000000000000000000000000002576bde3
              0d1103050c04ac0200
            Ring +0
              07000000000000000000000000000000000000005e57df37
              0d120103010203
            Propose +0
              090000000000000000000000000000000000000042717476
              0d13b4240201040200
            Learn +0
              0300000000000000000000000000000000000000b16432d0
              0d140d
            Entries +0
              090000000000000000000000000000000000000088543b91
              0d150d01b424020100
            Snapshot +0
              0600000000000000000000000000000000000000333d4afc
              0d1603040506
            Settle +0
              050000000000000000000000000000000000000064887879
              0d170d0103
            Settled +0
              050000000000000000000000000000000000000048533c96
              0d180d0103
            Index +0
              0200000000000000000000000000000000000000ea3a315a
              0d19
            Heartbeat +0
              090000000000000000000000000000000000000047c4dad9
              0d1a07280d27020205
            Grant +0
              0500000000000000000000000000000000000000f667fecf
              0d1b280101
            Compare +0
              0a00000000000000000000000000000000000000ee7a90d8
              0d1c03050c0104ac0207
            Compared +0
              2c000000000000000000000000000000000000000d1c87f7
              0d1d03050c0104ac020c0701031501010200000194c5ddc60201e290d9910f00000000000000000000000007
        "#]],
    );
}
