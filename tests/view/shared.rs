//! Shared regions: several VMs write one base's disk, each its own groups, and all read what the others wrote.

use std::fs;
use std::io::Write;
use std::sync::{Arc, Mutex};

use seethrough::error::{Error, ErrorKind};
use seethrough::ext4::layout::Kind;
use seethrough::image::{Image, ImageFuture, Mapped, RawImage, ReadOnlyImage};
use seethrough::storage::{Access, CrashStorage, Delays, FaultStorage, Storage, ZeroMode};
use seethrough::sys::{IoBuf, block_on};
use seethrough::units::{BlockGroup, GuestOffset};
use seethrough::view::View;
use seethrough::view::declaration::{
    BaseDeclaration, ChildDeclaration, Declaration, GroupList, Sharing,
};
use seethrough::view::lease::{Claimant, Keeper};
use seethrough::view::new_child::NewChild;
use seethrough::view::open::{SharedBase, open_base, open_child, open_holder};
use seethrough::view::refusal::Structure;
use seethrough::view::region_change::{evict, release};

use crate::bed::{Bed, Child, Kernel, Recipe, can_mount, region};
use crate::overlay::TestOverlay;
use crate::{
    DEFAULTS, RECIPES, assert_nothing_can_be_changed, block_of, read, use_directory, write,
};

/// Keeps a declaration as an image's header does.
struct Kept(Mutex<Declaration>);

impl Keeper for Kept {
    fn keep<'a>(&'a self, declaration: &'a Declaration) -> ImageFuture<'a> {
        *self.0.lock().unwrap() = declaration.clone();
        Box::pin(std::future::ready(Ok(())))
    }
}

/// A base whose last groups are two shared regions, `photos` and `videos`.
struct Family {
    bed: Bed,
    kept: Arc<Kept>,
    photos: BlockGroup,
}

/// A child's image.
struct Member {
    name: &'static str,
    overlay: Arc<TestOverlay>,
    kept: Arc<Kept>,
}

impl Family {
    fn new(recipe: &Recipe) -> Self {
        let groups: Vec<BlockGroup> = recipe.groups.parse::<GroupList>().unwrap().iter().collect();
        let (first, last) = (groups[0], groups[groups.len() - 1]);
        let shared =
            |name: &str, group: BlockGroup| region(name, &group.to_string(), Sharing::Shared);
        let bed = Bed::with_regions(recipe, &[shared("photos", first), shared("videos", last)]);
        let kept = Arc::new(Kept(Mutex::new(Declaration::Base(bed.declaration.clone()))));
        Self {
            bed,
            kept,
            photos: first,
        }
    }

    fn member(&self, name: &'static str, regions: &[&str]) -> Member {
        let (overlay, declaration) = self.bed.new_child(regions);
        let kept = Arc::new(Kept(Mutex::new(Declaration::Child(declaration))));
        Member {
            name,
            overlay,
            kept,
        }
    }

    /// What the base declares now.
    fn declaration(&self) -> BaseDeclaration {
        match &*self.kept.0.lock().unwrap() {
            Declaration::Base(declaration) => declaration.clone(),
            other => panic!("{other:?}"),
        }
    }

    /// The base as a new process opens it, stored in `disk`.
    fn process_on(&self, disk: Arc<dyn Image>) -> SharedBase {
        let keeper = Arc::clone(&self.kept) as Arc<dyn Keeper>;
        block_on(SharedBase::open_kept(
            disk,
            self.declaration(),
            Some(keeper),
        ))
        .unwrap()
    }

    fn process(&self) -> SharedBase {
        self.process_on(self.bed.base.clone())
    }

    fn assert_flattened_clean(&self, member: &Member, base: &SharedBase) {
        let child = Child {
            overlay: member.overlay.clone(),
            declaration: member.declaration(),
            view: block_on(open_base("unused", base)).unwrap(),
        };
        self.bed.assert_flattened_clean(&child);
    }
}

