//! Setting a header extension of an existing image so that a power cut leaves the old header or the new one.
//!
//! ```text
//! before   ├─ fields ─┼─ old extension ─┼─ end mark ─┼─ backing file name ─┤
//! added    ├─ fields ─┼─ void ──────────┼─ new extension ─┼─ end mark ─┼─ backing file name ─┤
//! next     ├─ fields ─┼─ newer extension┼─ void ──────────┼─ end mark ─┼─ backing file name ─┤
//! ```
//!
//! # Invariants
//!
//! 1. Everything is written where the header in force does not look, and made durable. Then one write inside one
//!    sector brings it into force: of the name's offset, and after that of the extension in place of the end mark; or
//!    of the prefix of an extension, which never crosses a sector.
//! 2. An extension that was there already is superseded by a later one of its type, and made void then. So there are
//!    two of one type after a power cut alone: stock QEMU turns the order of those that it does not know around when
//!    it writes a header, and the older one would come back.
//! 3. Room of void extensions is used again.
//! 4. Where there is no room for both, the list is written anew, if that is a change of one sector
//!    (`qcow2::header_switch`).

use super::header::Header;
use super::header_extension::{
    ExtensionType, HeaderExtensions, PREFIX, Placed, VOID_EXTENSION, prefix,
};
use super::header_switch::{Switch, put};
use crate::error::Result;
use crate::storage::Storage;

/// Sets an extension of the image in `storage`, which nobody has open: whoever has would not learn of it, and might
/// write the old header back. (An open image has [`Qcow2::set_extension`](super::Qcow2::set_extension).)
///
/// # Errors
/// [`ErrorKind::InvalidConfig`](crate::error::ErrorKind::InvalidConfig) if the extension does not fit the first
/// cluster, or not beside what is there, and nothing is changed; those of [`Header::read`] and of the storage.
pub async fn set_extension(
    storage: &dyn Storage,
    extension_type: ExtensionType,
    data: &[u8],
) -> Result<()> {
    let header = Header::read(storage).await?;
    header.require_writable()?;
    let there = Room::of(&header, extension_type);
    if header.extension(extension_type) == Some(data) {
        return there.make_void(storage, there.superseded()).await;
    }
    if let Some(slot) = there.slot_for(data.len()) {
        return there.fill(storage, slot, extension_type, data).await;
    }
    match Append::plan(&header, extension_type, data) {
        Some(append) => {
            append.run(storage, header).await?;
            there.make_void(storage, &there.same).await
        }
        None => {
            let mut new = header.clone().with_extension(extension_type, data.to_vec());
            new.extensions.remove(VOID_EXTENSION);
            let switch = Switch::plan(storage, header, &[vec![new]]).await?;
            switch.run(storage).await
        }
    }
}

/// What there is of one type in a header, and the room that void extensions leave. Places are from the beginning of
/// the file.
struct Room {
    /// Extensions of the type, in their order: the last one is in force.
    same: Vec<Placed>,
    /// Runs of void extensions, each as one.
    void: Vec<Placed>,
}

impl Room {
    fn of(header: &Header, extension_type: ExtensionType) -> Self {
        let mut room = Self {
            same: Vec::new(),
            void: Vec::new(),
        };
        for mut placed in header.extensions.placed() {
            placed.at += header.header_length();
            if placed.extension_type == extension_type {
                room.same.push(placed);
            } else if placed.extension_type == VOID_EXTENSION {
                match room.void.last_mut() {
                    Some(last) if last.at + PREFIX + last.capacity == placed.at => {
                        last.capacity += PREFIX + placed.capacity;
                    }
                    _ => room.void.push(placed),
                }
            }
        }
        room
    }

    /// Those that are not in force.
    fn superseded(&self) -> &[Placed] {
        self.same.split_last().map_or(&[], |(_, rest)| rest)
    }

    /// The smallest void room that has place for `len` bytes.
    fn slot_for(&self, len: usize) -> Option<Placed> {
        let fitting = self.void.iter().filter(|void| void.capacity >= len);
        fitting.min_by_key(|void| void.capacity).copied()
    }

