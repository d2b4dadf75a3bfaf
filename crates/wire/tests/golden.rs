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
            5045544c060001004000000000000000
            0000000000000000000000007b818ec2
            06000600010000000201040300000000
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
            5045544c060001004000000000000000
            0000000000000000000000004c42e3d2
            06000600020000000000000000000000
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
            5045544c060002001d00000000000000
            000000000000000000000000805c5e5e
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
              0c000000000000000000000000000000000000008f0511c1
              0d000102030b0c00ac020e02
            Write +18
              1400000012000000000000000000000000000000499fac5e
              0d010102030b0c001514ac02800401d0b085f20d
            Zero +0
              10000000000000000000000000000000000000007d8a61b5
              0d020102030b0c001614ac0280208040
            Map +0
              0e000000000000000000000000000000000000005699098c
              0d030102030b0c00ac0290030104
            ReadReply +4096
              0e00000000100000000000000000000000000000aba834f3
              0d04010b0c00020001e290d9910f
            ReadReply Busy +0
              07000000000000000000000000000000000000006ae21537
              0d04010b0c0101
            WriteReply +0
              060000000000000000000000000000000000000005ea475e
              0d05010b0c00
            WriteReply NoSpace +0
              07000000000000000000000000000000000000006f9dd4ed
              0d05010b0c0104
            MapReply +0
              10000000000000000000000000000000000000008b33a5c3
              0d06010002ac02ff01b60201c0020109
            Admin +0
              0900000000000000000000000000000000000000ca0b92d0
              0d07010104766f6c30
            Admin +0
              1100000000000000000000000000000000000000a1e86b1d
              0d0701090905ac02020387808080808040
            AdminReply +0
              0a00000000000000000000000000000000000000b6a2780a
              0d0801010204766f6c30
            AdminReply +0
              1100000000000000000000000000000000000000f414ecb6
              0d0801000804280a01031e0a0190030109
            Replicate Write +4096
              21000000001000000000000000000000000000008209426e
              0d0903050c01080c060004ac020c0701020101010315140002020194c5ddc60200
            Replicate Copy +8192
              39000000002000000000000000000000000000005953efa1
              0d0903050c01080c060104ac020c0701031501010200000194c5ddc60201e290d9910f00000000000000000000000002000200030001010309
            Replicate SettlementDone +0
              0a00000000000000000000000000000000000000bbca0998
              0d0903050c01080c0602
            Replicate Skip +0
              0c0000000000000000000000000000000000000013e8a03a
              0d0903050c01080c06030c08
            Replicate Mark +0
              0b0000000000000000000000000000000000000005fe39d7
              0d0903050c01080c06040d
            Replicate Ahead +8192
              2f000000002000000000000000000000000000006b911113
              0d0903050c01080c060604ac0201010200000194c5ddc60201e290d9910f0000000000000000000000000200020003
            StreamAck +0
              1500000000000000000000000000000000000000886518d6
              0d0a0103050c01080c060103050c80084001800400
            CreditReturned +0
              04000000000000000000000000000000000000003c1babe7
              0d0bc004
            Watermarks +0
              0a00000000000000000000000000000000000000f309403e
              0d0c0103050c0c060a04
            Promise +0
              06000000000000000000000000000000000000004e4b8460
              0d0d0103050c
            Promised +0
              0c0000000000000000000000000000000000000069549fb4
              0d0e0103050c0a0420000001
            List +0
              0c000000000000000000000000000000000000005701ff99
              0d0f03050c0a040104ac0200
            Listed +0
              2d00000000000000000000000000000000000000f24979b4
              0d1003050c0104ac020c0701031501010200000194c5ddc60201e290d9910f0000000000000000000000000007
            Fetch +0
              0c000000000000000000000000000000000000008cf6d943
              0d1103050c04ac0201010203
            Fetched +4096
              09000000001000000000000000000000000000003d8cb2d6
              0d1203050c04ac0200
            Ring +0
              0700000000000000000000000000000000000000d09d0651
              0d130103010203
            Propose +0
              090000000000000000000000000000000000000037096662
              0d14b4240201040200
            Learn +0
              0300000000000000000000000000000000000000264bd321
              0d150d
            Entries +0
              090000000000000000000000000000000000000090ae34a4
              0d160d01b424020100
            Snapshot +0
              0600000000000000000000000000000000000000849196fa
              0d1703040506
            Settle +0
              0500000000000000000000000000000000000000d678bc8b
              0d180d0103
            Settled +0
              05000000000000000000000000000000000000006ed2f956
              0d190d0103
            Index +0
              02000000000000000000000000000000000000000f45923f
              0d1a
            Heartbeat +0
              090000000000000000000000000000000000000011c4ad7e
              0d1b07280d27020205
            Grant +0
              0500000000000000000000000000000000000000a2f47ecb
              0d1c280101
            Compare +0
              0a00000000000000000000000000000000000000d530b3af
              0d1d03050c0104ac0207
            Compared +0
              2c00000000000000000000000000000000000000027aad60
              0d1e03050c0104ac020c0701031501010200000194c5ddc60201e290d9910f00000000000000000000000007
        "#]],
    );
}
