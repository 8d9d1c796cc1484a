//! The feature bits of a version 3 header (qcow2 specification, "Header", bytes 72 to 95).
//!
//! A program that does not know a bit must refuse the image (incompatible), may ignore it (compatible), or
//! clears it before it writes anything (autoclear).

/// The type byte of an entry of the feature name table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FeatureType {
    /// Unknown bits forbid opening the image.
    Incompatible,
    /// Unknown bits may be ignored.
    Compatible,
    /// Unknown bits are cleared before the first write.
    Autoclear,
}

impl FeatureType {
    /// The value in the feature name table.
    #[must_use]
    pub fn to_byte(self) -> u8 {
        match self {
            Self::Incompatible => 0,
            Self::Compatible => 1,
            Self::Autoclear => 2,
        }
    }
}

macro_rules! feature_set {
    (
        $(#[$doc:meta])* $name:ident {
            $($(#[$bit_doc:meta])* $constant:ident = $bit:literal, $text:literal;)*
        }
    ) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct $name(pub u64);

        impl $name {
            $(
                $(#[$bit_doc])*
                pub const $constant: Self = Self(1 << $bit);
            )*

            /// Every bit that the specification defines: its number and its name.
            pub const KNOWN: &'static [(u8, &'static str)] = &[$(($bit, $text)),*];

            /// Whether every bit of `other` is set.
            #[must_use]
            pub fn contains(self, other: Self) -> bool {
                self.0 & other.0 == other.0
            }

            /// This set with the bits of `other`.
            #[must_use]
            pub fn with(self, other: Self) -> Self {
                Self(self.0 | other.0)
            }

            /// This set without the bits of `other`.
            #[must_use]
            pub fn without(self, other: Self) -> Self {
                Self(self.0 & !other.0)
            }

            /// The bits that the specification does not define.
            #[must_use]
            pub fn unknown(self) -> Self {
                let known = Self::KNOWN.iter().fold(0, |all, (bit, _)| all | 1 << bit);
                Self(self.0 & !known)
            }

            /// The numbers of the bits that are set, lowest first.
            pub fn bits(self) -> impl Iterator<Item = u8> {
                (0..64).filter(move |bit| self.0 >> bit & 1 == 1)
            }
        }
    };
}

feature_set!(
    /// Features without which the image cannot be understood.
    IncompatibleFeatures {
        /// Refcounts may be out of date and must be rebuilt before the first write.
        DIRTY = 0, "dirty bit";
        /// Metadata is known to be damaged; no write until a repair.
        CORRUPT = 1, "corrupt bit";
        /// Guest data lies in another file.
        EXTERNAL_DATA_FILE = 2, "external data file";
        /// Compressed clusters use the header's compression type, which is not deflate.
        COMPRESSION_TYPE = 3, "compression type";
        /// L2 entries are 128 bits wide and describe subclusters.
        EXTENDED_L2 = 4, "extended L2 entries";
    }
);

feature_set!(
    /// Features that may be ignored.
    CompatibleFeatures {
        /// Refcount updates may be postponed, with the dirty bit set meanwhile.
        LAZY_REFCOUNTS = 0, "lazy refcounts";
    }
);

feature_set!(
    /// Features that a writer who does not keep them up to date has to clear.
    AutoclearFeatures {
        /// The bitmaps extension is consistent with the data.
        BITMAPS = 0, "bitmaps";
        /// The external data file reads as the raw disk.
        RAW_EXTERNAL_DATA = 1, "raw external data";
    }
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_bits_are_those_without_a_name() {
        let set = IncompatibleFeatures(1 << 4 | 1 << 5 | 1 << 63);
        assert!(set.contains(IncompatibleFeatures::EXTENDED_L2));
        assert_eq!(set.unknown().bits().collect::<Vec<_>>(), [5, 63]);
        assert_eq!(set.without(set), IncompatibleFeatures::default());
    }
}