    /// Puts an extension into void room (invariant 1): first what the prefix in force skips, then the new prefix.
    async fn fill(
        &self,
        storage: &dyn Storage,
        slot: Placed,
        extension_type: ExtensionType,
        data: &[u8],
    ) -> Result<()> {
        put(storage, slot.at, &prefix(VOID_EXTENSION, slot.capacity)?).await?;
        let mut body = data.to_vec();
        body.resize(data.len().next_multiple_of(PREFIX), 0);
        if let Some(rest) = (slot.capacity - body.len()).checked_sub(PREFIX) {
            body.extend(prefix(VOID_EXTENSION, rest)?);
        }
        put(storage, slot.at + PREFIX, &body).await?;
        // If those that are not in force went last, one of them would be in force for a moment.
        self.make_void(storage, self.superseded()).await?;
        put(storage, slot.at, &prefix(extension_type, data.len())?).await?;
        self.make_void(storage, &self.same).await
    }

    async fn make_void(&self, storage: &dyn Storage, list: &[Placed]) -> Result<()> {
        for placed in list {
            put(
                storage,
                placed.at,
                &prefix(VOID_EXTENSION, placed.capacity)?,
            )
            .await?;
        }
        Ok(())
    }
}

/// Where things go when an extension is added behind all others.
struct Append {
    /// The new extension and the new end mark.
    extension: Vec<u8>,
    /// The end mark in force, which the new extension replaces.
    end_mark: usize,
    /// Where the backing file name goes, if it has to make room.
    name_at: Option<usize>,
}

impl Append {
    /// `None` if there is no room to do it in safe steps.
    fn plan(header: &Header, extension_type: ExtensionType, data: &[u8]) -> Option<Self> {
        let mut added = HeaderExtensions::default();
        added.set(extension_type, data.to_vec());
        let mut extension = Vec::new();
        added.encode(&mut extension).ok()?;

        let cluster = usize::try_from(header.cluster_size()).ok()?;
        let area_end = match header.backing_file_offset {
            0 => cluster,
            offset => usize::try_from(offset).ok()?,
        };
        let end_mark = header.header_length() + header.extensions.encoded_len();
        if end_mark + PREFIX > area_end {
            // The list ends with its area, and has no end mark that could be replaced.
            return None;
        }
        let new_end = end_mark.checked_add(extension.len())?;
        let name_at = if new_end <= area_end {
            None
        } else {
            let name_len = header.backing_file.as_ref()?.len();
            let behind_both = new_end.max(area_end + name_len);
            (behind_both + name_len <= cluster).then_some(Some(behind_both))?
        };
        Some(Self {
            extension,
            end_mark,
            name_at,
        })
    }

