//! Fetches, at the replica: another member reads blocks of an element here, to settle or to repair its own copy.

use crate::data_access::{Context, DataAccess, LoadWaiter, ReadOwner};
use crate::ids::*;
use crate::message::*;
use crate::promise::COPY_BLOCKS_MAX;
use crate::server::Peer;
use crate::store::{BlockSum, Loaded, ReadBlocks, ReadError};

/// A fetch being answered.
pub(crate) struct FetchJob {
    to: ServerId,
    request: Fetch,
}

impl DataAccess {
    /// The primary reads an element here, or another member repairs its own copy of one (`repair.rs`). Answered with
    /// what is there, never bounced.
    pub fn on_fetch(&mut self, ctx: &mut Context, from: ServerId, m: Fetch) {
        let Some(&index) = self.by_id.get(&m.slot) else { return };
        let slot = &self.slots[index];
        let is_member = ctx.state.slot(slot.id).is_some_and(|s| s.member(from).is_some());
        if slot.promised != m.term || slot.term != m.term || !is_member {
            return;
        }
        let job = self.next_job;
        self.next_job += 1;
        self.fetches.insert(job, FetchJob { to: from, request: m });
        self.advance_fetch(ctx, job);
    }

    pub(crate) fn advance_fetch(&mut self, ctx: &mut Context, job: u64) {
        let Some(fetch) = self.fetches.get(&job) else { return };
        let element = fetch.request.element;
        match ctx.stores.load(element) {
            Loaded::Ready => {}
            Loaded::Pending => return self.wait_for_load(element, LoadWaiter::Fetch(job)),
            Loaded::Failed => return self.answer_fetch(ctx, job, Err(Refusal::BadCopy)),
        }
        let image = ctx.stores.image(element);
        let places = &fetch.request.places;
        if places.len() > COPY_BLOCKS_MAX {
            return self.answer_fetch(ctx, job, Err(Refusal::Malformed));
        }
        if !places.iter().all(|p| image.sum(*p).is_some_and(|sum| sum != BlockSum::Zero)) {
            return self.answer_fetch(ctx, job, Err(Refusal::BadCopy)); // Not here, or not any more.
        }
        let read = ctx.stores.read_places(element, places);
        self.reads.insert(read, ReadOwner::Fetch(job));
    }

    pub(crate) fn on_fetch_read(&mut self, ctx: &mut Context, job: u64, result: Result<ReadBlocks, ReadError>) {
        if result.is_err()
            && let Some(fetch) = self.fetches.get(&job)
            && let Some(&index) = self.by_id.get(&fetch.request.slot)
        {
            let element = fetch.request.element;
            self.begin_repair(ctx, index, element);
        }
        self.answer_fetch(ctx, job, result.map_err(|_| Refusal::BadCopy));
    }

    fn answer_fetch(&mut self, ctx: &mut Context, job: u64, result: Result<ReadBlocks, Refusal>) {
        let FetchJob { to, request } = self.fetches.remove(&job).expect("an answered fetch exists");
        let (result, data) = match result {
            Ok(read) => (Ok(()), Payload(read.data)),
            Err(refusal) => (Err(refusal), Payload::default()),
        };
        let fetched = Fetched { slot: request.slot, term: request.term, element: request.element, result, data };
        ctx.send(Peer::Server(to), Body::Fetched(fetched));
    }
}
