//! Reads that are asked of two copies: when, how often, and what becomes of either attempt.

use super::*;

/// Reads until the client knows how long they take.
fn warmed_up() -> (World, SessionId) {
    let (mut world, session) = World::attached();
    world.write(session, 0, b"hello");
    for _ in 0..20 {
        world.read(session, 0, 4096);
    }
    (world, session)
}

#[test]
fn a_read_that_takes_long_is_asked_of_another_copy_and_the_first_answer_wins() {
    for first_wins in [false, true] {
        let (mut world, session) = warmed_up();
        let number = world.ask(Request::Read { session, offset: 0, length: 5 });
        world.sleep_quietly(Duration::from_millis(4));
        assert_eq!(world.to_servers.len(), 1, "not yet");
        world.sleep_quietly(Duration::from_millis(2));
        assert_eq!(world.to_servers.len(), 2);
        assert_ne!(world.to_servers[0].0, world.to_servers[1].0);
        let winner = world.to_servers.remove(usize::from(!first_wins)).unwrap();
        let loser = world.to_servers.pop_front().unwrap();
        world.serve(winner.0, winner.1, winner.2);
        assert_eq!(world.wait(number), Ok(Response::Data(vec![Bytes::from_static(b"hello")])));
        // The other answer finds nobody.
        world.serve(loser.0, loser.1, loser.2);
        world.settle();
        assert_eq!(world.client.unanswered(), 0);
    }
}

#[test]
fn of_two_attempts_one_may_be_refused_or_lost_and_the_other_is_waited_for() {
    for lost in 0..4 {
        let (mut world, session) = warmed_up();
        let number = world.ask(Request::Read { session, offset: 0, length: 5 });
        world.sleep_quietly(Duration::from_millis(6));
        let (server, connection, message) = world.to_servers.remove(lost % 2).unwrap();
        if lost < 2 {
            world.refuse = [*[Refusal::NotReady, Refusal::BadCopy].get(lost).unwrap()].into();
            world.serve(server, connection, message);
            let (from, _, message) = world.to_client.pop_front().unwrap();
            world.input(Input::Message { from, message });
        } else {
            world.disconnect(server);
        }
        let reads = world.to_servers.iter().filter(|m| matches!(m.2.body, Body::Read(_))).count();
        assert_eq!(reads, 1, "it is not asked a third time");
        assert_eq!(world.wait(number), Ok(Response::Data(vec![Bytes::from_static(b"hello")])));
    }
}

#[test]
fn only_a_small_share_of_reads_is_hedged() {
    let (mut world, session) = warmed_up();
    let (count, mut hedged) = (2000, 0);
    for _ in 0..count {
        let number = world.ask(Request::Read { session, offset: 0, length: 5 });
        // Everybody is slow.
        world.sleep_quietly(Duration::from_millis(100));
        hedged += world.to_servers.len() - 1;
        assert!(world.wait(number).is_ok());
    }
    assert!((16..=16 + 1 + count / 32).contains(&hedged), "{hedged} of {count}");
}
