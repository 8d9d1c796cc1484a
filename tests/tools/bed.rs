//! Chains of images on disk, made by the stock tools from a seed, and both programs to run on them.

#![allow(unreachable_pub, dead_code)]
// A failed expectation ends a test: here that is the point.
#![allow(clippy::panic, clippy::unwrap_used)]

use std::ffi::OsStr;
use std::path::PathBuf;
use std::process::{Command, Output};

use rand::RngExt;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;

use crate::engine::run;

/// What layers can be: options for `qemu-img create -o`, the format, and whether clusters can be compressed.
const SHAPES: &[(&str, &str)] = &[
    ("raw", ""),
    ("qcow2", "cluster_size=64k"),
    ("qcow2", "cluster_size=512"),
    ("qcow2", "cluster_size=4k,compression_type=zstd"),
    ("qcow2", "cluster_size=2M"),
    ("qcow2", "cluster_size=64k,extended_l2=on"),
    (
        "qcow2",
        "cluster_size=16k,extended_l2=on,compression_type=zstd",
    ),
    ("qcow2", "cluster_size=64k,compat=0.10"),
    ("qcow2", "cluster_size=32k,refcount_bits=1"),
    ("qcow2", "cluster_size=64k,lazy_refcounts=on"),
];

/// A directory with images, in which both programs run.
pub struct Bed {
    pub directory: tempfile::TempDir,
}

/// A layer of a chain.
#[derive(Clone, Debug)]
pub struct Layer {
    pub name: String,
    pub format: &'static str,
    pub options: &'static str,
    pub size: u64,
}

impl Bed {
    pub fn new() -> Self {
        // A filesystem with holes, which /tmp may not be.
        let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"));
        Self {
            directory: directory.expect("a temporary directory"),
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Runs `seethrough` in the directory.
    pub fn seethrough<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_seethrough"))
            .args(arguments)
            .current_dir(self.directory.path())
            .output()
            .expect("seethrough runs")
    }

    /// Runs `seethrough`, which has to succeed; its standard output.
    pub fn ok(&self, arguments: &[&str]) -> String {
        let output = self.seethrough(arguments);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {stderr}");
        String::from_utf8(output.stdout).expect("UTF-8")
    }

    /// Runs `seethrough`, which has to fail with this exit code; its standard error.
    pub fn fails(&self, arguments: &[&str], code: i32) -> String {
        let output = self.seethrough(arguments);
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {stderr}");
        let told = stderr.lines().any(|line| line.starts_with("seethrough: "));
        assert!(told, "{stderr}");
        stderr
    }

    /// Runs a stock tool in the directory; its exit code, and what it printed to standard output and error.
    pub fn stock(&self, program: &str, arguments: &[&str]) -> (i32, String, String) {
        let output = Command::new(program)
            .args(arguments)
            .current_dir(self.directory.path())
            .output()
            .expect("the stock tool is installed");
        (
            output.status.code().unwrap_or(-1),
            String::from_utf8_lossy(&output.stdout).into_owned(),
            String::from_utf8_lossy(&output.stderr).into_owned(),
        )
    }

    /// Runs `qemu-img`, which has to succeed; its standard output.
    pub fn qemu_img(&self, arguments: &[&str]) -> String {
        let (code, stdout, stderr) = self.stock("qemu-img", arguments);
        assert_eq!(code, 0, "qemu-img {arguments:?}: {stderr}");
        stdout
    }

    /// Runs commands of `qemu-io` on an image. Those that the image cannot do, like compressing in place, it reports
    /// and goes on.
    pub fn qemu_io(&self, format: &str, name: &str, commands: &[String]) {
        let mut arguments = vec!["-f", format];
        for command in commands {
            arguments.extend(["-c", command]);
        }
        arguments.push(name);
        let _ = self.stock("qemu-io", &arguments);
    }

    /// Has `qemu-img check` look at a qcow2 image, which has to be without fault.
    pub fn check(&self, name: &str) {
        let path = self.path(name);
        let arguments = [
            OsStr::new("check"),
            "-f".as_ref(),
            "qcow2".as_ref(),
            path.as_ref(),
        ];
        let (code, text) = run("qemu-img", &arguments);
        assert_eq!(code, 0, "{name}: {text}");
    }

    /// Asserts that both images have the same contents, as `qemu-img compare` sees them.
    pub fn assert_same(&self, a: (&str, &str), b: (&str, &str)) {
        let (code, stdout, stderr) =
            self.stock("qemu-img", &["compare", "-f", a.0, "-F", b.0, a.1, b.1]);
        assert_eq!(code, 0, "{a:?} against {b:?}: {stdout}{stderr}");
    }

    /// Makes a chain of 1 to 4 layers, the base first, with data of all kinds in each.
    pub fn chain(&self, rng: &mut StdRng, prefix: &str) -> Vec<Layer> {
        let depth = rng.random_range(1..=4);
        self.chain_of(rng, prefix, depth)
    }

    /// Makes a chain of this many layers.
    pub fn chain_of(&self, rng: &mut StdRng, prefix: &str, depth: usize) -> Vec<Layer> {
        let mut layers: Vec<Layer> = Vec::new();
        for number in 0..depth {
            let shapes = if number == 0 { SHAPES } else { &SHAPES[1..] };
            let (format, options) = *shapes.choose(rng).expect("not empty");
            let layer = Layer {
                name: format!("{prefix}{number}.{format}"),
                format,
                options,
                size: rng.random_range(1..4096) * 512,
            };
            self.create(&layer, layers.last());
            self.fill(rng, &layer);
            layers.push(layer);
        }
        layers
    }

    /// Makes an empty image.
    pub fn create(&self, layer: &Layer, backing: Option<&Layer>) {
        let size = layer.size.to_string();
        let mut arguments = vec!["create", "-q", "-f", layer.format];
        if !layer.options.is_empty() {
            arguments.extend(["-o", layer.options]);
        }
        if let Some(backing) = backing {
            arguments.extend(["-b", &backing.name, "-F", backing.format]);
        }
        arguments.extend([layer.name.as_str(), &size]);
        self.qemu_img(&arguments);
    }

    /// Writes data, zeros and holes at random places of an image.
    pub fn fill(&self, rng: &mut StdRng, layer: &Layer) {
        let mut commands = Vec::new();
        for _ in 0..rng.random_range(0..10) {
            let sectors = layer.size / 512;
            let start = rng.random_range(0..sectors);
            let most = (sectors - start).min(if rng.random_bool(0.5) { 20 } else { 1000 });
            let len = rng.random_range(1..=most) * 512;
            let start = start * 512;
            let pattern: u8 = rng.random_range(1..=255);
            commands.push(match rng.random_range(0..7) {
                0..=2 => format!("write -P {pattern} {start} {len}"),
                3 => format!("write -z {start} {len}"),
                4 => format!("write -z -u {start} {len}"),
                5 => format!("discard {start} {len}"),
                _ => {
                    // Whole clusters alone can be compressed, wherever the last one ends.
                    let cluster = 2 << 20;
                    let start = start / cluster * cluster;
                    let len = (layer.size - start).min(cluster);
                    format!("write -c -P {pattern} {start} {len}")
                }
            });
        }
        self.qemu_io(layer.format, &layer.name, &commands);
    }
}