impl Member {
    fn declaration(&self) -> ChildDeclaration {
        match &*self.kept.0.lock().unwrap() {
            Declaration::Child(child) => child.clone(),
            other => panic!("{other:?}"),
        }
    }

    fn try_open(&self, base: &SharedBase) -> Result<View, Error> {
        let claimant = Claimant {
            name: self.name.to_owned(),
            keeper: Arc::clone(&self.kept) as Arc<dyn Keeper>,
        };
        let declaration = self.declaration();
        let overlay = self.overlay.clone();
        block_on(open_holder(
            self.name,
            overlay,
            &declaration,
            base,
            &claimant,
        ))
    }

    fn open(&self, base: &SharedBase) -> View {
        self.try_open(base).unwrap()
    }

    /// A copy of the image as it is now.
    fn copied(&self, name: &'static str) -> Self {
        Self {
            name,
            overlay: Arc::new(self.overlay.copied()),
            kept: Arc::new(Kept(Mutex::new(Declaration::Child(self.declaration())))),
        }
    }
}

fn refusal(result: Result<View, Error>) -> String {
    let error = result.err().expect("it is refused");
    assert_eq!(error.kind(), ErrorKind::Refused, "{error}");
    error.to_string()
}

#[test]
fn siblings_write_in_the_base_and_read_what_the_others_wrote() {
    if !can_mount() {
        return;
    }
    // With a journal and without, every kind of checksum, and descriptors that lie far apart.
    for recipe in [0, 3, 5, 7].map(|index| &RECIPES[index]) {
        eprintln!("{}", recipe.name);
        let family = Family::new(recipe);
        let (tom, ann) = (
            family.member("tom", &["photos"]),
            family.member("ann", &["videos"]),
        );
        let process = family.process();
        let base = block_on(open_base("base", &process)).unwrap();
        let views = [
            ("tom", "photos", tom.open(&process)),
            ("ann", "videos", ann.open(&process)),
        ];
        let overlays = [tom.overlay.written_blocks(), ann.overlay.written_blocks()];

        let kernel = Kernel::mount(&family.bed, &base, "base", "defaults");
        let mounted: Vec<_> = views
            .iter()
            .map(|(name, _, view)| Kernel::mount(&family.bed, view, name, "defaults"))
            .collect();
        fs::create_dir(kernel.mount.join("opt")).unwrap();
        use_directory(&kernel.mount.join("opt"), 3);
        for ((_, directory, _), kernel) in views.iter().zip(&mounted) {
            use_directory(&kernel.mount.join(directory), 7);
        }
        for (kernel, (_, _, view)) in mounted.into_iter().zip(&views) {
            kernel.unmount();
            assert_eq!(view.refusals().total(), 0, "an honest guest");
        }
        kernel.unmount();
        assert_eq!(base.refusals().total(), 0, "an honest guest");
        family.bed.assert_base_clean();
        for (member, before) in [&tom, &ann].into_iter().zip(overlays) {
            family.assert_flattened_clean(member, &process);
            let journal = family.bed.probe().journal_blocks();
            let added = member.overlay.written_blocks().len() - before.len();
            assert!(
                added <= journal as usize + 2,
                "{added} blocks are in an overlay"
            );
        }

        let (_, _, toms) = &views[0];
        for (name, view) in [("base", &base), ("tom", toms), ("ann", &views[1].2)] {
            let kernel = Kernel::mount(&family.bed, view, name, "defaults");
            for (owner, directory, _) in &views {
                let directory = kernel.mount.join(directory);
                assert!(fs::read(directory.join("sub/moved")).unwrap() == [7; 37]);
                assert!(fs::read(directory.join("sub/large")).unwrap() == vec![7; 3 << 20]);
                if name != *owner {
                    assert_nothing_can_be_changed(&directory, &directory.join("file2"));
                }
            }
            assert!(fs::read(kernel.mount.join("opt/sub/moved")).unwrap() == [3; 37]);
            kernel.unmount();
            assert_eq!(view.refusals().total(), 0, "an honest guest");
        }
        family.bed.assert_base_clean();
    }
}

