//! What an image says about itself: which regions a base reserves for children, and which of them a
//! child owns.
//!
//! The declaration is a JSON document. A qcow2 image keeps it in a header extension, a raw base in a
//! sidecar file. It is untrusted like everything in an image: its size is bounded before it is parsed,
//! and every number in it is checked against the disk before it is used.
//!
//! # Invariants
//!
//! 1. A [`GroupList`] is sorted, and no two of its ranges overlap or touch.
//! 2. A parsed declaration has no two regions of one name, and every region's name is short and plain.
//! 3. A child repeats the declaration of its regions in full. Groups that the base has added since are not the
//!    child's yet; if the base's declaration has changed in any other way, the child is not served.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result};
use crate::units::BlockGroup;

/// The one version of the document there is.
const VERSION: u32 = 1;

/// The longest document that is read, in bytes.
pub const MAX_DECLARATION_BYTES: usize = 64 << 10;

/// The longest name of a region, in bytes.
const MAX_NAME_BYTES: usize = 32;

/// What an image says about itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Declaration {
    /// A base that reserves regions for children.
    Base(BaseDeclaration),
    /// A child that owns some of its base's regions.
    Child(ChildDeclaration),
}

/// What a base reserves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BaseDeclaration {
    /// Tells this base from every other one: 32 hexadecimal digits, drawn when the first region is declared.
    pub id: String,
    /// The filesystem whose block groups are reserved; absent where only partitions are.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub filesystem: Option<FilesystemPlace>,
    /// The reserved regions.
    pub regions: Vec<Region>,
}

/// Which regions a child owns, of which base.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChildDeclaration {
    /// The base's [`BaseDeclaration::id`].
    pub base: String,
    /// The regions as the base declared them when the child was created.
    pub regions: Vec<Region>,
}

/// Where an ext4 filesystem lies on the disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FilesystemPlace {
    /// The superblock's `s_uuid`, as 32 hexadecimal digits.
    pub uuid: String,
    /// The disk offset of the filesystem's first byte.
    pub start: u64,
    /// The length in bytes of the partition or disk that it fills.
    pub length: u64,
}

/// A part of the disk that the base gives up to its children.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Region {
    /// What `create --region` calls it.
    pub name: String,
    /// Which part it is.
    pub extent: Extent,
}

/// Which part of the disk a region is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum Extent {
    /// Block groups of the filesystem, and the directory in them that children write in.
    Groups {
        /// The groups.
        list: GroupList,
        /// The directory's absolute path.
        directory: String,
        /// The directory's inode, which lies in the groups.
        inode: u32,
        /// The directory's block, which lies in the groups.
        block: u64,
    },
    /// A whole partition, whatever is in it.
    Partition {
        /// The partition's number in its table, from 1 on.
        number: u32,
        /// The disk offset of its first byte.
        start: u64,
        /// Its length in bytes.
        length: u64,
    },
}

/// Block groups as people write them: `8-15` or `3,8-15`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct GroupList {
    /// First and last group of every range (invariant 1).
    ranges: Vec<(BlockGroup, BlockGroup)>,
}

/// The document around a declaration.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    version: u32,
    seethrough: Declaration,
}

/// The one field that every version of the document has.
#[derive(Deserialize)]
struct Version {
    version: u32,
}

impl Declaration {
    /// Reads a document.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] for bytes that are no declaration, [`ErrorKind::Unsupported`] for one of another
    /// version.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        if bytes.len() > MAX_DECLARATION_BYTES {
            return Err(corrupt(format!(
                "the region declaration has {} bytes, at most {MAX_DECLARATION_BYTES} are allowed",
                bytes.len()
            )));
        }
        let unreadable = |source| {
            Error::with_source(
                ErrorKind::Corrupt,
                "the region declaration cannot be read",
                source,
            )
        };
        let Version { version } =
            serde_json::from_slice(bytes).map_err(|e| unreadable(Box::new(e)))?;
        if version != VERSION {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "the region declaration has version {version}, only version {VERSION} is known"
                ),
            ));
        }
        let document: Document =
            serde_json::from_slice(bytes).map_err(|e| unreadable(Box::new(e)))?;
        document.seethrough.validate()?;
        Ok(document.seethrough)
    }

    /// The document's bytes.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfig`] if there are so many regions that the document gets too long.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        self.validate()?;
        let document = Document {
            version: VERSION,
            seethrough: self.clone(),
        };
        let bytes = serde_json::to_vec(&document).map_err(|e| {
            Error::with_source(
                ErrorKind::InvalidConfig,
                "writing the region declaration",
                e,
            )
        })?;
        if bytes.len() > MAX_DECLARATION_BYTES {
            return Err(Error::new(
                ErrorKind::InvalidConfig,
                format!(
                    "the regions' declaration would be longer than {MAX_DECLARATION_BYTES} bytes; \
                         declare fewer regions"
                ),
            ));
        }
        Ok(bytes)
    }

    fn validate(&self) -> Result<()> {
        let (id, regions) = match self {
            Self::Base(base) => (&base.id, &base.regions),
            Self::Child(child) => (&child.base, &child.regions),
        };
        if id.len() != 32 || !id.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(corrupt(
                "the region declaration names no base by 32 hexadecimal digits",
            ));
        }
        for (index, region) in regions.iter().enumerate() {
            check_region_name(&region.name)?;
            if regions[..index]
                .iter()
                .any(|other| other.name == region.name)
            {
                return Err(corrupt(format!(
                    "region \"{}\" is declared twice",
                    region.name
                )));
            }
            if let Extent::Partition { start, length, .. } = region.extent
                && (length == 0 || start.checked_add(length).is_none())
            {
                return Err(corrupt(format!(
                    "region \"{}\" has an impossible length",
                    region.name
                )));
            }
        }
        Ok(())
    }
}

