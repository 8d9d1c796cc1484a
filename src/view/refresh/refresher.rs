//! Moving one child's view from pin to pin, and never under a mounted filesystem.
//!
//! # Invariants
//!
//! 1. Whoever writes the child's superblock says so before it looks at the base ([`Refresher::begin_superblock`]), and
//!    says what became of it after. A view is moved with nobody looking at the base, and only if nobody has said so: a
//!    filesystem that is marked as mounted after that has been read through the new pin as a whole.
//! 2. The overlay names a pin from before it is shown until after another one is.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use super::pace::Pace;
use super::pin::{Pin, Pinnable};
use super::pin_name::PinName;
use super::policy::Policy;
use super::window::Window;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::ext4::superblock::Superblock;
use crate::image::Image;
use crate::jobs::convert::as_qcow2;
use crate::qcow2::header_extension::PIN_EXTENSION;
use crate::sys::block_on;
use crate::view::compose::superblock_in;

/// What a refresh has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moved {
    /// The child sees its base as it is now.
    ToNow,
    /// It did already: nothing has been written to the base since.
    Nowhere,
}

/// Whether a child's filesystem is cleanly unmounted, as far as its own superblock says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::view) enum Mounted {
    /// It may be mounted, or was not unmounted cleanly.
    Perhaps,
    /// It is not, or only for reading.
    No,
}

impl Mounted {
    /// What the superblock in its block says. One that makes no sense may have been written by whoever has it mounted.
    pub(in crate::view) fn as_told_by(block: &[u8]) -> Self {
        let superblock = superblock_in(block).and_then(|bytes| Superblock::parse(&bytes));
        match superblock {
            Ok(superblock) if superblock.is_clean() => Self::No,
            _ => Self::Perhaps,
        }
    }
}

/// Moves the view of one child.
pub struct Refresher {
    vm: String,
    policy: Policy,
    base: Pinnable,
    overlay: Arc<dyn Image>,
    window: Arc<Window>,
    mounted: AtomicBool,
    /// The pin that the overlay names. Locked while the view is being moved.
    current: async_lock::Mutex<Option<PinName>>,
    /// What a new child is told from others by.
    identifier: String,
    /// Locked by whoever moves the view because the guest reads its superblock.
    pace: Arc<async_lock::Mutex<Pace>>,
}

impl Refresher {
    /// What moves the view of `vm`, whose overlay names `recorded`.
    pub(super) fn new(
        vm: &str,
        policy: Policy,
        base: Pinnable,
        overlay: Arc<dyn Image>,
        recorded: Option<PinName>,
        identifier: String,
    ) -> Self {
        Self {
            vm: vm.to_owned(),
            policy,
            window: Arc::new(Window::new(base.image())),
            base,
            overlay,
            mounted: AtomicBool::new(true),
            current: async_lock::Mutex::new(recorded),
            identifier,
            pace: Arc::default(),
        }
    }

    /// What the child's view is to read as the base.
    pub(in crate::view) fn window(&self) -> &Arc<Window> {
        &self.window
    }

    /// A front-end is about to come: shows it the base. A filesystem that is mounted goes on with the pin that it had.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] if that is gone; and as [`Pinnable::take`].
    pub(in crate::view) async fn begin(&self, mounted: Mounted) -> Result<()> {
        let mut current = self.current.lock().await;
        if self.is_shown().await {
            return Ok(());
        }
        self.end_superblock(mounted);
        let recorded = current.clone();
        let known = match &recorded {
            Some(name) => self.open_recorded(name, mounted).await?,
            None => None,
        };
        let (name, pin) = match (recorded, known) {
            (Some(name), Some(pin)) => (name, pin),
            (recorded, _) => {
                let name = recorded.map_or_else(
                    || PinName::first(self.identifier.clone()),
                    |name| name.next(),
                );
                (name.clone(), self.take_recorded(&name).await?)
            }
        };
        self.base.delete_others(&name).await?;
        *current = Some(name);
        self.window.pin.exchange().await.put(Some(pin));
        Ok(())
    }

