//! The files that blocks belong to: found in the maps of inodes.

use std::ops::Range;

use super::reader::{File, Reader};
use super::{Found, MAX_OWNERS, Part, Stop, Wanted};

/// Blocks to find the owners of.
struct Target {
    /// Which of what is wanted it is.
    index: usize,
    blocks: Range<u64>,
}

/// Puts the owners of what is `wanted` into `owners`, without their names.
///
/// # Errors
/// [`Stop::Limit`] if there may be more.
pub(super) async fn search(
    reader: &mut Reader<'_>,
    wanted: &[Wanted],
    owners: &mut [Vec<Found>],
) -> Result<(), Stop> {
    let mut targets = Vec::new();
    for (index, wanted) in wanted.iter().enumerate() {
        match wanted {
            Wanted::Bytes(bytes) => {
                let blocks = reader.blocks_of(bytes);
                if !blocks.is_empty() {
                    targets.push(Target { index, blocks });
                }
            }
            Wanted::Inode(number) => {
                let file = reader.file(*number).await?;
                owners[index].extend(file.map(|file| Found {
                    inode: *number,
                    is_directory: file.is_directory(),
                    part: Part::Inode,
                    path: None,
                }));
            }
        }
    }
    let near = targets
        .iter()
        .filter_map(|target| reader.group_of(target.blocks.start));
    let groups = reader.nearest_first(near.collect());
    // A block has one owner: once as many are found as there are blocks, there is no other.
    let mut missing: u64 = targets.iter().map(|t| t.blocks.end - t.blocks.start).sum();
    let mut count = 0;
    for group in groups {
        if missing == 0 {
            break;
        }
        for file in reader.files_of(group).await? {
            let parts = parts_of(reader, &file).await?;
            for target in &targets {
                let owned = parts
                    .iter()
                    .map(|(part, blocks)| (*part, overlap(&target.blocks, blocks)));
                let owned: Vec<_> = owned.filter(|(_, len)| *len > 0).collect();
                let Some((part, _)) = owned.first() else {
                    continue;
                };
                if count == MAX_OWNERS {
                    return Err(Stop::Limit);
                }
                count += 1;
                owners[target.index].push(Found {
                    inode: file.number,
                    is_directory: file.is_directory(),
                    part: *part,
                    path: None,
                });
                // Several files may have the same attributes.
                let own = owned.iter().filter(|(part, _)| *part != Part::Attributes);
                missing = missing.saturating_sub(own.map(|(_, len)| len).sum());
            }
        }
    }
    Ok(())
}

/// All blocks of a file, and what they are to it.
async fn parts_of(reader: &mut Reader<'_>, file: &File) -> Result<Vec<(Part, Range<u64>)>, Stop> {
    let map = reader.map_of(file).await?;
    let one = |part: Part, block: u64| (part, block..block.saturating_add(1));
    let data = map.data.iter().map(|extent| {
        let start = extent.start.0;
        (
            Part::Data,
            start..start.saturating_add(u64::from(extent.len)),
        )
    });
    let nodes = map.nodes.iter().map(|block| one(Part::Map, block.0));
    let attributes = match file.inode.file_acl {
        0 => None,
        block => Some(one(Part::Attributes, block)),
    };
    Ok(data.chain(nodes).chain(attributes).collect())
}

fn overlap(one: &Range<u64>, other: &Range<u64>) -> u64 {
    one.end
        .min(other.end)
        .saturating_sub(one.start.max(other.start))
}
