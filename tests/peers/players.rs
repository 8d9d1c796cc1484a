//! Those who perform a sequence of steps on an image: our engine, `qemu-io`, and imago.

#![allow(unreachable_pub)]

use std::path::Path;
use std::sync::Arc;

use imago::{FormatAccess, FormatDriverBuilder, PermissiveImplicitOpenGate};
use seethrough::chain::format::Format;
use seethrough::chain::host::HostOptions;
use seethrough::chain::registry::{DiskRequest, Registry};
use seethrough::image::{Access, Image};
use seethrough::storage::{CacheMode, ZeroMode};
use seethrough::sys::block_on;

use crate::common::oracle;
use crate::disk::{Discarded, Disk, Operation, Step};
use crate::engine::workload;

/// What the format of an image lets a discard do.
#[derive(Clone, Copy, Debug)]
pub struct Habits {
    pub has_zero_flag: bool,
    pub has_backing: bool,
}

pub trait Player {
    fn name(&self) -> &'static str;

    /// Performs the steps on an image that holds `disk`, and takes them into it.
    fn play(
        &self,
        image: &Path,
        disk: &mut Disk,
        habits: Habits,
        steps: &[Step],
    ) -> Result<(), String>;

    /// The whole disk.
    fn read_all(&self, image: &Path) -> Result<Vec<u8>, String>;
}

/// Our engine, on files, through the page cache or past it.
pub struct Ours(pub CacheMode);

impl Ours {
    fn open(&self, path: &Path, access: Access) -> Result<Arc<dyn Image>, String> {
        let request = DiskRequest {
            path: path.to_owned(),
            format: Some(Format::Qcow2),
            access,
        };
        let registry = Registry::new(HostOptions {
            cache: self.0,
            ..HostOptions::default()
        });
        let opened = block_on(registry.open(&request)).map_err(|error| error.to_string())?;
        Ok(opened.image)
    }
}

impl Player for Ours {
    fn name(&self) -> &'static str {
        "ours"
    }

    fn play(
        &self,
        path: &Path,
        disk: &mut Disk,
        habits: Habits,
        steps: &[Step],
    ) -> Result<(), String> {
        // A version 2 image ignores a discard that would show its backing image again.
        let discarded = if habits.has_backing {
            Discarded::ZerosOrOld
        } else {
            Discarded::Zeros
        };
        let mut image = self.open(path, Access::ReadWrite)?;
        for (number, step) in steps.iter().enumerate() {
            let len = usize::try_from(step.len()).expect("small");
            let operation = match step.operation {
                Operation::Write(byte) => workload::Operation::Write(vec![byte; len]),
                Operation::Zero(mode) => workload::Operation::Zero(mode),
                Operation::Discard => workload::Operation::Discard,
                Operation::Read => workload::Operation::Read,
                Operation::Flush | Operation::Reopen => workload::Operation::Flush,
            };
            disk.apply(step, discarded);
            let found = block_on(workload::perform(
                image.as_ref(),
                step.range.clone(),
                &operation,
            ))
            .map_err(|error| format!("step {number}, {step:x?}: {error}"))?;
            disk.settle(step.range.start, &found)
                .map_err(|error| format!("step {number}, {step:x?}: {error}"))?;
            if matches!(step.operation, Operation::Reopen) {
                drop(image);
                image = self.open(path, Access::ReadWrite)?;
            }
        }
        block_on(image.close()).map_err(|error| error.to_string())
    }

    fn read_all(&self, path: &Path) -> Result<Vec<u8>, String> {
        let image = self.open(path, Access::ReadOnly)?;
        let mut all = Vec::new();
        while (all.len() as u64) < image.virtual_size() {
            let at = all.len() as u64;
            let end = image.virtual_size().min(at + (1 << 20));
            let found = block_on(workload::perform(
                image.as_ref(),
                at..end,
                &workload::Operation::Read,
            ));
            all.extend(found.map_err(|error| format!("reading at {at:#x}: {error}"))?);
        }
        Ok(all)
    }
}

/// `qemu-io`: one process for all steps.
pub struct QemuIo;

