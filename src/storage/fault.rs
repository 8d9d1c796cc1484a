//! A storage that fails when it is told to, for tests of what is left behind by a failure at any point.
//!
//! A fault test counts a workload's operations once, and then runs it again for every number below, with that
//! operation failing:
//!
//! ```
//! # use std::sync::Arc;
//! # use seethrough::error::ErrorKind;
//! # use seethrough::storage::{Fault, FaultStorage, MemoryStorage, Storage};
//! # use seethrough::sys::{block_on, IoBuf};
//! # use seethrough::units::HostOffset;
//! # async fn workload(storage: &dyn Storage) -> seethrough::error::Result<()> {
//! #     storage.writev(HostOffset(0), IoBuf::from_bytes(b"data")).await?;
//! #     storage.flush().await
//! # }
//! let storage = FaultStorage::new(Arc::new(MemoryStorage::default()));
//! block_on(workload(&storage)).unwrap();
//! for nth in 0..storage.operations() {
//!     let storage = FaultStorage::new(Arc::new(MemoryStorage::default()));
//!     storage.inject(Fault::nth(nth, ErrorKind::Io));
//!     assert!(block_on(workload(&storage)).is_err());
//! }
//! ```

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::seeded::Delays;
use super::{IoFuture, Storage, ZeroMode};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::IoBuf;
use crate::units::HostOffset;

/// What an operation of a storage is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "named as the methods of Storage")]
pub enum Operation {
    Read,
    Write,
    Flush,
    Discard,
    WriteZeroes,
    SetLen,
}

/// Which operations fail, and how.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    nth: u64,
    only: Option<Operation>,
    kind: ErrorKind,
    lasts: Lasts,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lasts {
    Once,
    Forever,
}

impl Fault {
    /// The operation before which `nth` others have begun since the fault was injected fails with `kind`.
    #[must_use]
    pub fn nth(nth: u64, kind: ErrorKind) -> Self {
        Self {
            nth,
            only: None,
            kind,
            lasts: Lasts::Once,
        }
    }

    /// Counts and fails operations of this sort alone.
    #[must_use]
    pub fn only(self, operation: Operation) -> Self {
        Self {
            only: Some(operation),
            ..self
        }
    }

    /// Fails all later ones as well.
    #[must_use]
    pub fn forever(self) -> Self {
        Self {
            lasts: Lasts::Forever,
            ..self
        }
    }
}

/// Another storage, some of whose operations fail without having had any effect.
pub struct FaultStorage {
    inner: Arc<dyn Storage>,
    delays: Delays,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    operations: u64,
    faults: Vec<Fault>,
}

impl FaultStorage {
    /// `inner`, without a fault so far.
    #[must_use]
    pub fn new(inner: Arc<dyn Storage>) -> Self {
        Self::with_delays(inner, Delays::none())
    }

    /// `inner`, whose operations overtake each other as `delays` say.
    #[must_use]
    pub fn with_delays(inner: Arc<dyn Storage>, delays: Delays) -> Self {
        Self {
            inner,
            delays,
            state: Mutex::default(),
        }
    }

    /// Adds a fault; several are looked at in the order in which they were injected.
    pub fn inject(&self, fault: Fault) {
        self.state().faults.push(fault);
    }

    /// Takes all faults away.
    pub fn heal(&self) {
        self.state().faults.clear();
    }

    /// How many operations have begun, failed ones included.
    #[must_use]
    pub fn operations(&self) -> u64 {
        self.state().operations
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts an operation; fails if it is to.
    fn begin(&self, operation: Operation) -> Result<()> {
        let mut state = self.state();
        let number = state.operations;
        state.operations += 1;
        let mut failure = None;
        state.faults.retain_mut(|fault| {
            if fault.only.is_some_and(|only| only != operation) {
                return true;
            }
            if fault.nth > 0 {
                fault.nth -= 1;
                return true;
            }
            failure.get_or_insert(fault.kind);
            fault.lasts == Lasts::Forever
        });
        match failure {
            None => Ok(()),
            Some(kind) => {
                let context = format!("injected fault: {operation:?}, operation {number}");
                Err(Error::new(kind, context))
            }
        }
    }

    /// `operation`, unless a fault hits it.
    fn run<'a>(
        &'a self,
        operation: Operation,
        make: impl FnOnce(&'a dyn Storage) -> IoFuture<'a> + 'a,
    ) -> IoFuture<'a> {
        IoFuture::boxed(async move {
            let begun = self.begin(operation);
            self.delays.pause().await;
            begun?;
            let outcome = make(&*self.inner).await;
            self.delays.pause().await;
            outcome
        })
    }
}

