//! What a pin is called: `seethrough-pin-CHILD-NUMBER`, the name of a snapshot of the base.

use std::ffi::{OsStr, OsString};
use std::fmt;

use crate::error::{Error, ErrorKind, Result};

const PREFIX: &str = "seethrough-pin-";

/// Hexadecimal digits of a child's identifier.
const CHILD_DIGITS: usize = 32;

/// The name of a pin.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(in crate::view) struct PinName {
    /// What tells the child from every other one: drawn when it is first pinned.
    child: String,
    /// Counts the child's pins.
    number: u64,
}

impl PinName {
    /// The first pin of a child that `child` tells from all others: 32 hexadecimal digits.
    pub(super) fn first(child: String) -> Self {
        Self { child, number: 1 }
    }

    /// The first pin of the same child.
    pub(super) fn first_of_the_child(&self) -> Self {
        Self::first(self.child.clone())
    }

    /// The pin after this one.
    pub(super) fn next(&self) -> Self {
        Self {
            child: self.child.clone(),
            number: self.number.wrapping_add(1),
        }
    }

    /// Whether this is a pin of the same child.
    pub(super) fn is_of_the_child_of(&self, other: &Self) -> bool {
        self.child == other.child
    }

    /// The pin that a snapshot called `name` is, if it is one.
    pub(super) fn of_snapshot(name: &OsStr) -> Option<Self> {
        let (child, number) = name.to_str()?.strip_prefix(PREFIX)?.split_once('-')?;
        let is_child = child.len() == CHILD_DIGITS
            && child
                .bytes()
                .all(|b| b.is_ascii_hexdigit() && !b.is_ascii_uppercase());
        let number: u64 = number.parse().ok()?;
        is_child.then(|| Self {
            child: child.to_owned(),
            number,
        })
    }

    /// What an overlay says of the pin that it reads: its name, or nothing for none.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] for anything else.
    pub(super) fn of_record(record: &[u8]) -> Result<Option<Self>> {
        if record.is_empty() {
            return Ok(None);
        }
        let name = str::from_utf8(record).ok();
        let name = name.and_then(|name| Self::of_snapshot(OsStr::new(name)));
        name.map(Some).ok_or_else(|| {
            Error::new(
                ErrorKind::Corrupt,
                "what the overlay says of the base's snapshot that it reads makes no sense: serve it with \
                 refresh=live once, which takes that out",
            )
        })
    }

    /// The snapshot's name.
    pub(super) fn snapshot(&self) -> OsString {
        self.to_string().into()
    }
}

impl fmt::Display for PinName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}-{}", self.child, self.number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_read_as_it_is_written_and_other_snapshots_are_no_pins() {
        let first = PinName::first("0123456789abcdef0123456789abcdef".into());
        let second = first.next();
        for name in [&first, &second] {
            assert_eq!(PinName::of_snapshot(&name.snapshot()).as_ref(), Some(name));
            let record = name.to_string();
            assert_eq!(
                PinName::of_record(record.as_bytes()).unwrap().as_ref(),
                Some(name)
            );
        }
        assert_ne!(first, second);
        assert!(second.is_of_the_child_of(&first));
        assert!(!second.is_of_the_child_of(&PinName::first("f".repeat(32))));
        let upper = first.to_string().to_uppercase();
        for other in [
            "",
            "nightly",
            "seethrough-pin-",
            "seethrough-pin-1-1",
            &upper,
        ] {
            assert_eq!(PinName::of_snapshot(OsStr::new(other)), None, "{other}");
        }
        assert_eq!(PinName::of_record(b"").unwrap(), None);
        assert!(PinName::of_record(b"nightly").is_err());
        assert!(PinName::of_record(&[0xff]).is_err());
    }
}
