//! Dropping the elements of families that ended (a deleted disk's space comes back in the background), and of slots
//! whose member this server is no more (`leaving.rs`).
//!
//! What is to be dropped is decided by the state alone: a family whose id is at or below the applied
//! index, and that the state does not have; a slot whose tuple does not name this server. Never what the state has not
//! heard of yet. So nothing must be remembered across a restart: the next life looks again.

use super::*;

/// Elements asked for at a time: small steps, so that clients hardly notice.
const STEP: usize = 64;

/// Where the sweep is.
#[derive(Debug, Default)]
pub struct Sweep {
    /// Something may be there to sweep.
    wanted: bool,
    scan: Option<ReadId>,
    /// Continue after this element.
    after: Option<ElementKey>,
    /// Elements of the present step that are not dropped yet.
    waiting: usize,
}

impl Sweep {
    pub(super) fn owns(&self, scan: ReadId) -> bool {
        self.scan == Some(scan)
    }
}

impl DataAccess {
    /// Some family ended, or the server has started: look through everything once.
    pub fn want_sweep(&mut self) {
        self.sweep.wanted = true;
    }

    pub(super) fn advance_sweep(&mut self, ctx: &mut Context) {
        let sweep = &mut self.sweep;
        if sweep.scan.is_some() || sweep.waiting > 0 {
            return;
        }
        if sweep.after.is_none() && !std::mem::take(&mut sweep.wanted) {
            return;
        }
        sweep.scan = Some(ctx.stores.scan_all(sweep.after, STEP));
    }

    pub(super) fn on_sweep_scanned(
        &mut self,
        ctx: &mut Context,
        elements: Result<Vec<(ElementKey, Version)>, crate::store::DiskError>,
    ) {
        self.sweep.scan = None;
        let Ok(elements) = elements else {
            self.sweep.after = None;
            return;
        };
        let mut last = None;
        for (key, _) in elements {
            last = Some(key);
            if !self.is_to_go(ctx.state, key) && self.may_have_left(ctx.state, key.family) {
                continue; // Of a slot that is this server's.
            }
            if !self.is_to_go(ctx.state, key) {
                // The rest of a living family is of no interest: go on with the next family.
                last = Some(ElementKey { family: key.family, element: u64::MAX });
                break;
            }
            self.sweep.waiting += 1;
            match ctx.stores.load(key) {
                Loaded::Pending => self.wait_for_load(key, LoadWaiter::Drop),
                _ => self.drop_element(ctx, key),
            }
        }
        self.sweep.after = last;
    }

    pub(super) fn drop_element(&mut self, ctx: &mut Context, element: ElementKey) {
        self.sweep.waiting -= 1;
        if self.is_to_go(ctx.state, element) && ctx.stores.load(element) == Loaded::Ready {
            // A failed stage leaves the element for the next sweep.
            let _ = ctx.stores.stage(Change::Drop { element });
        }
    }
}
