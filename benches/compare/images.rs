//! The disks' images: made once for a run, from stamped blocks, by stock tools where they can.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufWriter, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use crate::Result;
use crate::cells::{Image, Place, SLICE};
use crate::disk::{Disk, Layer};
use crate::filling::fill_through;
use crate::stamp::{self, BLOCK, BLOCK_LEN};

/// Bytes of most disks.
pub(crate) const DISK_LEN: u64 = 1 << 30;
const LARGE_LEN: u64 = 1 << 40;
/// The filesystem that has children: 16 block groups.
const FAMILY_LEN: u64 = 2 << 30;
const GROUP_LEN: u64 = 128 << 20;
const OWN_GROUPS: &str = "local=groups:10-15";
/// Owned groups that hold nothing but data.
const OWN_START: u64 = 11 * GROUP_LEN;
const OWN_LEN: u64 = 4 * GROUP_LEN;
/// A group of the base that holds nothing but data.
const BASE_START: u64 = 4 * GROUP_LEN;
const LAYERS: u64 = 8;
const CLUSTER_LEN: u64 = 64 << 10;

/// Images that are there, and how to make the others.
pub(crate) struct Images {
    /// On the checkout's disk.
    disk: PathBuf,
    /// On tmpfs.
    memory: PathBuf,
    seethrough: PathBuf,
    made: BTreeMap<PathBuf, ()>,
}

/// Which of a family's disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    /// The child, as seethrough serves it.
    Child,
    /// An overlay of the same kind with the same contents, of which nobody says that it is a child.
    Overlay,
}

impl Images {
    /// Images below `disk` and `memory`, directories that are emptied first.
    pub(crate) fn new(disk: &Path, memory: &Path, seethrough: &Path) -> Result<Self> {
        for dir in [disk, memory] {
            let _ = fs::remove_dir_all(dir);
            fs::create_dir_all(dir).map_err(|error| format!("{}: {error}", dir.display()))?;
        }
        Ok(Self {
            disk: disk.to_owned(),
            memory: memory.to_owned(),
            seethrough: seethrough.to_owned(),
            made: BTreeMap::new(),
        })
    }

    /// Where a daemon's log and sockets go.
    pub(crate) fn scratch(&self) -> &Path {
        &self.memory
    }

    /// The `count` disks of a kind, as they are before a measurement: those for first writes are made anew.
    pub(crate) fn disks(
        &mut self,
        image: Image,
        place: Place,
        family: Family,
        count: usize,
    ) -> Result<Vec<Disk>> {
        let disk = match image {
            Image::Raw => Disk::new(vec![Layer::raw(&self.raw(place)?)], DISK_LEN),
            Image::Qcow2 => Disk::new(
                vec![Layer::qcow2(&self.converted(place, "qcow2", &[])?)],
                DISK_LEN,
            ),
            Image::Deflate => Disk::new(
                vec![Layer::qcow2(&self.converted(place, "deflate", &["-c"])?)],
                DISK_LEN,
            ),
            Image::Zstd => {
                let options = ["-c", "-o", "compression_type=zstd"];
                Disk::new(
                    vec![Layer::qcow2(&self.converted(place, "zstd", &options)?)],
                    DISK_LEN,
                )
            }
            Image::SeeThrough => {
                return (0..count)
                    .map(|number| self.overlay(place, &format!("child{number}"), &[]))
                    .collect();
            }
            Image::FirstWrite => self.fresh_overlay(place, &[])?,
            Image::FirstWriteSubclusters => {
                self.fresh_overlay(place, &["-o", "extended_l2=on,cluster_size=128k"])?
            }
            Image::View | Image::ViewOfBase => self.family(place, image, family)?,
            Image::ColdL2 => self.large(place)?,
            Image::Chain => self.chain(place)?,
        };
        let written_in_place = matches!(image, Image::Raw | Image::Qcow2 | Image::View);
        let written = written_in_place && place != Place::Disk;
        Ok(vec![if written {
            Disk {
                generation_of: |_| None,
                ..disk
            }
        } else {
            disk
        }])
    }

    /// The raw file that fio uses in place of a daemon: where it writes, one of its own.
    pub(crate) fn for_bound(&mut self, place: Place) -> Result<PathBuf> {
        match place {
            Place::Disk => self.raw(place),
            Place::Direct | Place::Memory => {
                let raw = self.raw(place)?;
                self.make(place, "bound.raw", |_, path| copy(&raw, path))
            }
        }
    }

