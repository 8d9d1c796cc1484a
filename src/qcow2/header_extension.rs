//! Header extensions (qcow2 specification, "Header extensions") and the feature name table in one of them.
//!
//! # Invariants
//!
//! 1. Whatever is not understood is kept: type, bytes and place in the order.
//! 2. Of several extensions of one type the last counts, as in stock QEMU.

use super::features::FeatureType;
use crate::error::{Error, ErrorKind, Result};

/// Ends the list.
const END: ExtensionType = ExtensionType(0);

/// Bytes of an extension's type and length in front of its data.
pub(super) const PREFIX: usize = 8;

/// An extension's type and length as they stand in front of its data.
///
/// # Errors
/// [`ErrorKind::InvalidConfig`] if the length does not fit its 32-bit field.
pub(super) fn prefix(extension_type: ExtensionType, len: usize) -> Result<[u8; PREFIX]> {
    let len = u32::try_from(len).map_err(|_| {
        Error::new(
            ErrorKind::InvalidConfig,
            "a header extension is longer than 32 bits can say",
        )
    })?;
    let mut bytes = [0; PREFIX];
    bytes[..4].copy_from_slice(&extension_type.0.to_be_bytes());
    bytes[4..].copy_from_slice(&len.to_be_bytes());
    Ok(bytes)
}

/// Where an extension lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Placed {
    pub(super) extension_type: ExtensionType,
    /// Where its prefix begins, in bytes from the beginning of the list.
    pub(super) at: usize,
    /// Bytes that its data and their padding take.
    pub(super) capacity: usize,
}

/// Every extension starts on a multiple of this.
const ALIGNMENT: usize = 8;

/// Bytes of an entry of the feature name table: type, bit number, name.
const FEATURE_ENTRY: usize = 48;

/// The number that says what an extension holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExtensionType(pub u32);

impl ExtensionType {
    /// The format of the backing file, as a string.
    pub const BACKING_FORMAT: Self = Self(0xe279_2aca);
    /// Names of feature bits, for the messages of programs that do not know them.
    pub const FEATURE_NAME_TABLE: Self = Self(0x6803_f857);
    /// Where the directory of persistent bitmaps lies.
    pub const BITMAPS: Self = Self(0x2385_2875);
    /// Where the LUKS header lies.
    pub const FULL_DISK_ENCRYPTION: Self = Self(0x0537_be77);
    /// The name of the external data file, as a string.
    pub const EXTERNAL_DATA_FILE_NAME: Self = Self(0x4441_5441);
}

/// Our own extension that says nothing: room of an extension that was superseded.
pub const VOID_EXTENSION: ExtensionType = ExtensionType(0x5ee7_b39e);

/// Our own extension: the declaration of regions, as JSON.
///
/// The specification lets anyone pick a number, and asks readers to keep extensions that they do not know. This
/// one was drawn at random: no other program is known to use it.
pub const SEETHROUGH_EXTENSION: ExtensionType = ExtensionType(0x5ee7_b39d);

/// Our own extension of a child's overlay: the name of the snapshot of its base that its VM reads; empty for none.
/// Drawn as the other one.
pub const PIN_EXTENSION: ExtensionType = ExtensionType(0x91c6_4e0b);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Extension {
    extension_type: ExtensionType,
    data: Vec<u8>,
}

/// The extensions of a header, in their order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HeaderExtensions {
    list: Vec<Extension>,
}

impl HeaderExtensions {
    /// Reads the list that starts at the first byte of `area`; it ends with the area, or with an extension of
    /// type 0.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] if an extension leaves the area.
    pub fn parse(mut area: &[u8]) -> Result<Self> {
        let mut list = Vec::new();
        while let Some((prefix, rest)) = area.split_first_chunk::<PREFIX>() {
            let [t0, t1, t2, t3, l0, l1, l2, l3] = *prefix;
            let extension_type = ExtensionType(u32::from_be_bytes([t0, t1, t2, t3]));
            if extension_type == END {
                break;
            }
            let len = u32::from_be_bytes([l0, l1, l2, l3]);
            let data = usize::try_from(len)
                .ok()
                .and_then(|len| rest.get(..len))
                .ok_or_else(|| {
                    Error::new(
                        ErrorKind::Corrupt,
                        format!(
                            "header extension {:#010x} is {len} bytes long, but only {} are left in the header",
                            extension_type.0,
                            rest.len()
                        ),
                    )
                })?;
            list.push(Extension {
                extension_type,
                data: data.to_vec(),
            });
            area = rest
                .get(data.len().next_multiple_of(ALIGNMENT)..)
                .unwrap_or_default();
        }
        Ok(Self { list })
    }