#[test]
fn a_child_owns_private_regions_or_shared_ones_and_any_number_of_them() {
    if !can_mount() {
        return;
    }
    let regions = [
        region("local", "3", Sharing::Private),
        region("photos", "5", Sharing::Shared),
        region("videos", "6-7", Sharing::Shared),
    ];
    let bed = Bed::with_regions(&DEFAULTS, &regions);
    let kept = Arc::new(Kept(Mutex::new(Declaration::Base(bed.declaration.clone()))));
    let family = Family {
        bed,
        kept,
        photos: BlockGroup(5),
    };
    let names = ["local".to_owned(), "photos".to_owned()];
    let planned = NewChild::plan(&*family.bed.base, &family.bed.declaration, &names);
    let error = block_on(planned).unwrap_err().to_string();
    assert!(
        error.contains("\"local\" is private and region \"photos\" is shared"),
        "{error}"
    );

    let tom = family.member("tom", &["photos", "videos"]);
    let ann = family.member("ann", &["local"]);
    let process = family.process();
    let view = tom.open(&process);
    let kernel = Kernel::mount(&family.bed, &view, "tom", "defaults");
    use_directory(&kernel.mount.join("videos"), 5);
    use_directory(&kernel.mount.join("photos"), 6);
    let moved = kernel.mount.join("photos/moved");
    fs::rename(kernel.mount.join("videos/sub/large"), moved).unwrap();
    // More than one group has.
    fs::write(kernel.mount.join("photos/huge"), vec![8; 10 << 20]).unwrap();
    kernel.unmount();
    assert_eq!(view.refusals().total(), 0);
    family.bed.assert_base_clean();
    family.assert_flattened_clean(&tom, &process);

    let anns = block_on(open_child(
        "ann",
        ann.overlay.clone(),
        &ann.declaration(),
        &process,
    ))
    .unwrap();
    let kernel = Kernel::mount(&family.bed, &anns, "ann", "defaults");
    assert!(fs::read(kernel.mount.join("photos/moved")).unwrap() == vec![5; 3 << 20]);
    assert!(fs::read(kernel.mount.join("photos/huge")).unwrap() == vec![8; 10 << 20]);
    kernel.unmount();
    assert_eq!(anns.refusals().total(), 0);
    family.assert_flattened_clean(&ann, &process);
}

#[test]
fn a_region_has_one_writer_until_that_is_closed_with_its_filesystem_unmounted() {
    if !can_mount() {
        return;
    }
    let family = Family::new(&DEFAULTS);
    let (tom, ann) = (
        family.member("tom", &["photos"]),
        family.member("ann", &["photos"]),
    );
    let process = family.process();
    let view = tom.open(&process);
    assert!(refusal(ann.try_open(&process)).contains("being written by tom"));

    // The kernel has committed, and is cut off before it brought everything to its place.
    let mut kernel = Kernel::mount(&family.bed, &view, "tom", "defaults");
    let mut file = fs::File::create(kernel.mount.join("photos/one")).unwrap();
    file.write_all(&[1; 5000]).unwrap();
    file.sync_all().unwrap();
    drop(file);
    fs::create_dir(kernel.mount.join("photos/sub")).unwrap();
    kernel.commit_in(&kernel.mount.join("photos"));
    kernel.write_so_far();
    kernel.unmount_unwritten();
    let copy = tom.copied("copy");
    block_on(view.close()).unwrap();
    drop((view, process));

    let process = family.process();
    let error = refusal(ann.try_open(&process));
    assert!(
        error.contains("held by tom") && error.contains("--evict photos"),
        "{error}"
    );
    let view = tom.open(&process);
    let kernel = Kernel::mount(&family.bed, &view, "tom", "defaults");
    assert!(fs::read(kernel.mount.join("photos/one")).unwrap() == [1; 5000]);
    kernel.unmount();
    block_on(view.close()).unwrap();
    drop(view);
    family.bed.assert_base_clean();

    assert!(refusal(copy.try_open(&process)).contains("undo"));
    let view = ann.open(&process);
    let kernel = Kernel::mount(&family.bed, &view, "ann", "defaults");
    assert!(fs::read(kernel.mount.join("photos/one")).unwrap() == [1; 5000]);
    fs::remove_file(kernel.mount.join("photos/one")).unwrap();
    kernel.unmount();
    block_on(view.close()).unwrap();
    drop(view);
    assert!(family.declaration().leases.is_empty());
    let view = tom.open(&process);
    let kernel = Kernel::mount(&family.bed, &view, "tom", "defaults");
    assert!(!kernel.mount.join("photos/one").exists());
    kernel.unmount();
    family.bed.assert_base_clean();
    family.assert_flattened_clean(&ann, &process);
}

