//! A family: a base image, its children, the daemon that serves them, and the checks that follow every
//! scenario.

use std::fs;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use super::backend::Backend;
use super::guest::{Disk, Guest, GuestConfig};
use super::narration;
use super::oracle::{self, Ext4, Layout, Tolerated};

const MIB: u64 = 1 << 20;

/// A base's ext4 filesystem, and which of its groups are reserved for children.
#[derive(Debug, Clone, Copy)]
pub struct Filesystem {
    pub size_mib: u64,
    /// What `mkfs.ext4` is told beside the file.
    pub mkfs: &'static [&'static str],
    pub reserved: (usize, usize),
}

impl Filesystem {
    /// `mkfs.ext4` with no options at all: 1 KiB blocks at this size, groups of 8 MiB.
    pub const DEFAULTS: Filesystem = Filesystem {
        size_mib: 256,
        mkfs: &[],
        reserved: (20, 23),
    };

    /// Default features and the block size of larger filesystems; small groups, so that filling one is quick.
    pub const BLOCKS_4K: Filesystem = Filesystem {
        size_mib: 256,
        mkfs: &["-b", "4096", "-g", "4096"],
        reserved: (10, 11),
    };

    /// Default features and 2 KiB blocks, one group of 32 MiB reserved.
    pub const BLOCKS_2K: Filesystem = Filesystem {
        size_mib: 256,
        mkfs: &["-b", "2048"],
        reserved: (5, 5),
    };

    /// As in seed 000, figures 1 to 3: six groups of 10,000 blocks, the second of them the child's; no
    /// journal, no flexible groups, no checksums, no backup superblocks.
    pub const SEED: Filesystem = Filesystem {
        size_mib: 220,
        mkfs: &[
            "-b",
            "4096",
            "-g",
            "10000",
            "-O",
            "^has_journal,^flex_bg,^metadata_csum,^64bit,sparse_super2",
            "-E",
            "num_backup_sb=0",
        ],
        reserved: (1, 1),
    };

    pub fn reserved(&self) -> RangeInclusive<usize> {
        self.reserved.0..=self.reserved.1
    }

    /// All groups but the reserved ones.
    pub fn others(&self, layout: &Layout) -> Vec<usize> {
        (0..layout.groups.len())
            .filter(|group| !self.reserved().contains(group))
            .collect()
    }
}

/// Where the base's filesystem lies on its disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Placement {
    WholeDisk,
    /// In the first partition of a GUID partition table.
    Gpt,
    /// In the first partition of a DOS partition table.
    Mbr,
    /// In the first partition of a GUID partition table, with a like filesystem in the second partition:
    /// that one is reserved as a whole, instead of groups.
    ReservedPartition,
}

impl Placement {
    /// Where each of the disk's filesystems begins, for filesystems of this size.
    fn offsets(self, size: u64) -> Vec<u64> {
        match self {
            Placement::WholeDisk => vec![0],
            Placement::Gpt | Placement::Mbr => vec![MIB],
            Placement::ReservedPartition => vec![MIB, MIB + size],
        }
    }
}

/// What family to make.
#[derive(Debug, Clone, Copy)]
pub struct FamilyConfig<'a> {
    pub filesystem: Filesystem,
    pub placement: Placement,
    pub children: &'a [&'a str],
}

/// A family in a directory of its own.
#[derive(Debug)]
pub struct Family {
    pub dir: TempDir,
    pub filesystem: Filesystem,
    placement: Placement,
    children: Vec<String>,
    daemon: Option<Backend>,
}

impl Family {
    /// Makes, with stock tools, a qcow2 base with a fresh filesystem, and with `seethrough` its region
    /// `local` at `/local` and its children.
    pub fn new(config: FamilyConfig<'_>) -> Family {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))
            .expect("a temporary directory can be made");
        let mut family = Family {
            dir,
            filesystem: config.filesystem,
            placement: config.placement,
            children: Vec::new(),
            daemon: None,
        };
        family.make_disk();
        family.prepare();
        for child in config.children {
            family.create_child(child);
        }
        family
    }

