//! The room on this server's disks, and who may have how much of it (`window.rs` keeps the books with one peer).

use super::window::{Offer, Space, WINDOW_MIN, Window};
use super::*;

impl DataAccess {
    /// Nearly full: only overwrites are taken.
    pub fn is_full(&self) -> bool {
        self.is_full
    }

    /// What a primary's write finds here.
    pub(super) fn space(&self, ctx: &Context) -> Space {
        let takes = if self.is_full { Takes::Overwrites } else { Takes::Everything };
        Space { free: ctx.stores.free_blocks(), takes, may_free: self.may_free(ctx.now) }
    }

    /// Full when writes of new blocks have nothing left that they may take, and no more when there is a fair part. What
    /// is reserved for somebody who cannot be asked cannot be taken.
    fn review_space(&mut self, ctx: &Context) {
        let (growth, for_overwrites) = ctx.stores.growth();
        let away = self.windows.iter().filter(|(s, _)| !self.connected.contains(s));
        let kept: u64 = away.map(|(_, w)| w.reserved()).sum();
        let margin = if self.is_full { for_overwrites / 4 } else { 0 };
        self.is_full = growth <= kept + margin;
    }

    /// Changes that are not stable give back what they replace; peers that were asked give back what they do not use.
    fn may_free(&self, now: Instant) -> bool {
        !self.tickets.is_empty() || self.windows.iter().any(|(s, w)| self.connected.contains(s) && w.may_return(now))
    }

    /// Blocks that are free beyond what is promised to others.
    pub(crate) fn unreserved(&self, ctx: &Context) -> u64 {
        ctx.stores.free_blocks().saturating_sub(self.windows.values().map(Window::reserved).sum())
    }

    fn offer(&self, ctx: &Context) -> Offer {
        // Half of what is free, shared by the peers: the rest is for this server's own writes. And an eighth of all: it
        // has to be asked back when others need it. But if possible one write of each can always be under way.
        let peers = self.windows.len().max(1) as u64;
        let (free, all) = (ctx.stores.free_blocks(), ctx.stores.capacity_blocks());
        let fair = (free / (2 * peers)).min((all / (8 * peers)).max(CREDIT_BLOCKS_MIN));
        Offer {
            target: fair.max(WINDOW_MIN.min(free / (peers + 1))).min(CREDIT_BLOCKS_MAX),
            available: self.unreserved(ctx),
            is_full: self.is_full,
            may_free: self.may_free(ctx.now),
        }
    }

    /// The window to tell a peer now.
    pub(crate) fn credit(&mut self, ctx: &Context, to: ServerId) -> Credit {
        let mut offer = self.offer(ctx);
        let window = self.windows.entry(to).or_default();
        offer.available += window.reserved();
        window.credit(ctx.now, &offer)
    }

    /// Finds out who is to be told of its window without any other reason.
    pub(super) fn review_windows(&mut self, ctx: &Context) {
        self.review_space(ctx);
        let offer = self.offer(ctx);
        for (server, window) in self.windows.iter_mut().filter(|(s, _)| self.connected.contains(s)) {
            if window.is_due(&Offer { available: offer.available + window.reserved(), ..offer }) {
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
