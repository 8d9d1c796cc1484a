//! The one error type: what kind of failure, what was being done, and the cause.

use std::fmt;

/// The result of anything that can fail for a reason outside the program.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What class of failure an [`Error`] is; callers decide by it, people read the context.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The host failed an I/O operation.
    Io,
    /// Bytes on disk break the rules of their format.
    Corrupt,
    /// The input is sound, but asks for something that is not supported.
    Unsupported,
    /// An address or a length lies outside the disk.
    OutOfBounds,
    /// The host has no room left.
    NoSpace,
    /// A write to something that is read-only.
    ReadOnly,
    /// The view's policy does not let this VM write there.
    Refused,
    /// Arguments, options or a configuration that make no sense.
    InvalidConfig,
    /// Another process, or another part of this one, uses the image.
    InUse,
    /// An earlier failure left the image's metadata in doubt; writes are refused until it is reopened.
    Poisoned,
}

/// A failure: its kind, a sentence that names the thing and the remedy, and the cause.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    context: Box<str>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error without a deeper cause.
    #[must_use]
    pub fn new(kind: ErrorKind, context: impl Into<Box<str>>) -> Self {
        Self {
            kind,
            context: context.into(),
            source: None,
        }
    }

    /// An error with its cause.
    #[must_use]
    pub fn with_source(
        kind: ErrorKind,
        context: impl Into<Box<str>>,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self {
            kind,
            context: context.into(),
            source: Some(source.into()),
        }
    }

    /// A host I/O failure; a full disk becomes [`ErrorKind::NoSpace`].
    #[must_use]
    pub fn io(context: impl Into<Box<str>>, source: std::io::Error) -> Self {
        let kind = match source.kind() {
            std::io::ErrorKind::StorageFull
            | std::io::ErrorKind::QuotaExceeded
            | std::io::ErrorKind::FileTooLarge => ErrorKind::NoSpace,
            _ => ErrorKind::Io,
        };
        Self::with_source(kind, context, source)
    }

    /// The class of the failure.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The same failure seen from further out: `context` goes in front, the kind stays.
    #[must_use]
    pub fn context(self, context: impl Into<Box<str>>) -> Self {
        Self {
            kind: self.kind,
            context: context.into(),
            source: Some(Box::new(self)),
        }
    }
}

/// Prints the whole chain, outermost first, joined by colons: one line a person can act on.
impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.context)?;
        match &self.source {
            Some(source) => write!(f, ": {source}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().map(|source| {
            let source: &(dyn std::error::Error + 'static) = source.as_ref();
            source
        })
    }
}

/// Adds context to the error of a result.
pub trait Context<T> {
    /// Puts `context()` in front of the error, if there is one.
    ///
    /// # Errors
    /// The same error with its context.
    fn context<C: Into<Box<str>>>(self, context: impl FnOnce() -> C) -> Result<T>;
}

impl<T> Context<T> for Result<T> {
    fn context<C: Into<Box<str>>>(self, context: impl FnOnce() -> C) -> Result<T> {
        self.map_err(|error| error.context(context()))
    }
}

impl<T> Context<T> for std::io::Result<T> {
    fn context<C: Into<Box<str>>>(self, context: impl FnOnce() -> C) -> Result<T> {
        self.map_err(|error| Error::io(context(), error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_told_apart_from_other_io_errors() {
        let full = std::io::Error::from_raw_os_error(nix::libc::ENOSPC);
        assert_eq!(Error::io("write", full).kind(), ErrorKind::NoSpace);
        let broken = std::io::Error::from_raw_os_error(nix::libc::EIO);
        assert_eq!(Error::io("write", broken).kind(), ErrorKind::Io);
    }

    #[test]
    fn context_keeps_the_kind_and_prints_outermost_first() {
        let inner: Result<()> = Err(Error::new(ErrorKind::Corrupt, "L2 entry is not aligned"));
        let outer = inner.context(|| "reading tom.qcow2").unwrap_err();
        assert_eq!(outer.kind(), ErrorKind::Corrupt);
        assert_eq!(
            outer.to_string(),
            "reading tom.qcow2: L2 entry is not aligned"
        );
    }
}
