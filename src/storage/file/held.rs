//! Telling holes from data, as the host's filesystem knows them (lseek(2), `SEEK_DATA`).

use super::FileStorage;
use crate::storage::{Held, Storage};
use crate::sys;
use crate::units::HostOffset;

impl FileStorage {
    /// A block device is all data, and so is a file of a filesystem that does not tell.
    pub(super) fn held_on_host(&self, at: HostOffset, len: u64) -> (Held, u64) {
        if self.id.is_block_device() || len == 0 {
            return (Held::Data, len);
        }
        if at.0 >= self.len() {
            return (Held::Hole, len);
        }
        match sys::next_data(&self.file, at.0) {
            Ok(Some(data)) if data > at.0 => (Held::Hole, len.min(data - at.0)),
            Ok(Some(_)) => match sys::next_hole(&self.file, at.0) {
                Ok(Some(hole)) if hole > at.0 => (Held::Data, len.min(hole - at.0)),
                _ => (Held::Data, len),
            },
            Ok(None) => (Held::Hole, len),
            Err(_) => (Held::Data, len),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::Access;
    use crate::storage::{CacheMode, ZeroMode};
    use crate::sys::{IoBuf, block_on};

    const BLOCK: u64 = 64 << 10;

    #[test]
    fn holes_and_data_alternate_up_to_the_end_of_the_file_and_behind_it_is_a_hole() {
        // A filesystem with holes, which /tmp may not be.
        let directory = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let path = directory.path().join("sparse");
        let file = FileStorage::create_new(&path, CacheMode::Writeback).unwrap();
        block_on(async {
            file.set_len(4 * BLOCK).await.unwrap();
            let data = IoBuf::from_bytes(&vec![1; 64 << 10]);
            file.writev(HostOffset(BLOCK), data).await.unwrap();
        });
        for (at, len, expected) in [
            (0, 10 * BLOCK, (Held::Hole, BLOCK)),
            (100, 50, (Held::Hole, 50)),
            (BLOCK, 10 * BLOCK, (Held::Data, BLOCK)),
            (BLOCK + 1000, 1 << 40, (Held::Data, BLOCK - 1000)),
            (2 * BLOCK, BLOCK, (Held::Hole, BLOCK)),
            (4 * BLOCK, 7, (Held::Hole, 7)),
        ] {
            assert_eq!(file.held(HostOffset(at), len), expected, "{len} at {at}");
        }
        assert_eq!(file.bytes_on_host(), Some(BLOCK));
        block_on(file.write_zeroes(HostOffset(BLOCK), BLOCK, ZeroMode::MayUnmap)).unwrap();
        assert_eq!(file.held(HostOffset(0), BLOCK * 4).0, Held::Hole);
        assert_eq!(
            FileStorage::open(&path, Access::ReadOnly, CacheMode::Writeback)
                .unwrap()
                .bytes_on_host(),
            Some(0)
        );
    }
}
