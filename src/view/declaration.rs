//! What an image says about itself: which regions a base reserves for children, and which of them a
//! child owns.
//!
//! The declaration is a JSON document. A qcow2 image keeps it in a header extension, a raw base in a
//! sidecar file. It is untrusted like everything in an image: its size is bounded before it is parsed,
//! and every number in it is checked against the disk before it is used.
//!
//! # Invariants
//!
//! 1. A parsed declaration has no two regions of one name, and every region's name is short and plain.
//! 2. A child repeats the declaration of its regions in full. Groups that the base has added since are not the
//!    child's yet; if the base's declaration has changed in any other way, the child is not served.

use serde::{Deserialize, Serialize};

pub use super::group_list::GroupList;
pub use super::grown::Grown;
use crate::error::{Error, ErrorKind, Result};

/// The version of a document in which all regions are private.
const VERSION: u32 = 1;

/// The version of one that says more: a program that knows the first alone must not serve it.
const VERSION_WITH_SHARED: u32 = 2;

/// The version of a child's with block groups of its own behind the end of its base's filesystem.
const VERSION_WITH_GROWN: u32 = 3;

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
    /// Who holds the shared ones: at most one lease for each.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub leases: Vec<Lease>,
}

/// Which regions a child owns, of which base.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChildDeclaration {
    /// The base's [`BaseDeclaration::id`].
    pub base: String,
    /// The regions as the base declared them when the child was created.
    pub regions: Vec<Region>,
    /// What the leases of the child's shared regions may say of their holder: see [`super::lease`].
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub nonces: Vec<String>,
    /// The block groups that the child alone has.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub grown: Option<Grown>,
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
    /// Where the children's writes are stored.
    #[serde(skip_serializing_if = "Sharing::is_private", default)]
    pub sharing: Sharing,
    /// Which part it is.
    pub extent: Extent,
}

/// Where what children write to a region is stored, and so who reads it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Sharing {
    /// In each child's overlay: any number of children own the region, and none sees another's.
    #[default]
    Private,
    /// In the base image itself: one child writes at a time, and all others read it.
    Shared,
}

impl Sharing {
    fn is_private(&self) -> bool {
        *self == Self::Private
    }
}

/// Who holds a shared region. It stands from before the holder's first write until its filesystem is known to have
/// been unmounted cleanly.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lease {
    /// The region's name.
    pub region: String,
    /// Drawn anew for every lease, and known to the holder's overlay: 32 hexadecimal digits.
    pub nonce: String,
    /// What the holder's overlay was called, for people to read.
    pub holder: String,
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
        if !(VERSION..=VERSION_WITH_GROWN).contains(&version) {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "the region declaration has version {version}, only versions {VERSION} to \
                     {VERSION_WITH_GROWN} are known"
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
            version: self.version(),
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

    fn regions(&self) -> &[Region] {
        match self {
            Self::Base(base) => &base.regions,
            Self::Child(child) => &child.regions,
        }
    }

    fn version(&self) -> u32 {
        if matches!(self, Self::Child(child) if child.grown.is_some()) {
            VERSION_WITH_GROWN
        } else if self.regions().iter().all(|r| r.sharing.is_private()) {
            VERSION
        } else {
            VERSION_WITH_SHARED
        }
    }

    fn validate(&self) -> Result<()> {
        let id = match self {
            Self::Base(base) => &base.id,
            Self::Child(child) => &child.base,
        };
        let regions = self.regions();
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
    /// Who holds the shared region called `name`.
    #[must_use]
    pub fn lease(&self, name: &str) -> Option<&Lease> {
        self.leases.iter().find(|lease| lease.region == name)
    }

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
    /// Whether the child's regions are still its base's to give (invariant 2).
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
        check_owned_together(&self.regions)?;
        for region in &self.regions {
            let declared = base.region(&region.name)?;
            if declared.sharing != region.sharing || !declared.extent.holds(&region.extent) {
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

    /// The regions that the child writes in the base.
    pub fn shared_regions(&self) -> impl Iterator<Item = &Region> {
        let is_shared = |region: &&Region| region.sharing == Sharing::Shared;
        self.regions.iter().filter(is_shared)
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

/// Refuses regions that one child cannot own together. A kernel lays a file across whatever groups it may write: its
/// name could be in a shared one and its inode in a private one, where nobody else finds it.
///
/// # Errors
/// [`ErrorKind::InvalidConfig`], naming a private and a shared region of block groups.
pub fn check_owned_together(regions: &[Region]) -> Result<()> {
    let of_groups = |sharing: Sharing| {
        let is_one =
            |r: &&Region| r.sharing == sharing && matches!(r.extent, Extent::Groups { .. });
        regions.iter().find(is_one)
    };
    let (Some(private), Some(shared)) = (of_groups(Sharing::Private), of_groups(Sharing::Shared))
    else {
        return Ok(());
    };
    Err(Error::new(
        ErrorKind::InvalidConfig,
        format!(
            "region \"{}\" is private and region \"{}\" is shared, and the child's kernel would lay files across both, \
             of which others would find one half: create a child for each",
            private.name, shared.name
        ),
    ))
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
                    sharing: Sharing::Private,
                    extent: Extent::Groups {
                        list: "8-15".parse().unwrap(),
                        directory: "/local".into(),
                        inode: 16385,
                        block: 262_144,
                    },
                },
                Region {
                    name: "scratch".into(),
                    sharing: Sharing::Private,
                    extent: Extent::Partition {
                        number: 2,
                        start: 2 << 30,
                        length: 1 << 30,
                    },
                },
            ],
            leases: Vec::new(),
        })
    }

    #[test]
    fn a_declaration_is_read_back_as_it_was_written() {
        let bytes = base().to_bytes().unwrap();
        assert_eq!(Declaration::parse(&bytes).unwrap(), base());
    }

    #[test]
    fn what_is_shared_is_kept_from_programs_that_know_private_regions_alone() {
        let Declaration::Base(mut declaration) = base() else {
            unreachable!()
        };
        let version = |declaration: &BaseDeclaration| {
            let bytes = Declaration::Base(declaration.clone()).to_bytes().unwrap();
            let text = String::from_utf8(bytes).unwrap();
            (
                text.starts_with(r#"{"version":1"#),
                text.contains("sharing"),
            )
        };
        assert_eq!(version(&declaration), (true, false));
        declaration.regions[0].sharing = Sharing::Shared;
        declaration.leases.push(Lease {
            region: "local".into(),
            nonce: "0".repeat(32),
            holder: "tom.qcow2".into(),
        });
        assert_eq!(version(&declaration), (false, true));
        let shared = Declaration::Base(declaration);
        let bytes = shared.to_bytes().unwrap();
        assert_eq!(Declaration::parse(&bytes).unwrap(), shared);
    }

    #[test]
    fn another_version_is_told_from_garbage() {
        let error = Declaration::parse(br#"{"version":4,"future":{}}"#).unwrap_err();
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
}