    /// A file that is made if it is not there, durable and in the page cache (or, for O_DIRECT, out of it).
    fn make(
        &mut self,
        place: Place,
        name: &str,
        how: impl FnOnce(&mut Self, &Path) -> Result<()>,
    ) -> Result<PathBuf> {
        let dir = match place {
            Place::Disk => self.disk.clone(),
            Place::Direct => self.disk.join("direct"),
            Place::Memory => self.memory.clone(),
        };
        let path = dir.join(name);
        if !self.made.contains_key(&path) {
            fs::create_dir_all(&dir).map_err(|error| format!("{}: {error}", dir.display()))?;
            eprintln!("preparing {}", path.display());
            how(self, &path)?;
            settle(&path, place).map_err(|error| format!("{}: {error}", path.display()))?;
            self.made.insert(path.clone(), ());
        }
        Ok(path)
    }

    fn raw(&mut self, place: Place) -> Result<PathBuf> {
        self.make(place, "raw.raw", |_, path| {
            write_stamped(path).map_err(|error| format!("{}: {error}", path.display()))
        })
    }

    fn converted(&mut self, place: Place, name: &str, options: &[&str]) -> Result<PathBuf> {
        // The one that nobody writes to.
        let raw = self.raw(Place::Disk)?;
        self.make(place, &format!("{name}.qcow2"), |_, path| {
            run(Command::new("qemu-img")
                .args(["convert", "-f", "raw", "-O", "qcow2"])
                .args(options)
                .arg(raw)
                .arg(path))
        })
    }

    fn base(&mut self, place: Place) -> Result<PathBuf> {
        self.converted(place, "base", &[])
    }

    fn overlay(&mut self, place: Place, name: &str, options: &[&str]) -> Result<Disk> {
        let base = self.base(place)?;
        let path = self.make(place, &format!("{name}.qcow2"), |_, path| {
            create_overlay(path, &base, options)
        })?;
        Ok(Disk::new(
            vec![Layer::qcow2(&path), Layer::qcow2(&base)],
            DISK_LEN,
        ))
    }

    fn fresh_overlay(&mut self, place: Place, options: &[&str]) -> Result<Disk> {
        let base = self.base(place)?;
        let path = self.memory.join("fresh.qcow2");
        let _ = fs::remove_file(&path);
        create_overlay(&path, &base, options)?;
        Ok(Disk::new(
            vec![Layer::qcow2(&path), Layer::qcow2(&base)],
            DISK_LEN,
        ))
    }

    /// Each of the images has every eighth cluster, chosen by [`layer_of`].
    fn chain(&mut self, place: Place) -> Result<Disk> {
        let mut layers = vec![Layer::qcow2(&self.base(place)?)];
        for number in 1..LAYERS {
            let below = layers.clone();
            let path = self.make(place, &format!("layer{number}.qcow2"), |images, path| {
                create_overlay(path, &below[0].path, &[])?;
                let chain = [vec![Layer::qcow2(path)], below.clone()].concat();
                let clusters =
                    (0..DISK_LEN / CLUSTER_LEN).filter(|cluster| layer_of(*cluster) == number);
                let places = clusters.map(|cluster| cluster * CLUSTER_LEN).collect();
                let generation = u32::try_from(number).map_err(|error| error.to_string())?;
                let len = usize::try_from(CLUSTER_LEN).map_err(|error| error.to_string())?;
                fill_through(
                    &images.seethrough,
                    &images.memory,
                    Disk::new(chain, DISK_LEN),
                    places,
                    len,
                    generation,
                )
            })?;
            layers.insert(0, Layer::qcow2(&path));
        }
        let disk = Disk::new(layers, DISK_LEN);
        let generation_of =
            |block: u64| u32::try_from(layer_of(block * BLOCK_LEN / CLUSTER_LEN)).ok();
        Ok(Disk {
            generation_of,
            ..disk
        })
    }

    /// All metadata is there, and a stamped block for each part of an L2 table that is cached.
    fn large(&mut self, place: Place) -> Result<Disk> {
        let path = self.make(place, "large.qcow2", |images, path| {
            let size = LARGE_LEN.to_string();
            run(Command::new("qemu-img")
                .args([
                    "create",
                    "-q",
                    "-f",
                    "qcow2",
                    "-o",
                    "preallocation=metadata",
                ])
                .arg(path)
                .arg(size))?;
            let disk = Disk::new(vec![Layer::qcow2(path)], LARGE_LEN);
            let places = (0..LARGE_LEN / SLICE).map(|slice| slice * SLICE).collect();
            fill_through(&images.seethrough, &images.memory, disk, places, BLOCK, 0)
        })?;
        Ok(Disk::new(vec![Layer::qcow2(&path)], LARGE_LEN))
    }