impl BaseDeclaration {
    /// The region called `name`.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfig`], listing the names there are.
    pub fn region(&self, name: &str) -> Result<&Region> {
        self.regions.iter().find(|r| r.name == name).ok_or_else(|| {
            let known: Vec<&str> = self.regions.iter().map(|r| r.name.as_str()).collect();
            Error::new(
                ErrorKind::InvalidConfig,
                format!(
                    "the base declares no region \"{name}\"; it declares: {}",
                    known.join(", ")
                ),
            )
        })
    }
}

impl ChildDeclaration {
    /// Whether the child's regions are still its base's to give (invariant 3).
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfig`] if this is no child of `base`, or a region is declared otherwise now.
    pub fn check_against(&self, base: &BaseDeclaration) -> Result<()> {
        if base.id != self.base {
            return Err(Error::new(
                ErrorKind::InvalidConfig,
                format!(
                    "the child was created on base {}, but its backing image is base {}; give it the backing image \
                     that it was created on",
                    self.base, base.id
                ),
            ));
        }
        for region in &self.regions {
            if !base.region(&region.name)?.extent.holds(&region.extent) {
                return Err(Error::new(
                    ErrorKind::InvalidConfig,
                    format!(
                        "region \"{}\" is declared otherwise in the base than when the child was created; create the \
                         child anew",
                        region.name
                    ),
                ));
            }
        }
        Ok(())
    }
}

impl Extent {
    /// Whether this is `other`, with groups added or not.
    fn holds(&self, other: &Self) -> bool {
        match (self, other) {
            (
                Self::Groups {
                    list,
                    directory,
                    inode,
                    block,
                },
                Self::Groups {
                    list: fewer,
                    directory: other_directory,
                    inode: other_inode,
                    block: other_block,
                },
            ) => {
                list.includes(fewer)
                    && (directory, inode, block) == (other_directory, other_inode, other_block)
            }
            _ => self == other,
        }
    }
}

/// Holds a region's name to what fits on a command line and in a log.
///
/// # Errors
/// [`ErrorKind::InvalidConfig`] for anything else.
pub fn check_region_name(name: &str) -> Result<()> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
    if name.is_empty() || name.len() > MAX_NAME_BYTES || !name.bytes().all(plain) {
        return Err(Error::new(
            ErrorKind::InvalidConfig,
            format!(
                "\"{}\" is no name for a region: use 1 to {MAX_NAME_BYTES} letters, digits, '-' or '_'",
                name.escape_debug()
            ),
        ));
    }
    Ok(())
}

fn corrupt(context: impl Into<Box<str>>) -> Error {
    Error::new(ErrorKind::Corrupt, context)
}

impl GroupList {
    /// First and last group of every range, in order.
    #[must_use]
    pub fn ranges(&self) -> &[(BlockGroup, BlockGroup)] {
        &self.ranges
    }

    /// The highest group.
    #[must_use]
    pub fn last(&self) -> Option<BlockGroup> {
        self.ranges.last().map(|&(_, last)| last)
    }

    /// How many groups there are.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.ranges
            .iter()
            .map(|(first, last)| u64::from(last.0 - first.0) + 1)
            .sum()
    }

    /// Every group, in order. Check [`GroupList::last`] against the filesystem first: a list from an image may
    /// name four thousand million.
    pub fn iter(&self) -> impl Iterator<Item = BlockGroup> {
        self.ranges
            .iter()
            .flat_map(|(first, last)| (first.0..=last.0).map(BlockGroup))
    }

    /// Whether `group` is in the list.
    #[must_use]
    pub fn contains(&self, group: BlockGroup) -> bool {
        self.ranges
            .iter()
            .any(|&(first, last)| first <= group && group <= last)
    }

    /// Whether every group of `other` is in the list, which takes no longer for a long range than for a short one.
    #[must_use]
    pub fn includes(&self, other: &Self) -> bool {
        other.ranges.iter().all(|&(first, last)| {
            self.ranges
                .iter()
                .any(|&(start, end)| start <= first && last <= end)
        })
    }

    /// The lowest group that is in both lists.
    #[must_use]
    pub fn first_in_common(&self, other: &Self) -> Option<BlockGroup> {
        self.ranges
            .iter()
            .flat_map(|a| {
                other
                    .ranges
                    .iter()
                    .map(move |b| (a.0.max(b.0), a.1.min(b.1)))
            })
            .filter(|(first, last)| first <= last)
            .map(|(first, _)| first)
            .min()
    }
}

impl FromIterator<BlockGroup> for GroupList {
    fn from_iter<I: IntoIterator<Item = BlockGroup>>(groups: I) -> Self {
        let mut groups: Vec<BlockGroup> = groups.into_iter().collect();
        groups.sort_unstable();
        groups.dedup();
        let mut ranges: Vec<(BlockGroup, BlockGroup)> = Vec::new();
        for group in groups {
            match ranges.last_mut() {
                Some((_, last)) if last.checked_add(1) == Some(group) => *last = group,
                _ => ranges.push((group, group)),
            }
        }
        Self { ranges }
    }
}

impl FromStr for GroupList {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = || {
            Error::new(
                ErrorKind::InvalidConfig,
                format!(
                    "\"{}\" is no list of block groups; write one like 8-15 or 3,8-15",
                    text.escape_debug()
                ),
            )
        };
        let number = |digits: &str| digits.parse().map(BlockGroup).map_err(|_| wrong());
        let mut ranges = Vec::new();
        for part in text.split(',') {
            let (first, last) = match part.split_once('-') {
                Some((first, last)) => (number(first)?, number(last)?),
                None => (number(part)?, number(part)?),
            };
            if first > last {
                return Err(wrong());
            }
            ranges.push((first, last));
        }
        ranges.sort_unstable();
        let mut merged: Vec<(BlockGroup, BlockGroup)> = Vec::new();
        for (first, last) in ranges {
            match merged.last_mut() {
                Some((_, end)) if first <= *end => return Err(wrong()),
                Some((_, end)) if end.checked_add(1) == Some(first) => *end = last,
                _ => merged.push((first, last)),
            }
        }
        Ok(Self { ranges: merged })
    }
}

impl TryFrom<String> for GroupList {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<GroupList> for String {
    fn from(list: GroupList) -> Self {
        list.to_string()
    }
}

impl fmt::Display for GroupList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (first, last)) in self.ranges.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            if first == last {
                write!(f, "{comma}{first}")?;
            } else {
                write!(f, "{comma}{first}-{last}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn base() -> Declaration {
        Declaration::Base(BaseDeclaration {
            id: "0123456789abcdef0123456789abcdef".into(),
            filesystem: Some(FilesystemPlace {
                uuid: "537c3599f99d4df4849d45e45d7b80f7".into(),
                start: 1 << 20,
                length: 1 << 30,
            }),
            regions: vec![
                Region {
                    name: "local".into(),
                    extent: Extent::Groups {
                        list: "8-15".parse().unwrap(),
                        directory: "/local".into(),
                        inode: 16385,
                        block: 262_144,
                    },
                },
                Region {
                    name: "scratch".into(),
                    extent: Extent::Partition {
                        number: 2,
                        start: 2 << 30,
                        length: 1 << 30,
                    },
                },
            ],
        })
    }

    #[test]
    fn a_declaration_is_read_back_as_it_was_written() {
        let bytes = base().to_bytes().unwrap();
        assert_eq!(Declaration::parse(&bytes).unwrap(), base());
    }

    #[test]
    fn another_version_is_told_from_garbage() {
        let error = Declaration::parse(br#"{"version":2,"future":{}}"#).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        for garbage in [&b""[..], b"{", b"[1]", br#"{"version":1}"#] {
            let error = Declaration::parse(garbage).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{garbage:?}");
        }
        let long = vec![b' '; MAX_DECLARATION_BYTES + 1];
        assert_eq!(
            Declaration::parse(&long).unwrap_err().kind(),
            ErrorKind::Corrupt
        );
    }

    #[test]
    fn a_name_declared_twice_is_refused() {
        let Declaration::Base(mut declaration) = base() else {
            unreachable!()
        };
        declaration.regions[1].name = "local".into();
        assert!(Declaration::Base(declaration).to_bytes().is_err());
    }

    #[test]
    fn group_lists_are_normalised_and_printed_as_people_write_them() {
        let list: GroupList = "20,8-11,12-15".parse().unwrap();
        assert_eq!(list.to_string(), "8-15,20");
        assert_eq!(list.count(), 9);
        assert!(list.contains(BlockGroup(12)) && !list.contains(BlockGroup(16)));
        assert_eq!(
            [1, 2, 5]
                .map(BlockGroup)
                .into_iter()
                .collect::<GroupList>()
                .to_string(),
            "1-2,5"
        );
        for wrong in ["", "a", "5-3", "1-", "-1", "1,,2", "1-3,2", "4294967296"] {
            assert!(wrong.parse::<GroupList>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_first_group_in_common_is_found_whatever_the_order_of_ranges() {
        let list = |text: &str| text.parse::<GroupList>().unwrap();
        assert_eq!(list("1-3,9").first_in_common(&list("4-8")), None);
        assert_eq!(
            list("1-3,9").first_in_common(&list("0,3-9")),
            Some(BlockGroup(3))
        );
    }
}