    /// A base and the child `tom`, the filesystem filling the disk.
    pub fn base_and_tom(filesystem: Filesystem) -> Family {
        Family::new(FamilyConfig {
            filesystem,
            placement: Placement::WholeDisk,
            children: &["tom"],
        })
    }

    /// A base and the children `tom` and `ann`, the filesystem filling the disk.
    pub fn base_tom_and_ann(filesystem: Filesystem) -> Family {
        Family::new(FamilyConfig {
            filesystem,
            placement: Placement::WholeDisk,
            children: &["tom", "ann"],
        })
    }

    /// A base with a shared region for each of `children`: name, region (at `/` and its name) and block groups.
    pub fn with_shared_regions(filesystem: Filesystem, children: &[(&str, &str, &str)]) -> Family {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))
            .expect("a temporary directory can be made");
        let mut family = Family {
            dir,
            filesystem,
            placement: Placement::WholeDisk,
            children: Vec::new(),
            daemon: None,
        };
        family.make_disk();
        for (_, region, groups) in children {
            let reserve = format!("{region}=groups:{groups}");
            let directory = format!("/{region}");
            family.seethrough_ok(&[
                "prepare",
                "base.qcow2",
                "--reserve",
                &reserve,
                "--dir",
                &directory,
                "--shared",
                region,
            ]);
        }
        for (child, region, _) in children {
            family.create_child_of(child, region);
        }
        family
    }

    fn make_disk(&self) {
        let raw = self.path("base.raw");
        let size = self.filesystem.size_mib * MIB;
        let offsets = self.placement.offsets(size);
        let end = offsets.last().expect("there is a filesystem") + size;
        let file = fs::File::create(&raw).expect("the disk can be made");
        match self.placement {
            Placement::WholeDisk => file.set_len(end),
            // Room for the backup of the partition table.
            _ => file.set_len(end + MIB),
        }
        .expect("the disk can be made");
        self.make_partitions(&raw, &offsets, size);
        for offset in offsets {
            let kib = size / 1024;
            let place = format!("offset={offset}");
            let mut arguments = vec!["-q", "-F"];
            arguments.extend(self.filesystem.mkfs);
            if offset != 0 {
                arguments.extend(["-E", &place]);
            }
            let (raw, kib) = (raw.display().to_string(), format!("{kib}k"));
            arguments.extend([raw.as_str(), kib.as_str()]);
            oracle::ok("mkfs.ext4", arguments);
        }
        let (raw_name, base) = (
            raw.display().to_string(),
            self.image("base").display().to_string(),
        );
        oracle::ok(
            "qemu-img",
            ["convert", "-f", "raw", "-O", "qcow2", &raw_name, &base],
        );
        fs::remove_file(raw).expect("the raw disk was made");
    }

    fn make_partitions(&self, raw: &Path, offsets: &[u64], size: u64) {
        if self.placement == Placement::WholeDisk {
            return;
        }
        let mut arguments: Vec<String> = Vec::new();
        for (index, offset) in offsets.iter().enumerate() {
            let (first, last) = (offset / 512, (offset + size) / 512 - 1);
            arguments.push(format!("--new={}:{first}:{last}", index + 1));
        }
        if self.placement == Placement::Mbr {
            arguments.push("--gpttombr=1".into());
        }
        arguments.push(raw.display().to_string());
        oracle::ok("sgdisk", arguments);
    }

    fn prepare(&self) {
        let reserved = &self.filesystem.reserved;
        let mut arguments = vec![
            "prepare".to_owned(),
            "base.qcow2".to_owned(),
            "--reserve".to_owned(),
        ];
        if self.placement == Placement::ReservedPartition {
            arguments.push("local=partition:2".to_owned());
        } else {
            arguments.push(format!("local=groups:{}-{}", reserved.0, reserved.1));
            arguments.extend(["--dir".to_owned(), "/local".to_owned()]);
        }
        self.seethrough_ok(&arguments);
    }

    /// Makes one more child.
    pub fn create_child(&mut self, name: &str) {
        self.create_child_of(name, "local");
    }

    /// Makes one more child, which owns the region called `region`.
    pub fn create_child_of(&mut self, name: &str, region: &str) {
        let image = format!("{name}.qcow2");
        self.seethrough_ok(&["create", "-b", "base.qcow2", &image, "--region", region]);
        self.children.push(name.to_owned());
    }

    /// Runs `seethrough` in the family's directory; it must fail. Returns what it said.
    pub fn seethrough_refuses(&self, arguments: &[&str]) -> String {
        narration::command("$", &format!("seethrough {}", arguments.join(" ")));
        let output = Command::new(env!("CARGO_BIN_EXE_seethrough"))
            .args(arguments)
            .current_dir(self.dir.path())
            .output()
            .expect("seethrough runs");
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            !output.status.success(),
            "seethrough {} succeeded",
            arguments.join(" ")
        );
        text
    }

    /// Runs `seethrough` in the family's directory; it must succeed. Returns its standard output.
    pub fn seethrough_ok<S: AsRef<str>>(&self, arguments: &[S]) -> String {
        let arguments: Vec<&str> = arguments.iter().map(AsRef::as_ref).collect();
        narration::command("$", &format!("seethrough {}", arguments.join(" ")));
        let output = Command::new(env!("CARGO_BIN_EXE_seethrough"))
            .args(&arguments)
            .current_dir(self.dir.path())
            .output()
            .expect("seethrough runs");
        assert!(
            output.status.success(),
            "seethrough {} ended with {}:\n{}",
            arguments.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    pub fn path(&self, file: &str) -> PathBuf {
        self.dir.path().join(file)
    }

    /// The image of the base (`base`) or a child.
    pub fn image(&self, member: &str) -> PathBuf {
        self.path(&format!("{member}.qcow2"))
    }

    /// Starts the daemon for the base and all children.
    pub fn serve(&mut self) {
        let children = self.children.clone();
        let mut members = vec!["base"];
        members.extend(children.iter().map(String::as_str));
        self.serve_only(&members);
    }

    /// Starts the daemon for some members.
    pub fn serve_only(&mut self, members: &[&str]) {
        let members: Vec<_> = members.iter().map(|member| (*member, "")).collect();
        self.serve_with(&members, &[]);
    }

    /// Starts the daemon for some members, each with further keys of its own, and with further options.
    pub fn serve_with(&mut self, members: &[(&str, &str)], options: &[&str]) {
        assert!(self.daemon.is_none(), "the family is already served");
        let mut arguments = vec![
            "serve".to_owned(),
            "--log-level".to_owned(),
            "info".to_owned(),
        ];
        arguments.extend(options.iter().map(ToString::to_string));
        let mut sockets = Vec::new();
        for (member, keys) in members {
            let (image, socket) = (self.image(member), self.socket(member));
            arguments.push("--vm".to_owned());
            arguments.push(format!(
                "name={member},image={},socket={}{keys}",
                image.display(),
                socket.display()
            ));
            sockets.push(socket);
        }
        let here = format!("{}/", self.dir.path().display());
        narration::command(
            "$",
            &format!("seethrough {} &", arguments.join(" ").replace(&here, "")),
        );
        self.daemon = Some(Backend::seethrough(arguments, &sockets));
    }

    fn socket(&self, member: &str) -> PathBuf {
        self.path(&format!("{member}.sock"))
    }

    pub fn daemon(&self) -> &Backend {
        self.daemon.as_ref().expect("the family is served")
    }

    /// Ends the daemon with SIGTERM; returns its log.
    pub fn stop(&mut self) -> Vec<String> {
        self.daemon.take().expect("the family is served").stop()
    }

    /// Ends the daemon with SIGKILL.
    pub fn kill_daemon(&mut self) {
        self.daemon.take().expect("the family is served").kill();
    }

    /// The VM of a member, its disk not mounted. `/usr/share` holds the data tree.
    pub fn boot(&self, member: &str) -> Guest {
        let mut guest = self.start_boot(member);
        guest.ok("mount -t ext4 -o ro /dev/vdb /usr/share");
        guest
    }

    /// The VM of a member, its filesystem mounted on `/mnt`.
    pub fn boot_mounted(&self, member: &str) -> Guest {
        let mut guest = self.boot(member);
        guest.ok(&self.mount());
        guest
    }

    /// Starts the VM of a member without waiting for its shell; its first command does.
    pub fn start_boot(&self, member: &str) -> Guest {
        let disks = vec![Disk::VhostUser(self.socket(member)), Disk::Share];
        Guest::start_boot(&GuestConfig::new(member, self.dir.path(), disks))
    }

    /// The command that mounts the filesystem on `/mnt`.
    pub fn mount(&self) -> String {
        format!("mount -t ext4 {} /mnt", self.device())
    }

    /// The filesystem's device in a guest.
    pub fn device(&self) -> &'static str {
        match self.placement {
            Placement::WholeDisk => "/dev/vda",
            _ => "/dev/vda1",
        }
    }

    /// What the base image holds now, as a raw file, by stock tools.
    pub fn base_filesystem(&self) -> Ext4 {
        self.raw_of("base", "base-now.raw")
    }

    fn raw_of(&self, member: &str, file: &str) -> Ext4 {
        let raw = self.path(file);
        oracle::to_raw(&self.image(member), &raw);
        Ext4::at(&raw, self.filesystem_offsets()[0])
    }

    fn filesystem_offsets(&self) -> Vec<u64> {
        self.placement.offsets(self.filesystem.size_mib * MIB)
    }

    /// A child's true merged disk, by `seethrough flatten`, as a raw file.
    pub fn flattened(&self, child: &str) -> Ext4 {
        let (out, raw) = (self.path("flat"), self.path(&format!("{child}-flat.raw")));
        let _ = fs::remove_file(&out);
        self.seethrough_ok(&["flatten", &format!("{child}.qcow2"), "flat"]);
        let (out, raw_name) = (out.display().to_string(), raw.display().to_string());
        oracle::ok("qemu-img", ["convert", "-O", "raw", &out, &raw_name]);
        Ext4::at(&raw, self.filesystem_offsets()[0])
    }

    /// Stops the daemon and makes the checks that follow every scenario; returns the daemon's log.
    pub fn finish(mut self) -> Vec<String> {
        let log = if self.daemon.is_some() {
            self.stop()
        } else {
            Vec::new()
        };
        self.check_images(Tolerated::Nothing);
        self.check_filesystems();
        log
    }

    /// `qemu-img check` of every image.
    pub fn check_images(&self, tolerated: Tolerated) {
        oracle::qemu_img_check(&self.image("base"), tolerated);
        for child in &self.children {
            oracle::qemu_img_check(&self.image(child), tolerated);
        }
    }

    /// `e2fsck -fn` of the base alone and of what each child sees, and what stock tools read of each child.
    pub fn check_filesystems(&self) {
        let base = self.base_filesystem();
        self.each_filesystem(&base, Ext4::check_clean);
        for child in &self.children {
            let flat = self.flattened(child);
            self.each_filesystem(&flat, Ext4::check_clean);
            self.compare_with_stock(child, &flat);
        }
    }

    /// Runs a check on each filesystem of a disk.
    pub fn each_filesystem(&self, disk: &Ext4, check: impl Fn(&Ext4)) {
        for offset in self.filesystem_offsets() {
            check(&Ext4::at(&disk.file, offset));
        }
    }

    /// Stock tools read a child's overlay over its base: of what only one VM writes, they read what
    /// `flatten` writes. Shared blocks are composed by us alone.
    fn compare_with_stock(&self, child: &str, flat: &Ext4) {
        let stock = self.raw_of(child, "stock.raw");
        if self.placement == Placement::ReservedPartition {
            return oracle::images_read_the_same(&stock.file, &flat.file);
        }
        let layout = flat.layout();
        for (group, _) in layout.groups.iter().enumerate() {
            let blocks = layout.data_blocks_of(group);
            assert!(
                stock.read_blocks(layout.block_size, &blocks)
                    == flat.read_blocks(layout.block_size, &blocks),
                "{child}: flatten and qemu-img convert differ in group {group}"
            );
        }
    }
}