#[test]
fn a_region_can_be_taken_from_a_holder_who_is_refused_from_then_on() {
    let family = Family::new(&DEFAULTS);
    let (tom, ann) = (
        family.member("tom", &["photos"]),
        family.member("ann", &["photos"]),
    );
    let process = family.process();
    let view = tom.open(&process);
    // needs_recovery, as of a filesystem that is mounted.
    let mut block = read(&view, 0, 4096);
    block[1024 + 0x60] |= 4;
    let superblock: &mut [u8; 1024] = (&mut block[1024..2048]).try_into().unwrap();
    seethrough::ext4::superblock::seal(superblock);
    write(&view, 0, &block).unwrap();
    block_on(view.close()).unwrap();
    drop((view, process));

    assert!(release_error(&family).contains("held by tom"));
    let (declaration, holder) = evict(&family.declaration(), "photos").unwrap();
    assert_eq!(holder, "tom");
    assert!(evict(&declaration, "photos").is_err(), "nobody holds it");
    *family.kept.0.lock().unwrap() = Declaration::Base(declaration);
    let process = family.process();
    refusal(tom.try_open(&process));
    ann.open(&process);
    refusal(tom.try_open(&process));
}

fn release_error(family: &Family) -> String {
    let released = block_on(release(&*family.bed.base, &family.declaration(), "photos"));
    released.err().unwrap().to_string()
}

#[test]
fn a_shared_region_is_given_back_when_it_is_empty() {
    if !can_mount() {
        return;
    }
    let family = Family::new(&DEFAULTS);
    let tom = family.member("tom", &["photos"]);
    let process = family.process();
    let view = tom.open(&process);
    let kernel = Kernel::mount(&family.bed, &view, "tom", "defaults");
    fs::write(kernel.mount.join("photos/file"), [1; 5000]).unwrap();
    kernel.unmount();
    block_on(view.close()).unwrap();
    drop(view);
    assert!(release_error(&family).contains("the base has used them"));
    let view = tom.open(&process);
    let kernel = Kernel::mount(&family.bed, &view, "tom", "defaults");
    fs::remove_file(kernel.mount.join("photos/file")).unwrap();
    kernel.unmount();
    block_on(view.close()).unwrap();
    let rest = block_on(release(&*family.bed.base, &family.declaration(), "photos")).unwrap();
    assert_eq!(rest.regions.len(), 1);
}

