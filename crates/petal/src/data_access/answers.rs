//! How requests are refused.

use super::*;

/// How a message is refused.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Answer {
    Read(Refusal),
    Write(Refusal),
    Map(Refusal),
}

impl Answer {
    /// What a client's message is answered that cannot be carried out now; `None` if it is none.
    pub fn not_ready(body: &Body) -> Option<(Access, Answer)> {
        Some(match body {
            Body::Read(m) => (m.access, Answer::Read(Refusal::NotReady)),
            Body::Write(m) => (m.access, Answer::Write(Refusal::NotReady)),
            Body::Zero(m) => (m.access, Answer::Write(Refusal::NotReady)),
            Body::Map(m) => (m.access, Answer::Map(Refusal::NotReady)),
            _ => return None,
        })
    }
}

impl DataAccess {
    /// A request that is not even looked at: the client comes again.
    pub fn refuse_unseen(&mut self, ctx: &mut Context, client: ClientId, body: &Body) {
        if let Some((access, answer)) = Answer::not_ready(body) {
            self.answer_refused(ctx, client, access, answer);
        }
    }

    /// A request is answered with a refusal.
    pub(crate) fn answer_refused(&mut self, ctx: &mut Context, client: ClientId, access: Access, answer: Answer) {
        self.counters.refused += 1;
        let (tag, need) = (access.tag, access.need);
        let body = match answer {
            Answer::Read(r) => Body::ReadReply(ReadReply { tag, need, result: Err(r), data: Payload::default() }),
            Answer::Write(r) => Body::WriteReply(WriteReply { tag, need, result: Err(r) }),
            Answer::Map(r) => Body::MapReply(MapReply { tag, result: Err(r) }),
        };
        ctx.reply(client, body);
    }
}