impl Storage for FaultStorage {
    fn readv(&self, at: HostOffset, buf: IoBuf) -> IoFuture<'_> {
        self.run(Operation::Read, move |inner| inner.readv(at, buf))
    }

    fn writev(&self, at: HostOffset, buf: IoBuf) -> IoFuture<'_> {
        self.run(Operation::Write, move |inner| inner.writev(at, buf))
    }

    fn flush(&self) -> IoFuture<'_> {
        self.run(Operation::Flush, |inner| inner.flush())
    }

    fn discard(&self, at: HostOffset, len: u64) -> IoFuture<'_> {
        self.run(Operation::Discard, move |inner| inner.discard(at, len))
    }

    fn write_zeroes(&self, at: HostOffset, len: u64, mode: ZeroMode) -> IoFuture<'_> {
        self.run(Operation::WriteZeroes, move |inner| {
            inner.write_zeroes(at, len, mode)
        })
    }

    fn set_len(&self, len: u64) -> IoFuture<'_> {
        self.run(Operation::SetLen, move |inner| inner.set_len(len))
    }

    fn len(&self) -> u64 {
        self.inner.len()
    }

    fn alignment(&self) -> u32 {
        self.inner.alignment()
    }

    fn name(&self) -> &str {
        self.inner.name()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::MemoryStorage;
    use crate::sys::{Reactor, block_on};

    fn write(storage: &FaultStorage) -> Result<()> {
        block_on(storage.writev(HostOffset(0), IoBuf::from_bytes(b"x")))
    }

    #[test]
    fn the_chosen_operation_fails_without_effect_and_others_pass() {
        let memory = Arc::new(MemoryStorage::default());
        let storage = FaultStorage::new(Arc::clone(&memory) as Arc<dyn Storage>);
        storage.inject(Fault::nth(1, ErrorKind::NoSpace).only(Operation::Write));
        block_on(storage.flush()).unwrap();
        write(&storage).unwrap();
        block_on(storage.set_len(0)).unwrap();
        assert_eq!(write(&storage).unwrap_err().kind(), ErrorKind::NoSpace);
        assert_eq!(memory.contents(), b"");
        write(&storage).unwrap();
        assert_eq!(storage.operations(), 5);
    }

    #[test]
    fn a_lasting_fault_lasts_until_it_is_healed() {
        let storage = FaultStorage::new(Arc::new(MemoryStorage::default()));
        storage.inject(Fault::nth(0, ErrorKind::Io).forever());
        for _ in 0..3 {
            write(&storage).unwrap_err();
        }
        storage.heal();
        write(&storage).unwrap();
    }

    #[test]
    fn delays_let_operations_overtake_each_other_the_same_way_for_the_same_seed() {
        let order_of = |seed| {
            let delays = Delays::up_to(5, seed);
            let inner = Arc::new(MemoryStorage::default());
            let storage = Arc::new(FaultStorage::with_delays(inner, delays));
            let ended = std::rc::Rc::new(std::cell::RefCell::new(Vec::new()));
            block_on(async {
                let reactor = Reactor::current().unwrap();
                let tasks: Vec<_> = (0..10)
                    .map(|i| {
                        let (storage, ended) = (Arc::clone(&storage), std::rc::Rc::clone(&ended));
                        reactor.spawn_local(async move {
                            storage.flush().await.unwrap();
                            ended.borrow_mut().push(i);
                        })
                    })
                    .collect();
                for task in tasks {
                    task.await;
                }
            });
            ended.take()
        };
        assert_eq!(order_of(1), order_of(1));
        assert_ne!(order_of(1), order_of(2));
    }
}
