//! Verification while the cluster runs: every block of this server's disks against its checksum.
//!
//! A part at a time: the caller goes on from where the last part ended. That the replicas hold the same
//! (I2) is compared by the caller, from the digests that each server tells; and that nothing is kept that belongs
//! to nobody (I8), from the books of the free maps. That two elements never share a block shows in their checksums,
//! unless both hold the same bytes there: an offline verification sees that too.

use super::*;

/// Elements in one part.
const PART: usize = 64;

/// A part being verified.
pub(super) struct Verification {
    client: ClientId,
    tag: Tag,
    scan: ReadId,
    reads: BTreeMap<ReadId, ElementKey>,
    loading: BTreeSet<ElementKey>,
    part: VerifyPart,
    is_scanned: bool,
    /// An element that was just being written was passed over.
    is_partial: bool,
}

impl Verification {
    pub(super) fn is_for(&self, client: ClientId) -> bool {
        self.client == client
    }
}

impl DataAccess {
    /// Verifies the next elements of this server after `after`.
    pub fn on_verify(&mut self, ctx: &mut Context, client: ClientId, tag: Tag, after: Option<ElementKey>) {
        // One at a time for each client: what it asked before it does not wait for any more.
        self.verifications.retain(|v| !v.is_for(client));
        let scan = ctx.stores.scan_all(after, PART);
        let part = VerifyPart::default();
        let job = Verification {
            client,
            tag,
            scan,
            reads: BTreeMap::new(),
            loading: BTreeSet::new(),
            part,
            is_scanned: false,
            is_partial: false,
        };
        self.verifications.push(job);
    }

    /// True if the scan was one of these.
    pub(super) fn on_verify_scanned(
        &mut self,
        ctx: &mut Context,
        scan: ReadId,
        elements: &Result<Vec<(ElementKey, Version)>, crate::store::DiskError>,
    ) -> bool {
        let Some(at) = self.verifications.iter().position(|v| v.scan == scan) else { return false };
        let job = &mut self.verifications[at];
        job.is_scanned = true;
        match elements {
            Err(error) => job.part.complaints.push(format!("the PMap cannot be read: {error}")),
            Ok(elements) => {
                if elements.len() >= PART {
                    job.part.next = elements.last().map(|(key, _)| *key);
                }
                job.loading = elements.iter().map(|(key, _)| *key).collect();
                for key in job.loading.clone() {
                    match ctx.stores.load(key) {
                        Loaded::Pending => self.wait_for_load(key, LoadWaiter::Verify),
                        _ => self.verify_element(ctx, key),
                    }
                }
            }
        }
        self.answer_verified(ctx);
        true
    }

    pub(super) fn verify_element(&mut self, ctx: &mut Context, key: ElementKey) {
        // Writes that are not durable yet cannot be read: those elements are for another time.
        let image = seen_image(ctx, key);
        let is_busy = self.slots.iter().any(|s| s.outstanding > 0) && image.version > self.lowest_watermark(ctx, key);
        for job in &mut self.verifications {
            if !job.loading.remove(&key) {
                continue;
            }
            if is_busy {
                job.is_partial = true;
                continue;
            }
            let blocks = ctx.stores.stored(key);
            for place in ctx.stores.counted_free(key, &blocks) {
                job.part.complaints.push(format!("block {place:?} of element {key:?} counts as free"));
            }
            job.part.elements += 1;
            job.part.digests.push((key, digest(&image)));
            job.part.blocks += blocks.len() as u64;
            let read = ctx.stores.read_places(key, &blocks);
            job.reads.insert(read, key);
        }
        self.answer_verified(ctx);
    }

    fn lowest_watermark(&self, ctx: &Context, key: ElementKey) -> Version {
        let slot = ctx.state.slot_of(key.family, key.element).and_then(|id| self.by_id.get(&id));
        slot.map_or(Version::ZERO, |index| self.slots[*index].watermark)
    }

    /// True if the read was one of these.
    pub(super) fn on_verify_read(
        &mut self,
        ctx: &mut Context,
        read: ReadId,
        result: &Result<ReadBlocks, ReadError>,
    ) -> bool {
        let Some(job) = self.verifications.iter_mut().find(|v| v.reads.contains_key(&read)) else { return false };
        let key = job.reads.remove(&read).expect("just found");
        if let Err(error) = result {
            let ElementKey { family, element } = key;
            let disk = ctx.stores.home(key).map_or("", |disk| ctx.stores.path(disk));
            job.part.complaints.push(format!(
                "element {element} of {family} on {disk}: {error}; `petal scrub` puts it right from another copy"
            ));
        }
        self.answer_verified(ctx);
        true
    }

    fn answer_verified(&mut self, ctx: &mut Context) {
        let scanned = |v: &Verification| v.reads.is_empty() && v.loading.is_empty() && v.is_scanned;
        let (done, rest): (Vec<_>, Vec<_>) = std::mem::take(&mut self.verifications).into_iter().partition(scanned);
        self.verifications = rest;
        for mut job in done {
            job.part.books = (!job.is_partial).then(|| ctx.stores.books());
            let result = Ok(AdminResponse::Verified(job.part));
            ctx.reply(job.client, Body::AdminReply(AdminReply { tag: job.tag, result }));
        }
    }
}

/// What a server whose stores are open, and do not work, holds of a loaded element: version and digest, as an online
/// verification tells them. `state` says which rows anybody sees.
pub fn told_of(state: &State, stores: &Stores, element: ElementKey) -> (Version, u32) {
    let mut image = stores.image(element);
    keep_seen(state, element.family, &mut image);
    (image.version, digest(&image))
}

fn digest(image: &ElementImage) -> u32 {
    crc32c(&postcard::to_stdvec(image).expect("an image can be written to memory"))
}
