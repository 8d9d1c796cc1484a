//! What was refused, and whose files it was aimed at: found by the view, held to what debugfs says.

use std::fs;

use seethrough::image::Image;
use seethrough::sys::{IoBuf, block_on};
use seethrough::units::{GuestOffset, InodeNumber};
use seethrough::view::View;
use seethrough::view::file_search::{Found, Part, Wanted};

use crate::RECIPES;
use crate::bed::{Bed, run};

/// What debugfs says of the base.
struct Debugfs {
    image: String,
}

impl Debugfs {
    fn of(bed: &Bed) -> Self {
        let path = bed.path("debugfs.img");
        fs::write(&path, bed.stored()).unwrap();
        Self {
            image: path.to_str().unwrap().to_owned(),
        }
    }

    fn ask(&self, request: &str) -> String {
        run("debugfs", &["-R", request, &self.image])
    }

    /// The blocks of a file.
    fn blocks(&self, path: &str) -> Vec<u64> {
        let text = self.ask(&format!("blocks {path}"));
        // The program's version is among the lines.
        let numbers = |line: &str| -> Option<Vec<u64>> {
            line.split_whitespace()
                .map(|word| word.parse().ok())
                .collect()
        };
        let lines = text.lines().filter(|line| !line.is_empty());
        lines.filter_map(numbers).next().unwrap()
    }

    /// The number behind `what` in the description of a file.
    fn number(&self, path: &str, what: &str) -> u64 {
        let text = self.ask(&format!("stat {path}"));
        let (_, rest) = text.split_once(what).unwrap();
        rest.split_whitespace().next().unwrap().parse().unwrap()
    }
}

fn write(view: &View, at: u64, bytes: &[u8]) -> bool {
    block_on(view.write(GuestOffset(at), IoBuf::from_bytes(bytes))).is_ok()
}

fn found(view: &View, wanted: Wanted) -> Vec<Found> {
    let findings = block_on(view.find_files(&[wanted])).unwrap();
    assert!(!findings.given_up);
    findings.owners.into_iter().next().unwrap()
}

#[test]
fn a_refused_write_is_traced_to_the_path_of_its_file() {
    for recipe in RECIPES.iter().take(4) {
        eprintln!("{}", recipe.name);
        let bed = Bed::new(recipe);
        let child = bed.child("tom");
        let debugfs = Debugfs::of(&bed);
        let probe = bed.probe();
        let superblock = probe.superblock();
        let block_size = u64::from(superblock.block_size);
        let offset = |block: u64| bed.start + block * block_size;
        let expect = |at: u64, path: &str, part: Part| {
            assert!(!write(&child.view, at, &[0xee; 512]), "{path}");
            let entries = child.view.refusals().entries();
            let entry = entries.iter().max_by_key(|entry| entry.last).unwrap();
            assert_eq!(entry.latest.range.0.0, at);
            let bytes = GuestOffset(at)..GuestOffset(at + 512);
            let files = found(&child.view, Wanted::Bytes(bytes));
            let [file] = &files[..] else {
                panic!("{path}: {files:?}")
            };
            assert_eq!((file.path.as_deref(), file.part), (Some(path), part));
            assert_eq!(
                file.inode.0,
                u32::try_from(debugfs.number(path, "Inode:")).unwrap()
            );
        };
        for path in ["/usr/share/file", "/top", "/usr/share", "/usr"] {
            for block in debugfs.blocks(path) {
                expect(offset(block), path, Part::Data);
            }
            let number = InodeNumber(u32::try_from(debugfs.number(path, "Inode:")).unwrap());
            let files = found(&child.view, Wanted::Inode(number));
            assert_eq!(files[0].path.as_deref(), Some(path));
        }
        expect(
            offset(debugfs.number("/top", "File ACL:")),
            "/top",
            Part::Attributes,
        );
        for (path, name) in [("/null", "null"), ("/usr/share/link", "link")] {
            let number = debugfs.ask(&format!("stat {path}"));
            if let Some((_, rest)) = number.split_once("Inode:") {
                let number = rest.split_whitespace().next().unwrap().parse().unwrap();
                let files = found(&child.view, Wanted::Inode(InodeNumber(number)));
                assert!(
                    files[0].path.as_deref().unwrap().ends_with(name),
                    "{files:?}"
                );
            }
        }
        let free = GuestOffset(offset(superblock.blocks_count - 1));
        assert_eq!(
            found(&child.view, Wanted::Bytes(free..GuestOffset(free.0 + 1))),
            []
        );
        assert_eq!(
            found(
                &child.view,
                Wanted::Inode(InodeNumber(superblock.inodes_count))
            ),
            []
        );
    }
}