#[test]
fn what_a_child_does_to_its_own_blocks_it_does_to_the_base() {
    let family = Family::new(&DEFAULTS);
    let tom = family.member("tom", &["photos"]);
    let process = family.process();
    let view = tom.open(&process);
    let before = tom.overlay.written_blocks();
    let own = family
        .bed
        .probe()
        .superblock()
        .group_blocks(family.photos)
        .end
        * 4096
        - 8192;
    let stored = |at: u64| {
        let at = usize::try_from(at).unwrap();
        family.bed.storage.contents()[at..at + 4096].to_vec()
    };
    write(&view, own, &[9; 4096]).unwrap();
    assert_eq!(stored(own), [9; 4096]);
    assert_eq!(read(&view, own, 4096), [9; 4096]);
    let base = block_on(open_base("base", &process)).unwrap();
    assert_eq!(read(&base, own, 4096), [9; 4096]);
    let (at, len) = (GuestOffset(own), 4096);
    for mapped in [view.map_read(at, len), view.map_write(at, len)] {
        let Mapped::Extent { storage, at, .. } = mapped else {
            panic!("it is one extent of the base");
        };
        assert_eq!((storage.name(), at.0), (family.bed.base.name(), own));
    }
    block_on(view.write_zeroes(at, len, ZeroMode::MayUnmap)).unwrap();
    assert_eq!(stored(own), [0; 4096]);
    write(&view, own, &[8; 4096]).unwrap();
    block_on(view.discard(at, len)).unwrap();
    assert_eq!(stored(own), [0; 4096]);
    assert_eq!(
        tom.overlay.written_blocks(),
        before,
        "nothing is in the overlay"
    );
    let before = family
        .bed
        .probe()
        .superblock()
        .group_blocks(family.photos)
        .start
        * 4096
        - 4096;
    let refused = write(&view, before, &[1; 4096]).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Refused);
}

/// The descriptor of `photos` in the block of the table at `at`, as the view shows it.
fn descriptor(view: &View, at: u64, group: BlockGroup) -> Vec<u8> {
    read(view, at + u64::from(group.0) * 64, 64)
}

#[test]
fn a_shared_descriptor_that_no_kernel_writes_is_dropped() {
    let family = Family::new(&DEFAULTS);
    let tom = family.member("tom", &["photos"]);
    let process = family.process();
    let view = tom.open(&process);
    let at = block_of(&family.bed, |kind| matches!(kind, Kind::Descriptors { .. }));
    let before = family.bed.storage.contents();
    let honest = descriptor(&view, at, family.photos);
    let probe = family.bed.probe();
    let checksums = &probe.superblock().checksums;
    // A bitmap elsewhere; more free blocks, free inodes, directories and inodes never used than there are; unknown flags;
    // and a wrong checksum.
    let forgeries = [0x00, 0x0d, 0x0f, 0x11, 0x1d, 0x13].map(|byte| (byte, true));
    for (byte, sealed) in forgeries.into_iter().chain([(0x0c, false)]) {
        let mut forged = honest.clone();
        forged[byte] ^= 0x80;
        if sealed {
            seethrough::ext4::group_descriptor::seal(checksums, family.photos, &mut forged);
        }
        let refused = view.refusals().count(Structure::GroupDescriptor);
        write(&view, at + u64::from(family.photos.0) * 64, &forged).unwrap();
        assert_eq!(
            view.refusals().count(Structure::GroupDescriptor),
            refused + 1,
            "{byte:#x}"
        );
        assert!(family.bed.storage.contents() == before, "{byte:#x}");
    }
}

/// `s_mnt_count`, its lower half.
const MNT_COUNT: usize = 0x34;

/// Puts another number of free blocks into a descriptor.
fn with_free_blocks(descriptor: &[u8], bed: &Bed, group: BlockGroup, less: u16) -> Vec<u8> {
    let mut changed = descriptor.to_vec();
    let free = u16::from_le_bytes([changed[0x0c], changed[0x0d]]) - less;
    changed[0x0c..0x0e].copy_from_slice(&free.to_le_bytes());
    let probe = bed.probe();
    seethrough::ext4::group_descriptor::seal(&probe.superblock().checksums, group, &mut changed);
    changed
}

fn stored_free_blocks(bed: &Bed) -> u32 {
    let at = 1024 + 0x0c;
    u32::from_le_bytes(bed.storage.contents()[at..at + 4].try_into().unwrap())
}

