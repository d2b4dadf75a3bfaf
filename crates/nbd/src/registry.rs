//! Opened exports, shared by the connections that named them.
//!
//! Why: several connections to one export (multi-conn) must be one user of the disk, so that a flush
//! on one covers what was answered on another, and so that the disk is attached once.
//!
//! ```text
//!   (none) ──first lease()──> opening ──> open ──last release()──> closing ──> (none)
//!                                │ fails: (none)                      └── lease(): waits, opens again
//! ```
//!
//! The state's mutex is held while the export is opened or closed, so that these take turns.

use crate::export::{Export, Exports, OpenError};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use tokio::sync::Mutex;

struct Entry<E> {
    name: String,
    /// Leases, and those who wait for one.
    users: Cell<usize>,
    export: Mutex<Option<Rc<E>>>,
}

type Entries<E> = RefCell<BTreeMap<String, Rc<Entry<E>>>>;

/// The opened exports of a server.
pub(crate) struct Registry<X: Exports> {
    exports: X,
    entries: Rc<Entries<X::Export>>,
}

/// A connection's share of an opened export.
///
/// It ends with [`Lease::release`]. One that is dropped instead (its connection panicked, or its task
/// was dropped with the runtime) leaves the export open, for the next connection or
/// [`Registry::close_all`] to find.
pub(crate) struct Lease<E: Export> {
    entry: Rc<Entry<E>>,
    entries: Rc<Entries<E>>,
}

impl<X: Exports> Registry<X> {
    pub(crate) fn new(exports: X) -> Self {
        Registry { exports, entries: Rc::default() }
    }

    /// The exports themselves.
    pub(crate) fn exports(&self) -> &X {
        &self.exports
    }

    /// Opens an export, or joins those who have it open.
    pub(crate) async fn lease(&self, name: &str) -> Result<(Rc<X::Export>, Lease<X::Export>), OpenError> {
        let entry = self
            .entries
            .borrow_mut()
            .entry(name.to_owned())
            .or_insert_with(|| Rc::new(Entry { name: name.to_owned(), users: Cell::new(0), export: Mutex::new(None) }))
            .clone();
        entry.users.set(entry.users.get() + 1);
        let lease = Lease { entry: entry.clone(), entries: self.entries.clone() };
        let mut export = entry.export.lock().await;
        if let Some(open) = &*export {
            return Ok((open.clone(), lease));
        }
        let open = Rc::new(self.exports.open(name).await?);
        *export = Some(open.clone());
        drop(export);
        Ok((open, lease))
    }

    /// Closes what was left open by leases that were dropped.
    pub(crate) async fn close_all(&self) {
        let entries = std::mem::take(&mut *self.entries.borrow_mut());
        for entry in entries.into_values() {
            if let Some(export) = entry.export.lock().await.take() {
                export.close().await;
            }
        }
    }
}

impl<E: Export> Lease<E> {
    /// The name under which the export was opened.
    pub(crate) fn name(&self) -> &str {
        &self.entry.name
    }

    /// Gives the share back; the last one closes the export. The caller has dropped its `Rc`.
    pub(crate) async fn release(self) {
        let mut export = self.entry.export.lock().await;
        if self.entry.users.get() == 1
            && let Some(export) = export.take()
        {
            export.close().await;
        }
    }
}

impl<E: Export> Drop for Lease<E> {
    fn drop(&mut self) {
        let users = self.entry.users.get() - 1;
        self.entry.users.set(users);
        // Nobody waits, nothing is open: the entry says nothing any more.
        let closed = self.entry.export.try_lock().is_ok_and(|e| e.is_none());
        if users == 0 && closed {
            let mut entries = self.entries.borrow_mut();
            if entries.get(&self.entry.name).is_some_and(|e| Rc::ptr_eq(e, &self.entry)) {
                entries.remove(&self.entry.name);
            }
        }
    }
}
