//! A whole L2 table in memory, for work on tables that no guest uses meanwhile (qcow2 specification, "Cluster
//! mapping").

use super::entry::{Cluster, Defect, L2Entry};
use super::geometry::{Geometry, to_usize};
use super::mapping::entry_at;

/// The bytes of an L2 table.
#[derive(Clone, Debug)]
pub(super) struct L2Table {
    geometry: Geometry,
    bytes: Vec<u8>,
}

impl L2Table {
    /// The table with these bytes, one cluster of them.
    pub(super) fn new(geometry: Geometry, bytes: Vec<u8>) -> Self {
        Self { geometry, bytes }
    }

    /// How many entries it has.
    pub(super) fn len(&self) -> usize {
        self.bytes.len() / self.entry_size()
    }

    /// The entry at `index`; an empty one behind the end.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(super) fn entry(&self, index: usize) -> Result<L2Entry, Defect> {
        entry_at(&self.geometry, &self.bytes, index * self.entry_size())
            .unwrap_or(Ok(L2Entry::Plain(Cluster::default())))
    }

    /// Sets the entry at `index`.
    pub(super) fn set(&mut self, index: usize, cluster: Cluster) {
        let (descriptor, bitmap) = cluster.encode(&self.geometry);
        let size = self.entry_size();
        let entry = self.bytes.chunks_exact_mut(size).nth(index);
        let words = entry
            .into_iter()
            .flat_map(|entry| entry.chunks_exact_mut(8));
        for (word, value) in words.zip([descriptor, bitmap]) {
            word.copy_from_slice(&value.to_be_bytes());
        }
    }

    /// The bytes.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    fn entry_size(&self) -> usize {
        to_usize(self.geometry.l2_entry_size())
    }
}

#[cfg(test)]
mod tests {
    use super::super::geometry::tests::geometry;
    use super::*;
    use crate::units::HostOffset;

    #[test]
    fn an_entry_is_set_in_its_place_alone() {
        for extended in [false, true] {
            let mut table = L2Table::new(geometry(16, 4, extended), vec![0; 65536]);
            let last = table.len() - 1;
            let cluster = Cluster {
                host: Some(HostOffset(0x5_0000)),
                copied: true,
                allocated: 1,
                zero: 0,
            };
            table.set(last, cluster);
            assert_eq!(table.entry(last), Ok(L2Entry::Plain(cluster)));
            let before = L2Entry::Plain(Cluster::default());
            assert_eq!(table.entry(last - 1), Ok(before));
            assert_eq!(table.entry(last + 1), Ok(before));
        }
    }
}