    /// The pin that the overlay names, unless it is gone, or there is no need to go on with it.
    async fn open_recorded(&self, name: &PinName, mounted: Mounted) -> Result<Option<Pin>> {
        let pin = match self.base.open(name).await {
            Ok(pin) => pin,
            Err(_) if mounted == Mounted::No => return Ok(None),
            Err(error) if error.kind() == ErrorKind::OutOfBounds => {
                return Err(Error::with_source(
                    ErrorKind::Refused,
                    "the child's filesystem is mounted, or was not unmounted, and the snapshot of the base that it was \
                     reading has been deleted: serve it with refresh=live",
                    error,
                ));
            }
            Err(error) => return Err(error),
        };
        let is_old = self.policy == Policy::OnMount
            && mounted == Mounted::No
            && !self.base.is_unchanged_since(&pin).await?;
        Ok((!is_old).then_some(pin))
    }

    /// Takes a pin, and has the overlay name it (invariant 2 of [`super`]).
    async fn take_recorded(&self, name: &PinName) -> Result<Pin> {
        let pin = self.base.take(name).await?;
        if let Err(error) = self.record(Some(name)).await {
            pin.end().await;
            self.base.delete(name).await;
            return Err(error);
        }
        Ok(pin)
    }

    /// The front-end has left, and its guest's last writes are durable. A pin that is read no more is not kept: the
    /// base's VM would pay for it.
    ///
    /// # Errors
    /// What writing the overlay's header returns.
    pub(in crate::view) async fn end(&self) -> Result<()> {
        let mut current = self.current.lock().await;
        if self.policy != Policy::OnMount || self.may_be_mounted() {
            return Ok(());
        }
        let Some(name) = current.take() else {
            return Ok(());
        };
        if let Err(error) = self.record(None).await {
            *current = Some(name);
            return Err(error);
        }
        self.show(None).await;
        self.base.delete(&name).await;
        Ok(())
    }

    /// The guest is about to read its superblock: with the policy for that, moves the view before. What fails leaves
    /// the view where it is.
    pub(in crate::view) async fn before_superblock_read(self: &Arc<Self>) {
        if !self.is_to_move().await {
            return;
        }
        let pace = self.pace.lock_arc().await;
        // Another request may have moved it.
        if !self.is_to_move().await {
            return;
        }
        // A request may be dropped in the middle of anything; this must not be.
        let refresher = Arc::clone(self);
        let thread = std::thread::Builder::new().name(format!("refresh {}", self.vm));
        let spawned = thread.spawn(move || refresher.move_in_time(pace));
        if let Err(error) = spawned {
            log::error!(
                "vm {}: it goes on seeing its base as before: no thread can be started: {error}",
                self.vm
            );
        }
        // The thread has it until the view has moved.
        drop(self.pace.lock().await);
    }

    async fn is_to_move(&self) -> bool {
        self.policy == Policy::OnMount && !self.may_be_mounted() && !self.is_up_to_date().await
    }

    /// Moves the view, when it is time.
    fn move_in_time(&self, mut pace: async_lock::MutexGuardArc<Pace>) {
        std::thread::sleep(pace.time_left(Instant::now()));
        let began = Instant::now();
        if let Err(error) = block_on(self.refresh()) {
            log::error!(
                "vm {}: it goes on seeing its base as before: {error}",
                self.vm
            );
        }
        pace.ended(began, Instant::now());
    }

    /// As [`Refresher::refresh`], for a child that may have no front-end, whose filesystem is `mounted` then. One that
    /// moves when it mounts has nothing to move before a front-end comes.
    pub(super) async fn refresh_by_command(&self, mounted: Mounted) -> Result<Moved> {
        if self.policy == Policy::OnMount && !self.is_shown().await {
            return Ok(Moved::Nowhere);
        }
        self.begin(mounted).await?;
        self.refresh().await
    }

