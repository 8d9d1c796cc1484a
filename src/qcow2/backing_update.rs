//! Naming another backing file in an existing image so that a power cut leaves the old one or the new one.
//!
//! # Invariants
//!
//! 1. One write inside one sector brings the new name into force together with its format (`qcow2::header_switch`):
//!    an image never says one of them with the other's.
//!    All programs put the format's extension first, and so into that sector; where it is elsewhere, it comes there
//!    before, in steps that say the same.
//! 2. Without a backing file its format is all the same, so it may come first there.

use std::ffi::OsStr;

use super::create::BackingReference;
use super::header::{Header, MAX_BACKING_NAME};
use super::header_extension::{ExtensionType, PREFIX};
use super::header_switch::Switch;
use crate::error::{Error, ErrorKind, Result};
use crate::storage::Storage;

const FORMAT: ExtensionType = ExtensionType::BACKING_FORMAT;

/// Makes the image in `storage` name this backing file, or none. Nobody may have it open.
///
/// # Errors
/// [`ErrorKind::InvalidConfig`] if the name does not fit, or not beside the one that is there, and nothing is changed;
/// those of [`Header::read`], [`Header::require_writable`] and of the storage.
pub async fn set_backing(storage: &dyn Storage, backing: Option<&BackingReference>) -> Result<()> {
    plan(storage, backing).await?.run(storage).await
}

/// Checks that [`set_backing`] would not refuse this backing file, and changes nothing.
///
/// # Errors
/// As [`set_backing`].
pub async fn require_room(storage: &dyn Storage, backing: Option<&BackingReference>) -> Result<()> {
    plan(storage, backing).await.map(drop)
}

async fn plan(storage: &dyn Storage, backing: Option<&BackingReference>) -> Result<Switch> {
    let header = Header::read(storage).await?;
    header.require_writable()?;
    let mut new = header.clone();
    new.backing_file = backing.map(|backing| backing.file.clone());
    let Some(BackingReference { file, format }) = backing else {
        return Switch::plan(storage, header, &[vec![new]]).await;
    };
    check_length(file)?;
    let format = format.as_bytes();
    let with_format = |header: &Header| header.clone().with_extension(FORMAT, format.to_vec());
    let mut ways = vec![vec![with_format(&new)]];
    if let Some(mut way) = format_to_front(&header, format) {
        let mut last = way.last().unwrap_or(&header).clone();
        last.backing_file = Some(file.clone());
        if last.extension(FORMAT).is_some() {
            way.push(with_format(&last));
            ways.push(way);
        } else if last.extensions.replace_first(FORMAT, format) {
            way.push(last);
            ways.push(way);
        }
    }
    // Invariant 2.
    if header.backing_file.is_none() {
        ways.push(vec![with_format(&header), with_format(&new)]);
    }
    Switch::plan(storage, header, &ways).await
}

/// The headers by way of which the format's extension comes to the front of the list, into the first sector, all with
/// what it says now; or by way of which its place is free, if there is none. None if it is there, or has no room there.
fn format_to_front(header: &Header, new_format: &[u8]) -> Option<Vec<Header>> {
    if header.extensions.types().next()? == FORMAT {
        return None;
    }
    let mut way = Vec::new();
    let mut next = header.clone();
    next.extensions.repeat_first();
    way.push(next.clone());
    if let Some(format) = header.extension(FORMAT) {
        // Another format of the same length takes its place.
        if format.len().div_ceil(PREFIX) != new_format.len().div_ceil(PREFIX) {
            return None;
        }
        if !next.extensions.replace_first(FORMAT, format) {
            return None;
        }
        way.push(next.clone());
        next.extensions.keep_first(FORMAT);
        way.push(next);
    }
    Some(way)
}

