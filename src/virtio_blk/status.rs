//! The status byte that ends every request (virtio 1.3, section 5.2.6).

use virtio_bindings::virtio_blk as spec;

use crate::error::ErrorKind;

/// How a request ended, as its driver reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Done.
    Ok,
    /// The device or the request itself failed.
    IoErr,
    /// The device does not do such requests.
    Unsupported,
}

impl Status {
    /// The byte to store.
    #[must_use]
    pub fn to_byte(self) -> u8 {
        let value = match self {
            Self::Ok => spec::VIRTIO_BLK_S_OK,
            Self::IoErr => spec::VIRTIO_BLK_S_IOERR,
            Self::Unsupported => spec::VIRTIO_BLK_S_UNSUPP,
        };
        u8::try_from(value).expect("status values fit their byte")
    }
}

/// What a guest is told of a failure of this kind. The specification has but two words for it.
#[must_use]
pub fn status_of(kind: ErrorKind) -> Status {
    match kind {
        ErrorKind::Unsupported => Status::Unsupported,
        _ => Status::IoErr,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_unsupported_is_told_so() {
        assert_eq!(status_of(ErrorKind::Unsupported).to_byte(), 2);
        for kind in [
            ErrorKind::Io,
            ErrorKind::NoSpace,
            ErrorKind::ReadOnly,
            ErrorKind::Refused,
        ] {
            assert_eq!(status_of(kind).to_byte(), 1);
        }
        assert_eq!(Status::Ok.to_byte(), 0);
    }
}