impl Player for QemuIo {
    fn name(&self) -> &'static str {
        "qemu-io"
    }

    fn play(
        &self,
        path: &Path,
        disk: &mut Disk,
        habits: Habits,
        steps: &[Step],
    ) -> Result<(), String> {
        let discarded = match (habits.has_zero_flag, habits.has_backing) {
            (true, _) | (false, false) => Discarded::Zeros,
            (false, true) => Discarded::ZerosOrOldOrBacking,
        };
        let mut arguments: Vec<String> = ["-d", "unmap", "-t", "unsafe", "-f", "qcow2"]
            .map(str::to_owned)
            .to_vec();
        for step in steps {
            disk.apply(step, discarded);
            if let Some(command) = command(disk, step) {
                arguments.extend(["-c".to_owned(), command]);
            }
        }
        arguments.push(path.display().to_string());
        let output = oracle::run("qemu-io", &arguments);
        let said = String::from_utf8_lossy(&output.stdout).into_owned()
            + &String::from_utf8_lossy(&output.stderr);
        if output.status.success() && !said.contains("failed") {
            return Ok(());
        }
        Err(format!("qemu-io {arguments:?}: {}\n{said}", output.status))
    }

    fn read_all(&self, path: &Path) -> Result<Vec<u8>, String> {
        let raw = path.with_extension("raw");
        oracle::to_raw(path, &raw);
        std::fs::read(raw).map_err(|error| error.to_string())
    }
}

fn command(disk: &Disk, step: &Step) -> Option<String> {
    let (at, len) = (step.range.start, step.len());
    Some(match step.operation {
        Operation::Write(byte) => format!("write -P {byte} {at} {len}"),
        Operation::Zero(ZeroMode::KeepAllocated) => format!("write -z {at} {len}"),
        Operation::Zero(ZeroMode::MayUnmap) => format!("write -z -u {at} {len}"),
        Operation::Discard => format!("discard {at} {len}"),
        Operation::Read => {
            let (run, byte) = disk.certain_run(&step.range)?;
            format!("read -P {byte} {at} {}", run.end - run.start)
        }
        Operation::Flush => "flush".to_owned(),
        Operation::Reopen => "reopen".to_owned(),
    })
}

/// The imago crate.
pub struct Imago;

type ImagoImage = FormatAccess<imago::file::File>;

impl Imago {
    fn open(path: &Path, writable: bool) -> std::io::Result<ImagoImage> {
        let image = imago::qcow2::Qcow2::<imago::file::File>::builder_path(path)
            .write(writable)
            .open(PermissiveImplicitOpenGate::default())?;
        Ok(FormatAccess::new(image))
    }

    fn perform(
        image: &mut ImagoImage,
        disk: &mut Disk,
        habits: Habits,
        step: &Step,
    ) -> std::io::Result<()> {
        let (at, len) = (step.range.start, step.len());
        let whole = usize::try_from(len).expect("small");
        match step.operation {
            Operation::Write(byte) => image.write(&vec![byte; whole], at),
            // imago zeroes version 3 alone.
            Operation::Zero(_) | Operation::Discard if !habits.has_zero_flag => {
                image.write(&vec![0; whole], at)
            }
            Operation::Zero(ZeroMode::KeepAllocated) => image.write_zeroes(at, len),
            Operation::Zero(ZeroMode::MayUnmap) | Operation::Discard => {
                image.discard_to_zero(at, len)
            }
            Operation::Read => {
                let mut found = vec![0xaa; whole];
                image.read(&mut found, at)?;
                disk.settle(at, &found).map_err(std::io::Error::other)
            }
            Operation::Flush | Operation::Reopen => image.flush(),
        }
    }
}

impl Player for Imago {
    fn name(&self) -> &'static str {
        "imago"
    }

    fn play(
        &self,
        path: &Path,
        disk: &mut Disk,
        habits: Habits,
        steps: &[Step],
    ) -> Result<(), String> {
        let mut image = Self::open(path, true).map_err(|error| error.to_string())?;
        for (number, step) in steps.iter().enumerate() {
            match step.operation {
                // What is discarded is asked to read as zeros.
                Operation::Discard => disk.part(&step.range).fill(crate::disk::Possible::only(0)),
                _ => disk.apply(step, Discarded::Zeros),
            }
            Self::perform(&mut image, disk, habits, step)
                .map_err(|error| format!("step {number}, {step:x?}: {error}"))?;
            if matches!(step.operation, Operation::Reopen) {
                drop(image);
                image = Self::open(path, true).map_err(|error| error.to_string())?;
            }
        }
        image.flush().map_err(|error| error.to_string())
    }

    fn read_all(&self, path: &Path) -> Result<Vec<u8>, String> {
        let image = Self::open(path, false).map_err(|error| error.to_string())?;
        let mut all = vec![0xaa; usize::try_from(image.size()).expect("small")];
        image
            .read(&mut all[..], 0)
            .map_err(|error| error.to_string())?;
        Ok(all)
    }
}