#[test]
fn writers_of_one_descriptor_block_lose_nothing_and_the_count_stays_true() {
    for seed in 0..16 {
        let family = Family::new(&DEFAULTS);
        let members = [
            family.member("tom", &["photos"]),
            family.member("ann", &["videos"]),
        ];
        let at = block_of(&family.bed, |kind| matches!(kind, Kind::Descriptors { .. }));
        let free = stored_free_blocks(&family.bed);
        let storage = FaultStorage::with_delays(family.bed.storage.clone(), Delays::up_to(3, seed));
        let process = family.process_on(Arc::new(RawImage::new(
            Arc::new(storage),
            Access::ReadWrite,
        )));
        let base = block_on(open_base("base", &process)).unwrap();
        let hidden = read(&base, 1024 + 0x0c, 4);
        let [tom, ann] = members.each_ref().map(|member| member.open(&process));
        let videos = BlockGroup(7);
        let changes = [
            (&base, BlockGroup(1), 1),
            (&tom, family.photos, 10),
            (&ann, videos, 100),
        ]
        .map(|(view, group, less)| {
            let old = descriptor(view, at, group);
            let new = with_free_blocks(&old, &family.bed, group, less);
            (view, GuestOffset(at + u64::from(group.0) * 64), new)
        });
        // The base's VM writes its superblock meanwhile.
        let mut superblock: [u8; 1024] = read(&base, 1024, 1024).try_into().unwrap();
        superblock[MNT_COUNT] = 0x5a;
        seethrough::ext4::superblock::seal(&mut superblock);
        let writes = changes
            .iter()
            .map(|(view, at, new)| view.write(*at, IoBuf::from_bytes(new)));
        let counted = base.write(GuestOffset(1024), IoBuf::from_bytes(&superblock));
        let mut writes: Vec<_> = writes.chain([counted]).collect();
        block_on(std::future::poll_fn(|context| {
            writes.retain_mut(|write| write.as_mut().poll(context).is_pending());
            if writes.is_empty() {
                std::task::Poll::Ready(())
            } else {
                std::task::Poll::Pending
            }
        }));
        for (view, at, new) in &changes {
            assert!(read(view, at.0, 64) == *new, "seed {seed}");
        }
        assert_eq!(stored_free_blocks(&family.bed), free - 110, "seed {seed}");
        assert_eq!(
            read(&base, 1024 + 0x0c, 4),
            hidden,
            "the base's own count stays"
        );
        let stored = family.bed.storage.contents();
        assert_eq!(stored[1024 + MNT_COUNT], 0x5a, "seed {seed}");
    }
}

/// What a child owns in the base: the last blocks but one of `photos`.
fn own_block(family: &Family) -> u64 {
    let probe = family.bed.probe();
    probe.superblock().group_blocks(family.photos).end * 4096 - 8192
}

/// Sees that whatever is in the base is durable when a region is given back.
struct Careful {
    kept: Arc<Kept>,
    storage: Arc<CrashStorage>,
}

impl Keeper for Careful {
    fn keep<'a>(&'a self, declaration: &'a Declaration) -> ImageFuture<'a> {
        if let Declaration::Base(base) = declaration
            && base.leases.is_empty()
        {
            assert_eq!(self.storage.volatile_changes(), 0);
        }
        self.kept.keep(declaration)
    }
}

