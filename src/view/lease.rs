//! Who may write a shared region: one child at a time, and never one whose journal is older than what another has
//! written since.
//!
//! A child's journal is its own, but what it checkpoints or replays of a shared region goes to the base. A journal that
//! was not replayed before another child wrote the region would undo that. So the base keeps a *lease* for each shared
//! region that somebody writes: a nonce, drawn anew whenever a child is opened for writing, which the child's overlay
//! knows too. A lease is given back when the child is closed with its filesystem unmounted cleanly.
//!
//! | the base says | the child is opened for writing if |
//! |---|---|
//! | nobody holds the region | its filesystem was unmounted cleanly |
//! | nonce *n* | its overlay knows *n*: it is who held it last, and nobody has written since |
//!
//! A copy of an overlay knows the nonce of the time when it was copied. Whichever of the two is opened first draws a
//! new one, and the other is refused; so is a copy that was taken of a mounted filesystem, once the lease was given
//! back.
//!
//! # Invariants
//!
//! 1. Both images know the new nonce, durably, before the child's first write; the overlay first, beside the old one,
//!    so that a power cut in between leaves a child that knows whichever the base names.
//! 2. In one process a region has at most one [`Holding`]; across processes the base's lock sees to it.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::declaration::{BaseDeclaration, ChildDeclaration, Declaration, Lease};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::image::ImageFuture;

/// Keeps an open image's declaration where the image can be opened by it.
pub trait Keeper: Send + Sync {
    /// Stores `declaration`, durably, in place of the one there is.
    fn keep<'a>(&'a self, declaration: &'a Declaration) -> ImageFuture<'a>;
}

/// Whoever wants to write shared regions.
pub struct Claimant {
    /// What the child's overlay is called, for people to read.
    pub name: String,
    /// Keeps what the overlay declares.
    pub keeper: Arc<dyn Keeper>,
}

/// Whether a child's filesystem was unmounted cleanly, so that its journal has nothing to bring to its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unmounted {
    /// It was.
    Cleanly,
    /// It was not, or is mounted.
    Not,
}

/// The leases of one base.
pub(super) struct Leases {
    /// What the base declares, as it is stored now.
    declaration: async_lock::Mutex<BaseDeclaration>,
    /// Where that is; `None` for a base that is not kept anywhere.
    keeper: Option<Arc<dyn Keeper>>,
    /// The holders in this process, by region.
    holders: Mutex<HashMap<String, String>>,
}

/// The right to write some shared regions. Dropped, it leaves the leases as they are: they stand until the child is
/// opened again.
pub(super) struct Holding {
    leases: Arc<Leases>,
    regions: Vec<String>,
}

impl Leases {
    /// The leases that a base's `declaration` tells of, which `keeper` keeps.
    pub(super) fn new(declaration: BaseDeclaration, keeper: Option<Arc<dyn Keeper>>) -> Self {
        Self {
            declaration: async_lock::Mutex::new(declaration),
            keeper,
            holders: Mutex::default(),
        }
    }

    /// Gives `claimant` the shared regions of `child`.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] if somebody else holds one of them, or has written it since the child's filesystem was
    /// left as it is; what storing the declarations returns.
    pub(super) async fn claim(
        self: &Arc<Self>,
        child: &ChildDeclaration,
        unmounted: Unmounted,
        claimant: &Claimant,
    ) -> Result<Holding> {
        // One after the other.
        let mut stored = self.declaration.lock().await;
        let holding = self.hold(child, &claimant.name)?;
        let mut known = Vec::new();
        for region in &holding.regions {
            known.extend(check_lease(&stored, child, region, unmounted)?);
        }
        let nonce = fresh_id()?;
        let mut next = stored.clone();
        next.leases
            .retain(|lease| !holding.regions.contains(&lease.region));
        next.leases
            .extend(holding.regions.iter().map(|region| Lease {
                region: region.clone(),
                nonce: nonce.clone(),
                holder: claimant.name.clone(),
            }));
        known.sort_unstable();
        known.dedup();
        known.push(nonce);
        let child = ChildDeclaration {
            nonces: known,
            ..child.clone()
        };
        // Invariant 1.
        claimant.keeper.keep(&Declaration::Child(child)).await?;
        self.keep(&mut stored, next).await?;
        Ok(holding)
    }

    /// Enters the holder in this process (invariant 2).
    fn hold(self: &Arc<Self>, child: &ChildDeclaration, holder: &str) -> Result<Holding> {
        let regions: Vec<String> = child
            .shared_regions()
            .map(|region| region.name.clone())
            .collect();
        let mut holders = self.holders();
        for region in &regions {
            if let Some(other) = holders.get(region) {
                return Err(refused(format!(
                    "shared region \"{region}\" is being written by {other}, and has one writer at a time: serve the \
                     one or the other, or this one read-only"
                )));
            }
        }
        for region in &regions {
            holders.insert(region.clone(), holder.to_owned());
        }
        Ok(Holding {
            leases: Arc::clone(self),
            regions,
        })
    }

