//! Naming another backing file in an existing image so that a power cut leaves the old one or the new one.
//!
//! ```text
//! before  ├─ fields ─┼─ format … other extensions … end mark ─┼─ old name ─┤
//! after   ├─ fields ─┼─ format … other extensions … end mark ─┼─ (old name) ─┼─ new name ─┤
//! ```
//!
//! # Invariants
//!
//! 1. The new name is written where the header in force does not look, and made durable. Then one write inside the
//!    first sector brings it into force together with its format, whose extension all programs put first.
//! 2. An image never says the new name with the old format. Where the extension of the format is not in the first
//!    sector, it changes before the name; where there was none, that is all the same until the name is there.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use super::create::BackingReference;
use super::header::{Header, MAX_BACKING_NAME};
use super::header_extension::{ExtensionType, PREFIX};
use super::header_update::{put, set_extension};
use crate::error::{Error, ErrorKind, Result};
use crate::storage::Storage;
use crate::units::SECTOR_SIZE;

/// Makes the image in `storage` name this backing file, or none. Nobody may have it open.
///
/// # Errors
/// [`ErrorKind::InvalidConfig`] if the name does not fit, and nothing is changed; those of [`Header::read`],
/// [`Header::require_writable`] and of the storage.
pub async fn set_backing(storage: &dyn Storage, backing: Option<&BackingReference>) -> Result<()> {
    let mut header = Header::read(storage).await?;
    header.require_writable()?;
    let name = backing.map(|backing| backing.file.as_os_str());
    if let Some(name) = name {
        check_length(name)?;
    }
    let format = backing.map(|backing| backing.format.as_bytes());
    if let Some(format) = format
        && header.extension(ExtensionType::BACKING_FORMAT) != Some(format)
        && !fits_first_sector(&header, format)?
    {
        set_extension(storage, ExtensionType::BACKING_FORMAT, format).await?;
        header = Header::read(storage).await?;
    }
    let mut new = header.clone();
    new.backing_file = name.map(OsStr::to_owned);
    if let Some(format) = format {
        new = new.with_extension(ExtensionType::BACKING_FORMAT, format.to_vec());
    }
    match place_for_name(&header, name) {
        Some(at) => {
            if let (Some(name), Some(at)) = (name, at) {
                put(storage, at, name.as_bytes()).await?;
            }
            new.backing_file_offset = at.unwrap_or(0) as u64;
            let (mut start, area) = encode_start(&new)?;
            start.extend(area);
            start.truncate(sector());
            put(storage, 0, &start).await
        }
        // No room for both names: the clusters are tiny, and the whole header is not much more than a sector.
        None => put(storage, 0, &new.encode()?).await,
    }
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

/// The fixed fields, and all that follows them to the mark of the extensions' end.
fn encode_start(header: &Header) -> Result<(Vec<u8>, Vec<u8>)> {
    let mut area = header
        .additional_fields
        .get(8..)
        .unwrap_or_default()
        .to_vec();
    header.extensions.encode(&mut area)?;
    Ok((header.encode_fields(), area))
}

/// Whether another format changes bytes of the first sector alone.
fn fits_first_sector(header: &Header, format: &[u8]) -> Result<bool> {
    let (fields, old) = encode_start(header)?;
    let changed = header
        .clone()
        .with_extension(ExtensionType::BACKING_FORMAT, format.to_vec());
    let (_, new) = encode_start(&changed)?;
    let behind = sector().saturating_sub(fields.len());
    Ok(old.len() == new.len() && old.get(behind..) == new.get(behind..))
}

/// Where a new name can lie beside the old one, if it is to be anywhere; `None` if there is no room.
fn place_for_name(header: &Header, name: Option<&OsStr>) -> Option<Option<usize>> {
    let cluster = usize::try_from(header.cluster_size()).ok()?;
    let list_end = header.header_length() + header.extensions.encoded_len() + PREFIX;
    let old = match (header.backing_file_offset, &header.backing_file) {
        (0, _) | (_, None) => cluster..cluster,
        (offset, Some(name)) => {
            let offset = usize::try_from(offset).ok()?;
            offset..offset + name.len()
        }
    };
    if list_end > old.start {
        // The list ends where the name begins, and has no mark of its end that would hold without it.
        return None;
    }
    let Some(name) = name else {
        return Some(None);
    };
    let before = list_end..old.start;
    let behind = old.end..cluster;
    // Not into the first sector, which is written as a whole later.
    [before, behind]
        .into_iter()
        .map(|room| room.start.max(sector())..room.end)
        .find(|room| room.start + name.len() <= room.end)
        .map(|room| Some(room.start))
}

fn sector() -> usize {
    usize::try_from(SECTOR_SIZE).expect("a sector is small")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qcow2::header::Version;
    use crate::qcow2::header_extension::SEETHROUGH_EXTENSION;
    use crate::qcow2::header_update::tests::PowerCut;
    use crate::storage::MemoryStorage;
    use crate::sys::block_on;
    use crate::units::HostOffset;

    const OTHER: ExtensionType = ExtensionType(0x1234);

    fn reference(name: &str, format: &str) -> BackingReference {
        BackingReference {
            file: name.into(),
            format: format.to_owned(),
        }
    }

    fn image(backing: Option<&BackingReference>, version: Version, cluster_bits: u32) -> Vec<u8> {
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
        header = header.with_extension(OTHER, b"another program's".to_vec());
        header = header.with_extension(SEETHROUGH_EXTENSION, vec![b'x'; 900]);
        header.encode().unwrap()
    }

    fn said(storage: &dyn Storage) -> Option<BackingReference> {
        let header = block_on(Header::read(storage)).unwrap();
        assert_eq!(header.extension(OTHER), Some(&b"another program's"[..]));
        assert_eq!(header.extension(SEETHROUGH_EXTENSION).unwrap().len(), 900);
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
}