    /// Appends the list to `out`, with the mark of its end.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfig`] if an extension's length does not fit its 32-bit field.
    pub fn encode(&self, out: &mut Vec<u8>) -> Result<()> {
        for extension in &self.list {
            out.extend(prefix(extension.extension_type, extension.data.len())?);
            out.extend(&extension.data);
            out.resize(out.len().next_multiple_of(ALIGNMENT), 0);
        }
        out.extend([0; PREFIX]);
        Ok(())
    }

    /// Bytes of the list without the mark of its end.
    #[must_use]
    pub fn encoded_len(&self) -> usize {
        let len = |extension: &Extension| extension.data.len().next_multiple_of(ALIGNMENT);
        self.list
            .iter()
            .map(|extension| PREFIX + len(extension))
            .sum()
    }

    /// The data of the extension of this type.
    #[must_use]
    pub fn get(&self, extension_type: ExtensionType) -> Option<&[u8]> {
        self.list
            .iter()
            .rfind(|extension| extension.extension_type == extension_type)
            .map(|extension| extension.data.as_slice())
    }

    /// Sets the extension of this type: in place of the one there was, or behind all others.
    pub fn set(&mut self, extension_type: ExtensionType, data: Vec<u8>) {
        let at = self
            .list
            .iter()
            .position(|extension| extension.extension_type == extension_type)
            .unwrap_or(self.list.len());
        self.remove(extension_type);
        self.list.insert(
            at,
            Extension {
                extension_type,
                data,
            },
        );
    }

    /// Takes out every extension of this type.
    pub fn remove(&mut self, extension_type: ExtensionType) {
        self.list
            .retain(|extension| extension.extension_type != extension_type);
    }

    /// Appends the first extension once more.
    pub(super) fn repeat_first(&mut self) {
        self.list.extend(self.list.first().cloned());
    }

    /// Puts an extension in place of the first, where no other one moves for it; the answer is whether there is room.
    /// What is left of the first becomes void.
    pub(super) fn replace_first(&mut self, extension_type: ExtensionType, data: &[u8]) -> bool {
        let capacity = data.len().next_multiple_of(ALIGNMENT);
        let Some(first) = self.list.first_mut() else {
            return false;
        };
        let Some(left) = (first.data.len().next_multiple_of(ALIGNMENT)).checked_sub(capacity)
        else {
            return false;
        };
        let rest = first
            .data
            .get(capacity + PREFIX..)
            .unwrap_or_default()
            .to_vec();
        *first = Extension {
            extension_type,
            data: data.to_vec(),
        };
        if left > 0 {
            let void = Extension {
                extension_type: VOID_EXTENSION,
                data: rest,
            };
            self.list.insert(1, void);
        }
        true
    }

    /// Makes every extension of this type void but the first.
    pub(super) fn keep_first(&mut self, extension_type: ExtensionType) {
        let same = |extension: &&mut Extension| extension.extension_type == extension_type;
        for extension in self.list.iter_mut().filter(same).skip(1) {
            extension.extension_type = VOID_EXTENSION;
        }
    }

    /// Where each extension lies, in their order.
    pub(super) fn placed(&self) -> Vec<Placed> {
        let mut at = 0;
        let place = |extension: &Extension| {
            let capacity = extension.data.len().next_multiple_of(ALIGNMENT);
            let placed = Placed {
                extension_type: extension.extension_type,
                at,
                capacity,
            };
            at += PREFIX + capacity;
            placed
        };
        self.list.iter().map(place).collect()
    }

    /// The types present, in their order.
    pub fn types(&self) -> impl Iterator<Item = ExtensionType> {
        self.list.iter().map(|extension| extension.extension_type)
    }