    /// Moves the view to the present moment. Must not be dropped before its end.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] if the child's filesystem is mounted, or no front-end is there; and as
    /// [`Pinnable::take`]. The view stays where it is then.
    pub async fn refresh(&self) -> Result<Moved> {
        let mut current = self.current.lock().await;
        let Some(name) = current.clone() else {
            // The front-end has just left.
            return Ok(Moved::Nowhere);
        };
        if self.may_be_mounted() {
            return Err(self.refused(
                "its filesystem is mounted, or was not unmounted cleanly: unmount it, then refresh",
            ));
        }
        if self.is_up_to_date().await {
            return Ok(Moved::Nowhere);
        }
        let next = name.next();
        let pin = self.take_recorded(&next).await?;
        let mut exchange = self.window.pin.exchange().await;
        // Invariant 1.
        if self.may_be_mounted() {
            drop(exchange);
            self.record(Some(&name)).await?;
            pin.end().await;
            self.base.delete(&next).await;
            return Err(self.refused("its filesystem was mounted meanwhile"));
        }
        let old = exchange.take().flatten();
        exchange.put(Some(pin));
        drop(exchange);
        *current = Some(next);
        if let Some(old) = old {
            old.end().await;
        }
        self.base.delete(&name).await;
        log::info!("vm {}: it sees its base as it is now", self.vm);
        Ok(Moved::ToNow)
    }

    /// The guest writes its superblock, and has not looked at the base for that yet.
    pub(in crate::view) fn begin_superblock(&self) {
        self.mounted.store(true, Ordering::SeqCst);
    }

    /// The guest has written its superblock, which now says this.
    pub(in crate::view) fn end_superblock(&self, mounted: Mounted) {
        self.mounted
            .store(mounted == Mounted::Perhaps, Ordering::SeqCst);
    }

    fn may_be_mounted(&self) -> bool {
        self.mounted.load(Ordering::SeqCst)
    }

    async fn is_shown(&self) -> bool {
        let using = self.window.pin.use_now().await;
        using.is_some_and(|pin| pin.is_some())
    }

    async fn is_up_to_date(&self) -> bool {
        let using = self.window.pin.use_now().await;
        match using.as_deref() {
            Some(Some(pin)) => self.base.is_unchanged_since(pin).await.unwrap_or(false),
            _ => false,
        }
    }

    /// Exchanges what is shown, and waits until the last read of what was shown has ended.
    async fn show(&self, pin: Option<Pin>) {
        let mut exchange = self.window.pin.exchange().await;
        let old = exchange.take().flatten();
        exchange.put(pin);
        drop(exchange);
        if let Some(old) = old {
            old.end().await;
        }
    }

    /// Has the overlay name `pin`, durably.
    async fn record(&self, pin: Option<&PinName>) -> Result<()> {
        record(&*self.overlay, pin).await
    }

    fn refused(&self, why: &str) -> Error {
        Error::new(ErrorKind::Refused, format!("vm {}: {why}", self.vm))
    }
}

/// Has `overlay` name `pin`, durably.
///
/// # Errors
/// [`ErrorKind::Unsupported`] if it is no qcow2 image; and what writing its header returns.
pub(super) async fn record(overlay: &dyn Image, pin: Option<&PinName>) -> Result<()> {
    let qcow2 = as_qcow2(overlay).ok_or_else(|| {
        Error::new(
            ErrorKind::Unsupported,
            format!(
                "{} has no room to name the snapshot that its VM reads: it has to be a qcow2 image that is open for \
                 writing",
                overlay.name()
            ),
        )
    })?;
    let record = pin.map(ToString::to_string).unwrap_or_default();
    qcow2
        .set_extension(PIN_EXTENSION, record.as_bytes())
        .await
        .context(|| overlay.name().to_owned())
}