    fn family(&mut self, place: Place, image: Image, family: Family) -> Result<Disk> {
        let base = self.make(place, "family.qcow2", |images, path| {
            images.make_family(path)
        })?;
        let name = match family {
            Family::Child => "tom.qcow2",
            Family::Overlay => "like-tom.qcow2",
        };
        let path = self.make(place, name, |images, path| {
            match family {
                Family::Child => {
                    let mut create = Command::new(&images.seethrough);
                    create
                        .args(["create", "-q", "--region", "local", "-b"])
                        .arg(&base)
                        .arg(path);
                    run(&mut create)?;
                }
                Family::Overlay => {
                    create_overlay(path, &base, &["-o", "extended_l2=on,cluster_size=128k"])?;
                }
            }
            let disk = Disk::new(vec![Layer::qcow2(path), Layer::qcow2(&base)], FAMILY_LEN);
            let step = 1 << 20;
            let places = (OWN_START..OWN_START + OWN_LEN).step_by(step).collect();
            fill_through(&images.seethrough, &images.memory, disk, places, step, 0)
        })?;
        let (start, room) = match image {
            Image::ViewOfBase => (BASE_START, GROUP_LEN),
            _ => (OWN_START, OWN_LEN),
        };
        let disk = Disk::new(vec![Layer::qcow2(&path), Layer::qcow2(&base)], FAMILY_LEN);
        Ok(Disk {
            start,
            room,
            ..disk
        })
    }

    /// A base with a region for children; one of its own groups is stamped.
    fn make_family(&mut self, path: &Path) -> Result<()> {
        let raw = self.memory.join("family.raw");
        let file = File::create(&raw).map_err(|error| format!("{}: {error}", raw.display()))?;
        file.set_len(FAMILY_LEN)
            .map_err(|error| error.to_string())?;
        run(Command::new("mkfs.ext4").arg("-q").arg(&raw))?;
        for number in BASE_START / BLOCK_LEN..(BASE_START + GROUP_LEN) / BLOCK_LEN {
            let mut block = [0; BLOCK];
            stamp::fill(number, &mut block);
            file.write_all_at(&block, number * BLOCK_LEN)
                .map_err(|error| error.to_string())?;
        }
        run(Command::new("qemu-img")
            .args(["convert", "-f", "raw", "-O", "qcow2"])
            .arg(&raw)
            .arg(path))?;
        fs::remove_file(&raw).map_err(|error| error.to_string())?;
        run(Command::new(&self.seethrough)
            .arg("prepare")
            .arg(path)
            .args(["--reserve", OWN_GROUPS, "--dir", "/local"]))
    }
}

impl Drop for Images {
    fn drop(&mut self) {
        for dir in [&self.disk, &self.memory] {
            let _ = fs::remove_dir_all(dir);
        }
    }
}

/// Which image of the chain has a cluster; 0 is the one at the bottom.
fn layer_of(cluster: u64) -> u64 {
    cluster.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 61
}

fn write_stamped(path: &Path) -> std::io::Result<()> {
    let mut file = BufWriter::with_capacity(1 << 20, File::create(path)?);
    let mut block = [0; BLOCK];
    for number in 0..DISK_LEN / BLOCK_LEN {
        stamp::fill(number, &mut block);
        file.write_all(&block)?;
    }
    file.flush()
}

fn create_overlay(path: &Path, base: &Path, options: &[&str]) -> Result<()> {
    run(Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"])
        .arg(base)
        .args(options)
        .arg(path))
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to)
        .map(|_| ())
        .map_err(|error| format!("{}: {error}", to.display()))
}

/// Makes a file durable, and its pages those that its place says: no writeback and no reading ahead is left for a
/// measurement.
fn settle(path: &Path, place: Place) -> std::io::Result<()> {
    let mut file = File::open(path)?;
    file.sync_all()?;
    match place {
        Place::Direct => posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?,
        Place::Memory => {}
        // A sparse file of a TiB is not read whole; whoever made it has just written what there is.
        Place::Disk if file.metadata()?.len() > 16 * DISK_LEN => {}
        Place::Disk => {
            let mut buffer = vec![0; 1 << 20];
            while file.read(&mut buffer)? > 0 {}
        }
    }
    Ok(())
}

/// Runs a tool, which has to succeed.
fn run(command: &mut Command) -> Result<()> {
    let program = command.get_program().display().to_string();
    let output = command
        .output()
        .map_err(|error| format!("cannot start {program}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!(
        "{program} failed: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    ))
}