    async fn keep(&self, stored: &mut BaseDeclaration, next: BaseDeclaration) -> Result<()> {
        if let Some(keeper) = &self.keeper {
            keeper.keep(&Declaration::Base(next.clone())).await?;
        }
        *stored = next;
        Ok(())
    }

    fn holders(&self) -> MutexGuard<'_, HashMap<String, String>> {
        self.holders.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Holding {
    /// Ends the leases. The child's filesystem is unmounted cleanly, and what it wrote is durable.
    ///
    /// # Errors
    /// What storing the base's declaration returns.
    pub(super) async fn give_back(&self) -> Result<()> {
        let mut stored = self.leases.declaration.lock().await;
        let mut next = stored.clone();
        next.leases
            .retain(|lease| !self.regions.contains(&lease.region));
        if next == *stored {
            return Ok(());
        }
        self.leases.keep(&mut stored, next).await
    }
}

impl Drop for Holding {
    fn drop(&mut self) {
        let mut holders = self.leases.holders();
        for region in &self.regions {
            holders.remove(region);
        }
    }
}

/// The nonce that the child shares with the base, if the region is held.
fn check_lease(
    base: &BaseDeclaration,
    child: &ChildDeclaration,
    region: &str,
    unmounted: Unmounted,
) -> Result<Option<String>> {
    match base.lease(region) {
        None if unmounted == Unmounted::Cleanly => Ok(None),
        None => Err(refused(format!(
            "its filesystem was not unmounted cleanly, and shared region \"{region}\" has gone to others since: its \
             journal would undo what they wrote. This image is a copy of an older state, or the region was taken from \
             it: create the child anew"
        ))),
        Some(lease) if child.nonces.contains(&lease.nonce) => Ok(Some(lease.nonce.clone())),
        Some(lease) => Err(refused(held(lease))),
    }
}

/// Says who holds a region, and what to do.
pub(super) fn held(lease: &Lease) -> String {
    let Lease { region, holder, .. } = lease;
    let holder = holder.escape_debug();
    format!(
        "shared region \"{region}\" is held by {holder}, which was not closed with its filesystem unmounted: serve \
         {holder} once, mount and unmount there; or, if it is lost, take the region from it with `seethrough prepare \
         --evict {region}` and run e2fsck on the base"
    )
}

/// Refuses to rely on what lies in the shared regions of a base while somebody but `child` has not let go of one.
///
/// # Errors
/// [`ErrorKind::Refused`], naming the holder.
pub(super) fn check_settled(base: &BaseDeclaration, child: &ChildDeclaration) -> Result<()> {
    let other = |lease: &&Lease| !child.nonces.contains(&lease.nonce);
    match base.leases.iter().find(other) {
        Some(lease) => Err(refused(held(lease))),
        None => Ok(()),
    }
}

/// 32 random hexadecimal digits.
///
/// # Errors
/// The host's, if it has no random numbers.
pub fn fresh_id() -> Result<String> {
    let mut bytes = [0; 16];
    File::open("/dev/urandom")
        .and_then(|mut random| random.read_exact(&mut bytes))
        .context(|| "/dev/urandom")?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

fn refused(context: String) -> Error {
    Error::new(ErrorKind::Refused, context)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::block_on;
    use crate::view::declaration::{Extent, Region, Sharing};

    /// Keeps declarations in memory, as long as it may.
    #[derive(Default)]
    struct Memory {
        kept: Mutex<Option<Declaration>>,
        fails: Mutex<bool>,
    }

    impl Memory {
        fn child(&self) -> ChildDeclaration {
            match &*self.kept.lock().unwrap() {
                Some(Declaration::Child(child)) => child.clone(),
                other => panic!("{other:?}"),
            }
        }
    }

    impl Keeper for Memory {
        fn keep<'a>(&'a self, declaration: &'a Declaration) -> ImageFuture<'a> {
            let result = if *self.fails.lock().unwrap() {
                Err(Error::new(ErrorKind::Io, "power cut"))
            } else {
                *self.kept.lock().unwrap() = Some(declaration.clone());
                Ok(())
            };
            Box::pin(std::future::ready(result))
        }
    }

    struct Bed {
        base: Arc<Memory>,
        leases: Arc<Leases>,
    }

    fn base() -> BaseDeclaration {
        BaseDeclaration {
            id: "0".repeat(32),
            filesystem: None,
            regions: [("photos", 1), ("videos", 2)]
                .map(|(name, number)| Region {
                    name: name.into(),
                    sharing: Sharing::Shared,
                    extent: Extent::Partition {
                        number,
                        start: u64::from(number) * 512,
                        length: 512,
                    },
                })
                .into(),
            leases: Vec::new(),
        }
    }

    impl Bed {
        fn new() -> Self {
            let memory = Arc::new(Memory::default());
            let keeper = Some(Arc::clone(&memory) as Arc<dyn Keeper>);
            Self {
                base: memory,
                leases: Arc::new(Leases::new(base(), keeper)),
            }
        }

        /// As after the process was killed.
        fn reopened(&self) -> Self {
            let declaration = block_on(self.leases.declaration.lock()).clone();
            let keeper = Some(Arc::clone(&self.base) as Arc<dyn Keeper>);
            Self {
                base: Arc::clone(&self.base),
                leases: Arc::new(Leases::new(declaration, keeper)),
            }
        }

        fn claim(&self, name: &str, overlay: &Arc<Memory>, how: Unmounted) -> Result<Holding> {
            let claimant = Claimant {
                name: name.to_owned(),
                keeper: Arc::clone(overlay) as Arc<dyn Keeper>,
            };
            block_on(self.leases.claim(&overlay.child(), how, &claimant))
        }
    }

    fn overlay() -> Arc<Memory> {
        let child = ChildDeclaration {
            base: "0".repeat(32),
            regions: base().regions,
            nonces: Vec::new(),
            grown: None,
        };
        copy_of(child)
    }

    fn copy_of(child: ChildDeclaration) -> Arc<Memory> {
        let memory = Memory::default();
        *memory.kept.lock().unwrap() = Some(Declaration::Child(child));
        Arc::new(memory)
    }

    fn refusal(result: Result<Holding>) -> String {
        let error = result.err().expect("it is refused");
        assert_eq!(error.kind(), ErrorKind::Refused);
        error.to_string()
    }

    #[test]
    fn a_region_has_one_writer_in_a_process_until_that_lets_go() {
        let bed = Bed::new();
        let (tom, ann) = (overlay(), overlay());
        let holding = bed.claim("tom", &tom, Unmounted::Cleanly).unwrap();
        let error = refusal(bed.claim("ann", &ann, Unmounted::Cleanly));
        assert!(error.contains("written by tom"), "{error}");
        block_on(holding.give_back()).unwrap();
        drop(holding);
        bed.claim("ann", &ann, Unmounted::Cleanly).unwrap();
    }

    #[test]
    fn a_lease_that_was_not_given_back_is_its_holders_alone() {
        let bed = Bed::new();
        let (tom, ann) = (overlay(), overlay());
        drop(bed.claim("tom", &tom, Unmounted::Cleanly).unwrap());
        let bed = bed.reopened();
        let error = refusal(bed.claim("ann", &ann, Unmounted::Cleanly));
        assert!(
            error.contains("held by tom") && error.contains("--evict photos"),
            "{error}"
        );
        let holding = bed.claim("tom", &tom, Unmounted::Not).unwrap();
        block_on(holding.give_back()).unwrap();
        drop(holding);
        let bed = bed.reopened();
        bed.claim("ann", &ann, Unmounted::Cleanly).unwrap();
    }

    #[test]
    fn a_copy_is_refused_once_the_other_was_opened() {
        let bed = Bed::new();
        let tom = overlay();
        drop(bed.claim("tom", &tom, Unmounted::Cleanly).unwrap());
        let copy = copy_of(tom.child());
        drop(bed.claim("tom", &tom, Unmounted::Not).unwrap());
        refusal(bed.claim("copy", &copy, Unmounted::Not));
        refusal(bed.claim("copy", &copy, Unmounted::Cleanly));
        let holding = bed.claim("tom", &tom, Unmounted::Not).unwrap();
        block_on(holding.give_back()).unwrap();
        drop(holding);
        let error = refusal(bed.claim("copy", &copy, Unmounted::Not));
        assert!(error.contains("undo"), "{error}");
    }

    #[test]
    fn an_overlay_knows_two_nonces_at_most_however_often_it_is_opened() {
        let bed = Bed::new();
        let tom = overlay();
        for _ in 0..4 {
            drop(bed.claim("tom", &tom, Unmounted::Cleanly).unwrap());
        }
        assert_eq!(tom.child().nonces.len(), 2);
    }

    #[test]
    fn what_others_have_not_let_go_of_is_not_settled_and_what_one_holds_oneself_is() {
        let bed = Bed::new();
        let (tom, ann) = (overlay(), overlay());
        let holding = bed.claim("tom", &tom, Unmounted::Cleanly).unwrap();
        let declared = || block_on(bed.leases.declaration.lock()).clone();
        check_settled(&declared(), &tom.child()).unwrap();
        let error = check_settled(&declared(), &ann.child()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Refused);
        assert!(error.to_string().contains("held by tom"), "{error}");
        block_on(holding.give_back()).unwrap();
        check_settled(&declared(), &ann.child()).unwrap();
    }

    #[test]
    fn a_power_cut_between_the_two_images_locks_nobody_out() {
        for held_before in [false, true] {
            let bed = Bed::new();
            let tom = overlay();
            if held_before {
                drop(bed.claim("tom", &tom, Unmounted::Cleanly).unwrap());
            }
            let unmounted = if held_before {
                Unmounted::Not
            } else {
                Unmounted::Cleanly
            };
            *bed.base.fails.lock().unwrap() = true;
            assert!(bed.claim("tom", &tom, unmounted).is_err());
            *bed.base.fails.lock().unwrap() = false;
            let bed = bed.reopened();
            drop(bed.claim("tom", &tom, unmounted).unwrap());
            *tom.fails.lock().unwrap() = true;
            assert!(bed.claim("tom", &tom, Unmounted::Not).is_err());
            *tom.fails.lock().unwrap() = false;
            bed.claim("tom", &tom, Unmounted::Not).unwrap();
        }
    }
}
