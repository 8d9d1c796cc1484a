//! Keeping the index up to what the base writes to its journal.

use super::index::Index;
use super::log::{Journal, ReadAhead};
use crate::error::Result;
use crate::ext4::jbd2_log::{LogFormat, LogScan, is_at_or_after};
use crate::units::LogBlock;

/// Where the follower is in the log.
#[derive(Clone, Copy, Debug)]
struct Head {
    format: LogFormat,
    /// Where the transaction after the last committed one will begin.
    at: LogBlock,
    /// Its number.
    sequence: u32,
}

/// Follows one journal.
#[derive(Debug, Default)]
pub(super) struct Follower {
    /// `None` while the journal has nothing to replay.
    head: Option<Head>,
}

impl Follower {
    /// Whether any write to the journal may complete a transaction, not a commit block alone.
    pub(super) fn awaits_more(&self) -> bool {
        self.head.is_some_and(|head| head.format.commits_early())
    }

    /// Takes in what the journal's superblock says now.
    ///
    /// # Errors
    /// What reading the disk returns.
    pub(super) async fn note_superblock(&mut self, journal: &Journal, index: &Index) -> Result<()> {
        let superblock = journal.superblock().await?;
        let Some(superblock) = superblock.filter(|superblock| !superblock.is_empty()) else {
            self.head = None;
            index.clear();
            return Ok(());
        };
        let tail = Head {
            format: journal.format(&superblock),
            at: LogBlock(superblock.start),
            sequence: superblock.sequence,
        };
        match self.head {
            Some(head) if head.goes_on_from(&tail) => index.forget_before(tail.sequence),
            _ => {
                index.clear();
                self.head = Some(tail);
            }
        }
        Ok(())
    }

    /// Takes in all transactions that have been committed since.
    ///
    /// # Errors
    /// What reading the disk returns.
    pub(super) async fn advance(&mut self, journal: &Journal, index: &Index) -> Result<()> {
        let Some(head) = &mut self.head else {
            return Ok(());
        };
        let filesystem = journal.filesystem();
        let mut scan = LogScan::new(head.format, head.at, head.sequence);
        let mut ahead = ReadAhead::default();
        while let Some(bytes) = journal.next_of(&scan, &mut ahead).await? {
            if let Some(transaction) = scan.supply(bytes) {
                index.commit(&transaction, |block| filesystem.is_private(block));
                (head.at, head.sequence) = scan.head();
            }
        }
        Ok(())
    }
}

impl Head {
    /// Whether a log that begins at `tail` is the one that was followed up to here, its beginning moved on.
    fn goes_on_from(&self, tail: &Self) -> bool {
        let is_same_place = self.sequence != tail.sequence || self.at == tail.at;
        self.format == tail.format && is_same_place && is_at_or_after(self.sequence, tail.sequence)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ext4::jbd2::JournalSuperblock;

    fn head(at: u32, sequence: u32) -> Head {
        let journal = JournalSuperblock {
            maxlen: 1024,
            log_end: 1024,
            first: 1,
            sequence,
            start: at,
            errno: 0,
            feature_compat: 0,
            feature_incompat: 0,
            uuid: [0; 16],
        };
        Head {
            format: LogFormat::new(&journal, 1024),
            at: LogBlock(at),
            sequence,
        }
    }

    #[test]
    fn a_log_goes_on_if_its_beginning_has_only_moved_on() {
        let followed = head(100, 7);
        assert!(followed.goes_on_from(&head(50, 5)));
        assert!(followed.goes_on_from(&head(100, 7)));
        assert!(!followed.goes_on_from(&head(1, 7)), "begun anew elsewhere");
        assert!(
            !followed.goes_on_from(&head(120, 8)),
            "further than was seen"
        );
        assert!(
            head(3, 0).goes_on_from(&head(900, u32::MAX)),
            "numbers wrap around"
        );
        let mut other = head(50, 5);
        other.format = LogFormat::new(
            &JournalSuperblock {
                maxlen: 1024,
                log_end: 1024,
                first: 1,
                sequence: 5,
                start: 50,
                errno: 0,
                feature_compat: 0,
                feature_incompat: 0x10,
                uuid: [0; 16],
            },
            1024,
        );
        assert!(!followed.goes_on_from(&other), "written otherwise");
    }
}