    /// What the image's feature name table calls a bit. Control characters, which an image could use to forge
    /// lines of a log, are replaced.
    #[must_use]
    pub fn feature_name(&self, feature_type: FeatureType, bit: u8) -> Option<String> {
        let table = self.get(ExtensionType::FEATURE_NAME_TABLE)?;
        let entry = table
            .chunks_exact(FEATURE_ENTRY)
            .find(|entry| entry.starts_with(&[feature_type.to_byte(), bit]))?;
        let name = entry.get(2..)?.split(|byte| *byte == 0).next()?;
        let name = String::from_utf8_lossy(name)
            .chars()
            .map(|c| if c.is_control() { '?' } else { c })
            .collect();
        Some(name)
    }
}

/// The data of a feature name table with `entries`: type, bit number and name of each.
#[must_use]
pub fn feature_name_table<'a>(
    entries: impl IntoIterator<Item = (FeatureType, u8, &'a str)>,
) -> Vec<u8> {
    let mut table = Vec::new();
    for (feature_type, bit, name) in entries {
        let end = table.len() + FEATURE_ENTRY;
        table.extend([feature_type.to_byte(), bit]);
        table.extend(name.bytes().take(FEATURE_ENTRY - 2));
        table.resize(end, 0);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn two() -> HeaderExtensions {
        let mut extensions = HeaderExtensions::default();
        extensions.set(ExtensionType(0x1234_5678), b"keep me".to_vec());
        extensions.set(ExtensionType::BACKING_FORMAT, b"qcow2".to_vec());
        extensions
    }

    #[test]
    fn unknown_extensions_come_back_verbatim_and_in_order() {
        let mut bytes = Vec::new();
        two().encode(&mut bytes).unwrap();
        assert_eq!(bytes.len(), 16 + 16 + 8);
        bytes.extend(b"behind the end");
        assert_eq!(HeaderExtensions::parse(&bytes).unwrap(), two());
    }

    #[test]
    fn setting_an_extension_again_keeps_its_place() {
        let mut extensions = two();
        extensions.set(ExtensionType(0x1234_5678), b"new".to_vec());
        assert_eq!(
            extensions.types().collect::<Vec<_>>(),
            [ExtensionType(0x1234_5678), ExtensionType::BACKING_FORMAT]
        );
        assert_eq!(
            extensions.get(ExtensionType(0x1234_5678)),
            Some(b"new".as_slice())
        );
    }

    #[test]
    fn the_last_of_several_extensions_of_a_type_counts() {
        let mut bytes = Vec::new();
        for name in [b"raw12345", b"qcow2345"] {
            bytes.extend(ExtensionType::BACKING_FORMAT.0.to_be_bytes());
            bytes.extend(8u32.to_be_bytes());
            bytes.extend(name);
        }
        let extensions = HeaderExtensions::parse(&bytes).unwrap();
        assert_eq!(
            extensions.get(ExtensionType::BACKING_FORMAT),
            Some(b"qcow2345".as_slice())
        );
    }

    #[test]
    fn an_extension_that_leaves_the_header_is_corrupt() {
        let mut bytes = 1u32.to_be_bytes().to_vec();
        bytes.extend(9u32.to_be_bytes());
        bytes.extend([0; 8]);
        let error = HeaderExtensions::parse(&bytes).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(
            HeaderExtensions::parse(&bytes[..7])
                .unwrap()
                .list
                .is_empty()
        );
    }

    #[test]
    fn feature_names_are_found_and_cannot_forge_log_lines() {
        let mut extensions = HeaderExtensions::default();
        let table = feature_name_table([
            (FeatureType::Compatible, 7, "other type"),
            (FeatureType::Incompatible, 7, "shiny\nthing"),
            (FeatureType::Incompatible, 8, &"x".repeat(60)),
        ]);
        extensions.set(ExtensionType::FEATURE_NAME_TABLE, table);
        let name = |bit| extensions.feature_name(FeatureType::Incompatible, bit);
        assert_eq!(name(7).as_deref(), Some("shiny?thing"));
        assert_eq!(name(8).map(|name| name.len()), Some(46));
        assert_eq!(name(9), None);
    }
}