fn check_length(name: &OsStr) -> Result<()> {
    if name.len() <= MAX_BACKING_NAME as usize {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::InvalidConfig,
        format!(
            "the backing file name has {} bytes, and the format takes {MAX_BACKING_NAME} at most",
            name.len()
        ),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qcow2::header::Version;
    use crate::qcow2::header_extension::SEETHROUGH_EXTENSION;
    use crate::qcow2::header_update::tests::PowerCut;
    use crate::storage::{CrashStorage, Delays, Lost, MemoryStorage};
    use crate::sys::block_on;
    use crate::units::HostOffset;

    const OTHER: ExtensionType = ExtensionType(0x1234);

    const LATER: [u8; 8] = [1, 2, 3, 4, 5, 6, 7, 8];

    fn reference(name: &str, format: &str) -> BackingReference {
        BackingReference {
            file: name.into(),
            format: format.to_owned(),
        }
    }

    fn image(backing: Option<&BackingReference>, version: Version, cluster_bits: u32) -> Vec<u8> {
        image_with(backing, version, cluster_bits, 900)
    }

    /// An image with an extension of so many bytes behind the format's.
    fn image_with(
        backing: Option<&BackingReference>,
        version: Version,
        cluster_bits: u32,
        len: usize,
    ) -> Vec<u8> {
        let mut header = Header::new(version, cluster_bits, 1 << 20);
        header.l1_size = 32;
        header.l1_table_offset = HostOffset(3 << cluster_bits);
        header.refcount_table_offset = HostOffset(1 << cluster_bits);
        header.refcount_table_clusters = 1;
        if let Some(backing) = backing {
            header.backing_file = Some(backing.file.clone());
            let format = backing.format.clone().into_bytes();
            header = header.with_extension(ExtensionType::BACKING_FORMAT, format);
        }
        if version == Version::V3 {
            // Fields of a later version of the format.
            header.additional_fields.extend(LATER);
        }
        header = header.with_extension(OTHER, b"another program's".to_vec());
        header = header.with_extension(SEETHROUGH_EXTENSION, vec![b'x'; len]);
        header.encode().unwrap()
    }

    fn said(storage: &dyn Storage) -> Option<BackingReference> {
        let header = block_on(Header::read(storage)).unwrap();
        assert_eq!(header.extension(OTHER), Some(&b"another program's"[..]));
        assert!(header.version == Version::V2 || header.additional_fields.ends_with(&LATER));
        let other = header.extension(SEETHROUGH_EXTENSION).unwrap();
        assert!(other.iter().all(|byte| *byte == b'x'));
        header.backing_file.as_ref().map(|file| BackingReference {
            file: file.clone(),
            format: header
                .backing_format()
                .unwrap()
                .to_str()
                .unwrap()
                .to_owned(),
        })
    }

    #[test]
    fn after_a_power_cut_the_old_backing_file_or_the_new_one_is_named_with_its_format() {
        let names = [
            None,
            Some(reference("base.qcow2", "qcow2")),
            Some(reference("b.raw", "raw")),
            Some(reference(&"n".repeat(1023), "raw")),
        ];
        for (version, cluster_bits) in [(Version::V2, 16), (Version::V3, 16), (Version::V3, 12)] {
            for old in &names {
                for new in &names {
                    let bytes = image(old.as_ref(), version, cluster_bits);
                    let mut writes = 0;
                    loop {
                        let storage = PowerCut::after(writes, bytes.clone());
                        let result = block_on(set_backing(&storage, new.as_ref()));
                        let said = said(&storage);
                        if result.is_ok() {
                            assert_eq!(&said, new, "from {old:?}");
                            break;
                        }
                        assert_eq!(&said, old, "to {new:?}, cut after {writes} writes");
                        writes += 1;
                    }
                }
            }
        }
    }

    #[test]
    fn names_change_again_and_again_without_running_out_of_room() {
        let storage = MemoryStorage::new(image(None, Version::V3, 12));
        for round in 0..20 {
            let len = [1000, 7, 300][round % 3];
            let format = ["raw", "qcow2"][round % 2];
            let new = reference(&format!("{round}").repeat(len / 2), format);
            block_on(set_backing(&storage, Some(&new))).unwrap();
            assert_eq!(said(&storage), Some(new));
        }
    }

    #[test]
    fn a_name_that_is_too_long_changes_nothing() {
        let old = reference("base.qcow2", "qcow2");
        let bytes = image(Some(&old), Version::V3, 16);
        let storage = MemoryStorage::new(bytes.clone());
        let new = reference(&"n".repeat(1024), "raw");
        let error = block_on(set_backing(&storage, Some(&new))).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidConfig);
        assert!(storage.contents() == bytes);
    }

    /// Every change between these, each cut at every write, with any of the unflushed ones lost; how many were made,
    /// and how many refused.
    fn changes(cluster_bits: u32, others: usize, names: &[Option<BackingReference>]) -> (u32, u32) {
        let (mut made, mut refused) = (0, 0);
        for version in [Version::V2, Version::V3] {
            for old in names {
                for new in names {
                    let bytes = image_with(old.as_ref(), version, cluster_bits, others);
                    let storage = CrashStorage::new(bytes.clone(), Delays::none());
                    let room = block_on(require_room(&storage, new.as_ref()));
                    let changed = block_on(set_backing(&storage, new.as_ref()));
                    assert_eq!(room.is_ok(), changed.is_ok());
                    if let Err(error) = changed {
                        assert_eq!(error.kind(), ErrorKind::InvalidConfig);
                        assert!(storage.contents() == bytes);
                        refused += 1;
                        continue;
                    }
                    made += 1;
                    assert_eq!(&said(&storage), new, "from {old:?}");
                    for cut in storage.moments() {
                        for seed in 0..8 {
                            let left = storage.after_power_cut(cut, Lost::Some { seed });
                            let said = said(&MemoryStorage::new(left));
                            assert!(said == *old || said == *new, "{old:?} {said:?} {new:?}");
                        }
                    }
                    let left = storage.after_power_cut(storage.now(), Lost::All);
                    assert_eq!(&said(&MemoryStorage::new(left)), new);
                }
            }
        }
        (made, refused)
    }

    #[test]
    fn in_tiny_clusters_a_name_changes_at_once_or_not_at_all() {
        let mut names = vec![None];
        for len in [4, 60, 200, 330, 460, 700, 900, 1023] {
            for format in ["raw", "qcow2", "a format with a long name"] {
                names.push(Some(reference(&"n".repeat(len), format)));
            }
        }
        let fitting = |cluster: usize, others: usize| {
            let fits = |name: &&Option<BackingReference>| {
                let name = name.as_ref().map_or(0, |name| name.file.len());
                name + others + 200 <= cluster
            };
            names.iter().filter(fits).cloned().collect::<Vec<_>>()
        };
        for (cluster_bits, others, fewest) in
            [(9, 60, 98), (10, 100, 300), (11, 40, 900), (11, 900, 300)]
        {
            let (made, refused) =
                changes(cluster_bits, others, &fitting(1 << cluster_bits, others));
            assert!(
                made >= fewest,
                "{cluster_bits} {others}: {made} made, {refused} refused"
            );
        }
    }

    #[test]
    fn a_format_outside_the_first_sector_never_says_what_the_other_name_is() {
        let old = reference("b.raw", "raw");
        let mut header = Header::new(Version::V3, 12, 1 << 20);
        header.l1_size = 2;
        header.l1_table_offset = HostOffset(3 << 12);
        header.refcount_table_offset = HostOffset(1 << 12);
        header.refcount_table_clusters = 1;
        header.backing_file = Some(old.file.clone());
        header.additional_fields.extend(LATER);
        let mut header = header
            .with_extension(OTHER, b"another program's".to_vec())
            .with_extension(SEETHROUGH_EXTENSION, vec![b'x'; 900])
            .with_extension(FORMAT, b"raw".to_vec());
        let bytes = header.encode().unwrap();
        let storage = CrashStorage::new(bytes.clone(), Delays::none());
        let new = reference("base.qcow2", "qcow2");
        block_on(set_backing(&storage, Some(&new))).unwrap();
        for cut in storage.moments() {
            for seed in 0..16 {
                let left = storage.after_power_cut(cut, Lost::Some { seed });
                let said = said(&MemoryStorage::new(left)).unwrap();
                assert!(said == old || said == new, "{cut:?} {seed}: {said:?}");
            }
        }
        // Its extension is too long for the place of the old one.
        let storage = MemoryStorage::new(bytes.clone());
        let long = reference("new", "a format with a long name");
        let error = block_on(set_backing(&storage, Some(&long))).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidConfig);
        assert!(storage.contents() == bytes);
    }
}
