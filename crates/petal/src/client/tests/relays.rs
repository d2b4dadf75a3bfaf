//! Operations that a server does not answer, and go by way of others.

use super::*;

/// Whom a write of element 0 was sent to, by way of whom, while nobody answers for so long.
fn ways(world: &mut World, session: SessionId, time: Duration) -> (RequestNumber, Vec<(Option<ServerId>, ServerId)>) {
    let number = world.ask(Request::Write { session, offset: 0, data: Bytes::from_static(b"hello") });
    let end = world.now + time;
    while world.now < end {
        world.sleep_quietly(Duration::from_millis(10));
    }
    assert!(!world.replies.contains_key(&number));
    let writes = world.to_servers.iter().filter_map(|(to, _, message)| match &message.body {
        Body::Write(write) => Some((write.access.relay, *to)),
        _ => None,
    });
    (number, writes.collect())
}

#[test]
fn who_was_to_pass_it_on_and_does_not_is_passed_by_too() {
    let (mut world, session) = World::attached();
    let primary = world.hints.slots[world.slot(0) as usize].in_sync[0];
    let secondary = world.hints.slots[world.slot(0) as usize].in_sync[1];
    let (number, ways) = ways(&mut world, session, Duration::from_secs(3));
    assert_eq!(ways[0], (None, primary), "first to the one that is to answer");
    assert_eq!(ways[1], (Some(primary), secondary), "then by way of the other replica");
    let others = usize::from(SERVERS) - 1;
    let carriers: BTreeSet<ServerId> = ways[1..=others].iter().map(|(_, via)| *via).collect();
    assert_eq!(carriers.len(), others, "then by way of each of the others: {ways:?}");
    assert!(ways[1..=others].iter().all(|(answers, _)| *answers == Some(primary)));
    assert_eq!(ways[others + 1], (None, primary), "and when all of them have tried, to itself again");
    assert!(ways.len() <= 3 + 3000 / 300, "a message only now and then: {}", ways.len());
    // Now everybody answers; what they got in between is done once.
    assert_eq!(world.wait(number), Ok(Response::Done));
    assert_eq!(world.read(session, 0, 5), b"hello");
}

#[test]
fn without_a_connection_those_that_tried_try_again() {
    let (mut world, session) = World::attached();
    let primary = world.hints.slots[world.slot(0) as usize].in_sync[0];
    world.disconnect(primary);
    let (number, ways) = ways(&mut world, session, Duration::from_secs(4));
    let all: BTreeSet<ServerId> = (1..=SERVERS).map(ServerId).filter(|s| *s != primary).collect();
    for round in ways.chunks_exact(all.len()) {
        assert_eq!(round.iter().map(|(_, via)| *via).collect::<BTreeSet<_>>(), all, "{ways:?}");
    }
    assert!(ways.len() >= 3 * all.len(), "it does not end: {ways:?}");
    world.connect(primary);
    assert_eq!(world.wait(number), Ok(Response::Done));
}

#[test]
fn an_answer_to_an_attempt_that_was_given_up_counts() {
    let (mut world, session) = World::attached();
    let (number, ways) = ways(&mut world, session, Duration::from_secs(1));
    assert!(ways.len() > 1);
    let (server, connection, first) = world.to_servers.pop_front().unwrap();
    let later = std::mem::take(&mut world.to_servers);
    world.serve(server, connection, first);
    world.settle();
    assert_eq!(world.replies.remove(&number), Some(Ok(Response::Done)));
    // Answers to the others mean nothing any more, also not for whatever asks next.
    let next = world.ask(Request::Write { session, offset: 0, data: Bytes::from_static(b"other") });
    let own = std::mem::replace(&mut world.to_servers, later);
    world.settle();
    assert!(!world.replies.contains_key(&next));
    world.to_servers = own;
    assert_eq!(world.wait(next), Ok(Response::Done));
    assert_eq!(world.read(session, 0, 5), b"other");
}
