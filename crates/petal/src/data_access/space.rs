//! The room on this server's disks, and who may have how much of it (`window.rs` keeps the books with one peer).

use super::window::{Offer, Space, WINDOW_MIN, Window};
use super::*;
use stdx::Duration;

/// A write that found no room waits so long for what is on its way to somebody who is full.
const PATIENCE: Duration = Duration::from_secs(5);

impl DataAccess {
    /// Nearly full: only overwrites are taken.
    pub fn is_full(&self) -> bool {
        self.is_full
    }

    /// What a primary's write, which came at `since`, finds here.
    pub(super) fn space(&self, ctx: &Context, since: Instant) -> Space {
        Space {
            free: ctx.stores.free_blocks(),
            growth: ctx.stores.growth(),
            is_full: self.is_full,
            may_free: self.may_free(ctx),
            is_late: ctx.now.since(since) >= PATIENCE,
        }
    }

    /// Full when writes of new blocks have nearly nothing left that they may take, and no more when there is a fair part.
    /// What is reserved for somebody who cannot be asked, or does not answer, cannot be taken.
    fn review_space(&mut self, ctx: &Context) {
        let is_away = |s: &ServerId, w: &Window| !self.connected.contains(s) || w.is_silent(ctx.now);
        let away = self.windows.iter().filter(|(s, w)| is_away(s, w));
        let kept: u64 = away.map(|(_, w)| w.reserved()).sum();
        let least = WINDOW_MIN * (self.windows.len() as u64 + 1);
        let margin = if self.is_full { ctx.stores.overwrite_reserve() / 4 } else { 0 };
        self.is_full = ctx.stores.growth() < kept + least + margin;
    }

    /// Changes that are not stable give back what they replace, and a little later those that are; peers that were
    /// asked give back what they do not use.
    fn may_free(&self, ctx: &Context) -> bool {
        let is_asked = |(s, w): (&ServerId, &Window)| self.connected.contains(s) && w.may_return(ctx.now);
        !self.tickets.is_empty() || ctx.stores.has_frees() || self.windows.iter().any(is_asked)
    }

    /// Blocks that are free beyond what is promised to others.
    pub(crate) fn unreserved(&self, ctx: &Context) -> u64 {
        ctx.stores.free_blocks().saturating_sub(self.reserved())
    }

    /// Blocks that are promised to others.
    pub(crate) fn reserved(&self) -> u64 {
        self.windows.values().map(Window::reserved).sum()
    }

    fn offer(&self, ctx: &Context) -> Offer {
        // Half of what may be taken, shared by the peers: the rest is for this server's own writes. And an eighth of all:
        // it has to be asked back when others need it. But if possible one write of each can always be under way.
        let peers = self.windows.len().max(1) as u64;
        let (free, growth, all) = (ctx.stores.free_blocks(), ctx.stores.growth(), ctx.stores.capacity_blocks());
        // What only overwrites may take is promised to nobody who may write something new.
        let (most, room) =
            if self.is_full { (growth + ctx.stores.overwrite_reserve(), free) } else { (growth, growth) };
        let fair = (most / (2 * peers)).min((all / (8 * peers)).max(CREDIT_BLOCKS_MIN));
        Offer {
            target: fair.max(WINDOW_MIN.min(most / (peers + 1))).min(CREDIT_BLOCKS_MAX),
            available: room.min(free).saturating_sub(self.reserved()),
            is_full: self.is_full,
            may_free: self.may_free(ctx),
        }
    }

    /// The window to tell a peer now.
    pub(crate) fn credit(&mut self, ctx: &Context, to: ServerId) -> Credit {
        let offer = self.offer(ctx);
        let window = self.windows.entry(to).or_default();
        window.credit(ctx.now, &offer.to(window))
    }

    /// Finds out who is to be told of its window without any other reason.
    pub(super) fn review_windows(&mut self, ctx: &Context) {
        self.review_space(ctx);
        let offer = self.offer(ctx);
        for (server, window) in self.windows.iter_mut().filter(|(s, _)| self.connected.contains(s)) {
            if window.is_due(&offer.to(window)) {
                self.window_due.insert(*server);
            }
        }
    }

    /// A receiver tells what it has room for.
    pub(crate) fn on_credit(&mut self, ctx: &mut Context, from: ServerId, credit: Credit) {
        let returned = self.windows.entry(from).or_default().on_credit(credit);
        if let Some(blocks) = returned {
            ctx.send(Peer::Server(from), Body::CreditReturned(CreditReturned { blocks }));
        }
    }

    /// A primary gives back what it does not use.
    pub fn on_credit_returned(&mut self, from: ServerId, m: CreditReturned) {
        self.windows.entry(from).or_default().on_returned(m.blocks);
    }
}
