//! From a policy to what follows it: what has to be so before a child is served with one.

use std::any::Any;
use std::collections::HashSet;
use std::sync::Arc;

use super::pin::Pinnable;
use super::pin_name::PinName;
use super::policy::Policy;
use super::refresher::{Refresher, record};
use crate::chain::backing::Backing;
use crate::chain::format::Format;
use crate::chain::host::open_file;
use crate::chain::inspect::read_header;
use crate::chain::registry::{DiskRequest, OpenImage, Source};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::image::{Access, Image};
use crate::qcow2::OnlineQcow2;
use crate::qcow2::header_extension::PIN_EXTENSION;
use crate::view::View;
use crate::view::declaration::BaseDeclaration;
use crate::view::declared::UNLOCKED;
use crate::view::lease::fresh_id;

/// What has to be open for writing, besides `child`, if it is to be served with `policy`: its base, of which snapshots
/// are taken.
///
/// # Errors
/// What reading the child's header returns.
pub async fn base_to_pin(child: &DiskRequest, policy: Policy) -> Result<Option<DiskRequest>> {
    if policy == Policy::Live || child.format == Some(Format::Raw) {
        return Ok(None);
    }
    let storage = open_file(&child.path, Access::ReadOnly, UNLOCKED)?;
    // What is no qcow2 image is found out, and told, when it is opened.
    let Ok(Some(header)) = read_header(&storage, Format::Qcow2).await else {
        return Ok(None);
    };
    let backing = Backing::of(&child.path, &header)?;
    Ok(backing.map(|backing| DiskRequest {
        path: backing.path,
        format: Some(backing.format),
        access: Access::ReadWrite,
    }))
}

/// Has the view of a child follow `policy`. `disk` is the child, `base` what lies behind it, and what that declares;
/// `pinned` tells the children of this daemon apart.
///
/// # Errors
/// [`ErrorKind::InvalidConfig`] and [`ErrorKind::Unsupported`] if the child or the base is nothing that can follow it.
pub(in crate::view) async fn follow(
    vm: &str,
    view: View,
    policy: Policy,
    disk: &OpenImage,
    base: (&Source, Arc<dyn Image>, BaseDeclaration),
    pinned: &mut HashSet<PinName>,
) -> Result<View> {
    let (source, image, declaration) = base;
    let recorded = recorded(&disk.source);
    if policy == Policy::Live {
        if let Some(recorded) = recorded {
            give_up(vm, disk, recorded, source).await?;
        }
        return Ok(view);
    }
    let refused = |kind, why: String| Err(Error::new(kind, format!("refresh={policy}: {why}")));
    if disk.image.is_read_only() {
        return refused(
            ErrorKind::InvalidConfig,
            "a child that is served read-only cannot say which snapshot of its base it reads; serve it with \
             refresh=live"
                .to_owned(),
        );
    }
    if view.territory.filesystem().is_none() {
        return refused(
            ErrorKind::InvalidConfig,
            "the child owns partitions alone, so it is not known when its VM has them mounted; serve it with \
             refresh=live"
                .to_owned(),
        );
    }
    let Some(online) = as_online(&image) else {
        return refused(
            ErrorKind::Unsupported,
            format!(
                "no snapshots can be taken of {}, which is a {} image; make it a qcow2 image with `seethrough convert \
                 -O qcow2`, prepare it and create the child anew, or serve the child with refresh=live",
                source.path.display(),
                source.format
            ),
        );
    };
    let recorded = recorded
        .transpose()
        .context(|| disk.source.path.display().to_string())?
        .flatten();
    if let Some(name) = &recorded
        && !pinned.insert(name.first_of_the_child())
    {
        return refused(
            ErrorKind::InvalidConfig,
            format!(
                "{} is a copy of another VM's image, and names its snapshots as that one does; serve it with \
                 refresh=live once",
                disk.source.path.display()
            ),
        );
    }
    let refresher = Refresher::new(
        vm,
        policy,
        Pinnable::new(online, declaration).await?,
        Arc::clone(&disk.image),
        recorded,
        fresh_id()?,
    );
    Ok(view.refreshed_by(Arc::new(refresher)))
}

/// The pin that a child's overlay names; nothing for a child that was never pinned.
fn recorded(child: &Source) -> Option<Result<Option<PinName>>> {
    let record = child.header.as_ref()?.extension(PIN_EXTENSION)?;
    match PinName::of_record(record) {
        Ok(None) => None,
        other => Some(other),
    }
}

/// A child that was pinned sees its base live from now on. Its snapshot stays: a copy of the child may need it.
async fn give_up(
    vm: &str,
    child: &OpenImage,
    recorded: Result<Option<PinName>>,
    base: &Source,
) -> Result<()> {
    if child.image.is_read_only() {
        return Ok(());
    }
    record(&*child.image, None).await?;
    if let Ok(Some(name)) = recorded {
        log::warn!(
            "vm {vm}: it needs snapshot {name} of its base no more: while nobody uses the base, delete it with \
             `seethrough snapshot -d {name} {}`",
            base.path.display()
        );
    }
    Ok(())
}

fn as_online(image: &Arc<dyn Image>) -> Option<Arc<OnlineQcow2>> {
    let any: Arc<dyn Any + Send + Sync> = Arc::clone(image) as _;
    any.downcast().ok()
}