#[test]
fn what_was_written_in_the_base_is_durable_after_a_flush_and_before_the_region_is_given_back() {
    let family = Family::new(&DEFAULTS);
    let tom = family.member("tom", &["photos"]);
    let storage = Arc::new(CrashStorage::new(
        family.bed.storage.contents(),
        Delays::none(),
    ));
    let disk = RawImage::new(Arc::clone(&storage) as Arc<dyn Storage>, Access::ReadWrite);
    let keeper = Careful {
        kept: Arc::clone(&family.kept),
        storage: Arc::clone(&storage),
    };
    let opened =
        SharedBase::open_kept(Arc::new(disk), family.declaration(), Some(Arc::new(keeper)));
    let process = block_on(opened).unwrap();
    let view = tom.open(&process);
    let at = own_block(&family);
    write(&view, at, &[1; 4096]).unwrap();
    assert_ne!(storage.volatile_changes(), 0);
    block_on(view.flush()).unwrap();
    assert_eq!(storage.volatile_changes(), 0);
    write(&view, at, &[2; 4096]).unwrap();
    block_on(view.close()).unwrap();
    assert_eq!(storage.volatile_changes(), 0);
    assert!(family.declaration().leases.is_empty());
}

#[test]
fn a_child_that_is_read_only_writes_nothing_in_the_base() {
    let family = Family::new(&DEFAULTS);
    let tom = family.member("tom", &["photos"]);
    let process = family.process();
    let overlay = Arc::new(ReadOnlyImage::new(tom.overlay.clone()));
    let view = block_on(open_child("tom", overlay, &tom.declaration(), &process)).unwrap();
    let before = family.bed.storage.contents();
    let (at, len) = (GuestOffset(own_block(&family)), 4096);
    assert!(matches!(view.map_write(at, len), Mapped::Slow));
    let refused = [
        block_on(view.write(at, IoBuf::zeroed(4096))),
        block_on(view.write_zeroes(at, len, ZeroMode::KeepAllocated)),
        block_on(view.discard(at, len)),
    ];
    for result in refused {
        assert_eq!(result.unwrap_err().kind(), ErrorKind::ReadOnly);
    }
    assert!(family.bed.storage.contents() == before);
    assert!(family.declaration().leases.is_empty(), "it holds nothing");
}

/// Makes the base's superblock count something else.
fn miscount(family: &Family) {
    let mut block = family.bed.storage.contents()[..4096].to_vec();
    block[1024 + 0x0c] ^= 0x55;
    put_first_block(family, &mut block);
}

fn put_first_block(family: &Family, block: &mut [u8]) {
    let superblock: &mut [u8; 1024] = (&mut block[1024..2048]).try_into().unwrap();
    seethrough::ext4::superblock::seal(superblock);
    let base = &family.bed.base;
    block_on(base.write(GuestOffset(0), IoBuf::from_bytes(block))).unwrap();
}

#[test]
fn a_count_that_a_crash_left_behind_is_made_true_when_the_base_is_opened() {
    let family = Family::new(&DEFAULTS);
    let free = stored_free_blocks(&family.bed);
    miscount(&family);
    assert_ne!(stored_free_blocks(&family.bed), free);
    family.process();
    assert_eq!(stored_free_blocks(&family.bed), free);
    family.bed.assert_base_clean();
}

#[test]
fn a_count_is_left_alone_while_the_base_is_mounted_or_open_read_only() {
    let family = Family::new(&DEFAULTS);
    miscount(&family);
    let miscounted = family.bed.storage.contents();
    let disk = RawImage::new(family.bed.storage.clone(), Access::ReadOnly);
    family.process_on(Arc::new(disk));
    assert!(family.bed.storage.contents() == miscounted);
    // needs_recovery
    let mut block = miscounted[..4096].to_vec();
    block[1024 + 0x60] |= 4;
    put_first_block(&family, &mut block);
    let mounted = family.bed.storage.contents();
    family.process();
    assert!(family.bed.storage.contents() == mounted);
}

#[test]
fn a_child_that_did_not_claim_its_shared_regions_is_not_opened() {
    let family = Family::new(&DEFAULTS);
    let tom = family.member("tom", &["photos"]);
    let process = family.process();
    let opened = block_on(open_child(
        "tom",
        tom.overlay.clone(),
        &tom.declaration(),
        &process,
    ));
    assert_eq!(opened.err().unwrap().kind(), ErrorKind::InvalidConfig);
}
