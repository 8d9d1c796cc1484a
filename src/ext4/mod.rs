//! The on-disk structures of ext4, their checksums and their layout: pure functions over bytes.
