//! Relays (2.6): a client that cannot reach a server has another one pass its messages on.
//!
//! ```text
//!  client --message, relay = P--> R --the same, a tag of its own--> P
//!  client <------answer---------- R <-----------answer------------- P
//! ```
//!
//! The one in the middle understands nothing of it: rights, needs and versions are between the client and P, to whom R
//! is one more client. A message is passed on once at most. What P does not answer because it is gone is answered
//! `NotReady`, so that nobody waits for R; a request that P carried out all the same is found there when it is tried
//! again (I6).
//!
//! Memory: `RELAYS_MAX` messages, each of an element at most, within the bound of a connection between servers.

use super::*;
use crate::data_access::Answer;
use crate::limits::RELAYS_MAX;
use crate::message::Tag;

/// Clients of this number and above are servers that pass on what they are told.
const CARRIERS: ClientId = 1 << 63;

/// The client that a server is which passes messages on.
pub(crate) fn client_of(server: ServerId) -> ClientId {
    CARRIERS | ClientId::from(server.0)
}

/// The server that passes on what this client is told.
pub(crate) fn carrier(client: ClientId) -> Option<ServerId> {
    let number = (client & CARRIERS != 0).then_some(client & !CARRIERS)?;
    Some(ServerId(number.try_into().expect("made from a server's number")))
}

/// Messages that were passed on and are not answered.
#[derive(Debug)]
pub(super) struct Relays {
    last: Tag,
    waiting: BTreeMap<Tag, Relay>,
}

impl Relays {
    /// No life of this server gives a tag that another one gave: who was asked by an earlier life may answer this one.
    pub fn new(incarnation: Incarnation) -> Relays {
        Relays { last: Tag::from(incarnation.count()) << 40, waiting: BTreeMap::new() }
    }

    fn new_tag(&mut self) -> Tag {
        self.last += 1;
        self.last
    }
}

#[derive(Debug)]
struct Relay {
    client: ClientId,
    to: ServerId,
    access: Access,
    refusal: Answer,
}

impl Server {
    /// What is left to be done here with a message about data: nothing, if it was for somebody else. What another
    /// server passes on comes from a client from here on.
    pub(super) fn pass_on(&mut self, from: Peer, mut body: Body) -> Option<(Peer, Body)> {
        match (from, Answer::not_ready(&body)) {
            (Peer::Client(client), Some((access, refusal))) => match access.relay {
                Some(to) if to != self.me => {
                    self.pass_to(to, client, access, refusal, body);
                    None
                }
                _ => Some((from, body)),
            },
            (Peer::Server(server), Some((access, _))) => {
                (access.relay == Some(self.me)).then(|| (Peer::Client(client_of(server)), body))
            }
            (Peer::Server(server), None) => {
                let tag = match &mut body {
                    Body::ReadReply(m) => &mut m.tag,
                    Body::WriteReply(m) => &mut m.tag,
                    Body::MapReply(m) => &mut m.tag,
                    _ => return Some((from, body)),
                };
                if let Some(relay) = self.relays.waiting.get(tag).filter(|r| r.to == server) {
                    let client = relay.client;
                    let own = std::mem::replace(tag, relay.access.tag);
                    self.relays.waiting.remove(&own);
                    self.with_data(|_, ctx| ctx.send(Peer::Client(client), body));
                }
                None
            }
            (Peer::Client(_), None) => Some((from, body)),
        }
    }

    fn pass_to(&mut self, to: ServerId, client: ClientId, access: Access, refusal: Answer, mut body: Body) {
        if !self.connected.contains_key(&to) {
            return self.with_data(|data, ctx| data.answer_refused(ctx, client, access, refusal));
        }
        // The oldest is the one that its client has most likely sent another way since.
        if self.relays.waiting.len() >= RELAYS_MAX
            && let Some((_, Relay { client, access, refusal, .. })) = self.relays.waiting.pop_first()
        {
            self.with_data(|data, ctx| data.answer_refused(ctx, client, access, refusal));
        }
        let tag = self.relays.new_tag();
        match &mut body {
            Body::Read(m) => m.access.tag = tag,
            Body::Write(m) => m.access.tag = tag,
            Body::Zero(m) => m.access.tag = tag,
            Body::Map(m) => m.access.tag = tag,
            _ => unreachable!("only these can be refused"),
        }
        self.relays.waiting.insert(tag, Relay { client, to, access, refusal });
        self.with_data(|data, ctx| {
            data.counters.relayed += 1;
            ctx.send(Peer::Server(to), body);
        });
    }

    /// A connection to a server is gone: it answers nothing that was passed on to it, and nobody waits for the
    /// answers to what it passed on.
    pub(super) fn end_relays(&mut self, server: ServerId) {
        let to = self.relays.waiting.extract_if(.., |_, relay| relay.to == server).map(|(_, relay)| relay);
        for Relay { client, access, refusal, .. } in to.collect::<Vec<_>>() {
            self.with_data(|data, ctx| data.answer_refused(ctx, client, access, refusal));
        }
        self.client_gone(client_of(server));
    }

    /// A client's connection is gone.
    pub(super) fn client_gone(&mut self, client: ClientId) {
        self.relays.waiting.retain(|_, relay| relay.client != client);
        self.deferred.retain(|d| d.from != Peer::Client(client));
        self.with_data(|data, ctx| data.on_client_gone(ctx, client));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn a_tag_of_an_earlier_life_is_nobodys() {
        let (mut earlier, mut later) = (Relays::new(Incarnation(6)), Relays::new(Incarnation(7)));
        let old: BTreeSet<Tag> = (0..100).map(|_| earlier.new_tag()).collect();
        assert!((0..100).all(|_| !old.contains(&later.new_tag())));
    }
}
