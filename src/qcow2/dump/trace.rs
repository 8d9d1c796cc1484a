//! The way of one guest offset through the tables.

use super::{Dump, Entry, Meaning, Refcount};
use crate::error::Result;
use crate::qcow2::engine::read_table;
use crate::units::{GuestOffset, HostOffset};

/// What holds a guest byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holds {
    /// The byte of the data file there.
    Data(HostOffset),
    /// Compressed data that begins there.
    Compressed(HostOffset),
    /// It reads as zero.
    Zero,
    /// The image does not say: the backing image decides, or it reads as zero where there is none.
    Unallocated,
    /// An entry on the way is broken.
    Unknown,
    /// The disk ends before.
    BeyondEnd,
}

/// The way of one guest offset.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trace {
    /// The guest offset.
    pub at: GuestOffset,
    /// The L1 entry; none if the table ends before.
    pub l1: Option<Entry>,
    /// What is said of the L2 table's cluster.
    pub table_refcount: Option<Refcount>,
    /// The L2 entry, if there is a table.
    pub l2: Option<Entry>,
    /// The subcluster that holds the byte, in an image with extended L2 entries.
    pub subcluster: Option<u64>,
    /// What holds the byte.
    pub holds: Holds,
    /// The host clusters that the L2 entry refers to, each with what is said of it.
    pub refcounts: Vec<(HostOffset, Refcount)>,
}

impl Dump<'_> {
    /// Follows a guest offset through the active tables.
    ///
    /// # Errors
    /// The storage's.
    pub async fn trace(&self, at: GuestOffset) -> Result<Trace> {
        let cluster = self.geometry.guest_cluster(at);
        let index = self.geometry.l1_index(cluster) as u64;
        let mut trace = Trace {
            at,
            l1: None,
            table_refcount: None,
            l2: None,
            subcluster: None,
            holds: Holds::Unallocated,
            refcounts: Vec::new(),
        };
        if at.0 >= self.header.virtual_size() {
            trace.holds = Holds::BeyondEnd;
        }
        if index >= u64::from(self.header.l1_size) {
            return Ok(trace);
        }
        let l1_at = HostOffset(self.header.l1_table_offset.0 + index * 8);
        let word = self.word(l1_at).await?;
        let l1 = Entry {
            index,
            at: l1_at,
            word,
            bitmap: None,
            meaning: self.l1_meaning(word),
        };
        trace.l1 = Some(l1);
        let table = match l1.meaning {
            Meaning::Table { at, .. } => at,
            Meaning::Broken(_) => {
                trace.holds = Holds::Unknown;
                return Ok(trace);
            }
            _ => return Ok(trace),
        };
        trace.table_refcount = Some(self.refcount(table).await?);
        self.trace_in_table(&mut trace, table).await?;
        Ok(trace)
    }

    async fn trace_in_table(&self, trace: &mut Trace, table: HostOffset) -> Result<()> {
        let geometry = &self.geometry;
        let cluster = geometry.guest_cluster(trace.at);
        let index = geometry.l2_entry_offset(cluster) / geometry.l2_entry_size();
        let bytes = read_table(self.storage, table, geometry.cluster_size()).await?;
        let Some(entry) = self.l2_entry(table, &bytes, index) else {
            return Ok(());
        };
        trace.l2 = Some(entry);
        let within = geometry.within_cluster(trace.at.0);
        let subcluster = within / geometry.subcluster_size();
        if geometry.has_extended_l2() {
            trace.subcluster = Some(subcluster);
        }
        let (holds, used) = match entry.meaning {
            Meaning::Broken(_) => (Holds::Unknown, None),
            Meaning::Compressed { at, len } => (Holds::Compressed(at), Some((at, len))),
            Meaning::Cluster {
                host,
                allocated,
                zero,
                ..
            } => {
                let is_set = |mask: u32| u64::from(mask) >> subcluster & 1 == 1;
                let holds = match host {
                    Some(host) if is_set(allocated) => Holds::Data(HostOffset(host.0 + within)),
                    _ if is_set(zero) => Holds::Zero,
                    _ => Holds::Unallocated,
                };
                (holds, host.map(|host| (host, geometry.cluster_size())))
            }
            Meaning::Nothing | Meaning::Table { .. } => (Holds::Unallocated, None),
        };
        if trace.holds != Holds::BeyondEnd {
            trace.holds = holds;
        }
        if let Some((at, len)) = used {
            let first = geometry.host_cluster(at).0;
            let last = geometry
                .host_cluster(HostOffset(at.0.saturating_add(len - 1)))
                .0;
            for cluster in first..=last {
                let start = HostOffset(cluster << geometry.cluster_bits());
                trace.refcounts.push((start, self.refcount(start).await?));
            }
        }
        Ok(())
    }
}