    async fn run(&self, storage: &dyn Storage, mut header: Header) -> Result<()> {
        if let (Some(at), Some(name)) = (self.name_at, header.backing_file.as_ref()) {
            put(storage, at, name.as_encoded_bytes()).await?;
            header.backing_file_offset = at as u64;
            put(storage, 0, &header.encode_fields()).await?;
        }
        let (prefix, behind) = self.extension.split_at(PREFIX);
        put(storage, self.end_mark + PREFIX, behind).await?;
        put(storage, self.end_mark, prefix).await
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::error::{Error, ErrorKind};
    use crate::image::{Access, Image};
    use crate::qcow2::Qcow2;
    use crate::qcow2::create::{BackingReference, CreateOptions, create};
    use crate::qcow2::header::Version;
    use crate::qcow2::header_extension::SEETHROUGH_EXTENSION;
    use crate::storage::{CrashStorage, Delays, IoFuture, Lost, MemoryStorage, ZeroMode};
    use crate::sys::{IoBuf, block_on};
    use crate::units::{GuestOffset, HostOffset};
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    /// Fails every write after the first few, in whose place it leaves nothing.
    pub(in crate::qcow2) struct PowerCut {
        storage: MemoryStorage,
        writes_left: AtomicU64,
    }

    impl PowerCut {
        /// A storage that holds `bytes` and takes this many writes.
        pub(in crate::qcow2) fn after(writes: u64, bytes: Vec<u8>) -> Self {
            Self {
                storage: MemoryStorage::new(bytes),
                writes_left: AtomicU64::new(writes),
            }
        }
    }

    impl Storage for PowerCut {
        fn readv(&self, at: HostOffset, buf: IoBuf) -> IoFuture<'_> {
            self.storage.readv(at, buf)
        }
        fn writev(&self, at: HostOffset, buf: IoBuf) -> IoFuture<'_> {
            let left = self.writes_left.load(Ordering::Relaxed);
            if left == 0 {
                let error = Error::new(ErrorKind::Io, "power cut");
                return IoFuture::ready(Err(error));
            }
            self.writes_left.store(left - 1, Ordering::Relaxed);
            self.storage.writev(at, buf)
        }
        fn flush(&self) -> IoFuture<'_> {
            self.storage.flush()
        }
        fn discard(&self, at: HostOffset, len: u64) -> IoFuture<'_> {
            self.storage.discard(at, len)
        }
        fn write_zeroes(&self, at: HostOffset, len: u64, mode: ZeroMode) -> IoFuture<'_> {
            self.storage.write_zeroes(at, len, mode)
        }
        fn set_len(&self, len: u64) -> IoFuture<'_> {
            self.storage.set_len(len)
        }
        fn len(&self) -> u64 {
            self.storage.len()
        }
        fn alignment(&self) -> u32 {
            1
        }
        fn name(&self) -> &str {
            "power cut"
        }
    }

    fn header(backing: Option<&str>) -> Header {
        let mut header = Header::new(Version::V3, 12, 1 << 20);
        header.l1_size = 1;
        header.l1_table_offset = HostOffset(3 << 12);
        header.refcount_table_offset = HostOffset(1 << 12);
        header.refcount_table_clusters = 1;
        header.backing_file = backing.map(Into::into);
        header.with_extension(ExtensionType(0x1234), b"another program's".to_vec())
    }

    fn set(storage: &dyn Storage, data: &[u8]) -> Result<()> {
        block_on(set_extension(storage, SEETHROUGH_EXTENSION, data))
    }

    fn declared(storage: &dyn Storage) -> Option<Vec<u8>> {
        let header = block_on(Header::read(storage)).unwrap();
        header.extension(SEETHROUGH_EXTENSION).map(<[u8]>::to_vec)
    }

    #[test]
    fn a_power_cut_leaves_the_old_header_or_the_new_one_whatever_is_lost() {
        let mut header = Header::new(Version::V3, 9, 1 << 20);
        header.l1_size = 32;
        header.l1_table_offset = HostOffset(1024);
        header.refcount_table_offset = HostOffset(512);
        header.refcount_table_clusters = 1;
        header.backing_file = Some("base".into());
        let before = header.encode().unwrap();
        let storage = CrashStorage::new(before.clone(), Delays::none());
        let data = [7; 40];
        block_on(set_extension(&storage, SEETHROUGH_EXTENSION, &data)).unwrap();
        for cut in storage.moments() {
            for seed in 0..16 {
                let left = storage.after_power_cut(cut, Lost::Some { seed });
                let left = Header::parse(&left).unwrap();
                assert_eq!(left.backing_file, header.backing_file);
                let found = left.extension(SEETHROUGH_EXTENSION);
                assert!(found.is_none() || found == Some(&data), "{cut:?} {seed}");
            }
        }
        let left = storage.after_power_cut(storage.now(), Lost::All);
        let left = Header::parse(&left).unwrap();
        assert_eq!(left.extension(SEETHROUGH_EXTENSION), Some(&data[..]));
    }

    #[test]
    fn after_a_power_cut_the_old_header_or_the_new_one_is_there() {
        for backing in [None, Some("base.qcow2"), Some(&*"n".repeat(1000))] {
            for old in [None, Some(b"old".to_vec())] {
                let mut before = header(backing);
                if let Some(old) = &old {
                    before = before.with_extension(SEETHROUGH_EXTENSION, old.clone());
                }
                let bytes = before.encode().unwrap();
                let new = vec![b'x'; 700];
                let mut writes = 0;
                loop {
                    let storage = PowerCut::after(writes, bytes.clone());
                    let result = set(&storage, &new);
                    let after = block_on(Header::read(&storage)).unwrap();
                    assert_eq!(after.backing_file, before.backing_file);
                    assert!(after.extension(ExtensionType(0x1234)).is_some());
                    let declared = declared(&storage);
                    if result.is_ok() {
                        assert_eq!(declared.as_ref(), Some(&new));
                        break;
                    }
                    assert!(
                        declared == old || declared.as_ref() == Some(&new),
                        "{backing:?} cut after {writes} writes"
                    );
                    writes += 1;
                }
                assert!(writes >= 2);
            }
        }
    }

    /// The type of every extension of ours, in their order.
    fn ours(storage: &dyn Storage) -> Vec<ExtensionType> {
        let header = block_on(Header::read(storage)).unwrap();
        let types = header.extensions.types();
        types
            .filter(|one| [SEETHROUGH_EXTENSION, VOID_EXTENSION].contains(one))
            .collect()
    }

    #[test]
    fn an_extension_that_changes_again_and_again_keeps_to_two_places() {
        let storage = MemoryStorage::new(header(Some("base.qcow2")).encode().unwrap());
        let mut places = Vec::new();
        for round in 0..50u8 {
            let data = vec![round; 200 + usize::from(round % 7)];
            set(&storage, &data).unwrap();
            assert_eq!(declared(&storage), Some(data));
            let ours = ours(&storage);
            let valid = |one: &&ExtensionType| **one == SEETHROUGH_EXTENSION;
            assert_eq!(ours.iter().filter(valid).count(), 1, "round {round}");
            places.push(ours.len());
        }
        assert!(places.iter().all(|places| *places <= 4), "{places:?}");
        let header = block_on(Header::read(&storage)).unwrap();
        assert_eq!(header.backing_file.as_deref(), Some("base.qcow2".as_ref()));
        assert!(header.extension(ExtensionType(0x1234)).is_some());
    }

    #[test]
    fn a_power_cut_in_any_of_many_changes_leaves_the_old_extension_or_the_new_one() {
        for cut in 0..120 {
            let storage = PowerCut::after(cut, header(Some("base")).encode().unwrap());
            let mut old = None;
            for round in 0..20u8 {
                let new = vec![round; 100 + usize::from(round) * 37 % 90];
                if set(&storage, &new).is_err() {
                    let left = declared(&storage);
                    assert!(left == old || left == Some(new), "cut after {cut} writes");
                    break;
                }
                old = Some(new);
            }
        }
    }

    #[test]
    fn an_open_image_goes_on_with_the_header_that_its_extension_was_put_into() {
        let storage = Arc::new(MemoryStorage::new(Vec::new()));
        let options = CreateOptions {
            backing: Some(BackingReference {
                file: "base".into(),
                format: "raw".to_owned(),
            }),
            ..CreateOptions::new(1 << 20)
        };
        block_on(create(storage.as_ref(), &options)).unwrap();
        let open = |access| {
            let storage: Arc<dyn Storage> = Arc::clone(&storage) as _;
            block_on(Qcow2::open(storage, None, access)).unwrap()
        };
        let image = open(Access::ReadWrite);
        for round in 0..9u8 {
            let data = vec![round; 1000];
            block_on(image.set_extension(SEETHROUGH_EXTENSION, &data)).unwrap();
            let buf = IoBuf::from_bytes(&[round; 512]);
            block_on(image.write(GuestOffset(u64::from(round) << 16), buf)).unwrap();
            assert_eq!(declared(storage.as_ref()), Some(data));
        }
        block_on(image.close()).unwrap();
        let image = open(Access::ReadOnly);
        let error = block_on(image.set_extension(SEETHROUGH_EXTENSION, b"x")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ReadOnly);
        for round in 0..9u8 {
            let buf = IoBuf::zeroed(512);
            block_on(image.read(GuestOffset(u64::from(round) << 16), buf.clone())).unwrap();
            assert_eq!(buf.to_vec(), [round; 512]);
        }
        let header = block_on(Header::read(storage.as_ref())).unwrap();
        assert_eq!(header.backing_file.as_deref(), Some("base".as_ref()));
    }

    #[test]
    fn superseded_extensions_go_when_room_is_short() {
        let storage = MemoryStorage::new(header(Some("base.qcow2")).encode().unwrap());
        for round in 0..20u8 {
            let data = vec![round; 1500];
            set(&storage, &data).unwrap();
            assert_eq!(declared(&storage), Some(data));
        }
        let header = block_on(Header::read(&storage)).unwrap();
        assert_eq!(header.backing_file.as_deref(), Some("base.qcow2".as_ref()));
    }

    #[test]
    fn an_extension_that_does_not_fit_changes_nothing() {
        let bytes = header(Some("base.qcow2")).encode().unwrap();
        let storage = MemoryStorage::new(bytes.clone());
        let error = set(&storage, &[0; 4000]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidConfig);
        assert!(storage.contents() == bytes);
    }
}
