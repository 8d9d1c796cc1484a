//! What a check has found, in numbers and line by line.

use std::fmt;

/// How bad one finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// Metadata contradicts itself: data is lost already, or the next write may destroy some.
    Corruption,
    /// Room is taken that nothing uses.
    Leak,
    /// A repair has changed something.
    Repair,
}

/// One line of a check's report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// What it is, in a sentence without a full stop.
    pub text: String,
}

/// The line as `qemu-img check` begins it.
impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.severity {
            Severity::Corruption => "ERROR",
            Severity::Leak => "Leaked",
            Severity::Repair => "Repairing",
        };
        write!(f, "{kind} {}", self.text)
    }
}

/// The numbers of a check, counted as `qemu-img check` counts them: a broken entry counts once for every table
/// that leads to it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Contradictions in the metadata.
    pub corruptions: u64,
    /// Host clusters with a higher refcount than there are references.
    pub leaks: u64,
    /// The end of the last host cluster in use, in bytes.
    pub image_end_offset: u64,
    /// Guest clusters of the disk.
    pub total_clusters: u64,
    /// Guest clusters with a place in the host file.
    pub allocated_clusters: u64,
    /// Of these, those that do not follow their predecessor in the file.
    pub fragmented_clusters: u64,
    /// Of these, those that are compressed.
    pub compressed_clusters: u64,
}

impl Report {
    /// Whether nothing is wrong.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.corruptions == 0 && self.leaks == 0
    }
}

/// Takes findings as they are made.
pub type Listener<'a> = &'a mut dyn FnMut(Finding);
