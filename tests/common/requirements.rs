//! What guest tests need from the machine, and what happens where it is missing: locally a test says why
//! and is skipped; where `CI` or `SEETHROUGH_REQUIRE_GUESTS` is set, it fails.

use std::env;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::SystemTime;

use super::skip::{WITH_GUESTS, skip};

/// What a guest boots from; built by `vm-images/build`.
#[derive(Debug)]
pub struct VmImages {
    pub kernel: PathBuf,
    pub initramfs: PathBuf,
    /// An ext4 filesystem with a tree like `/usr/share`.
    pub share: PathBuf,
}

/// The guest images, built first where they are missing or older than their recipes.
///
/// # Panics
///
/// Where they cannot be built; ask [`guests_available`] first.
pub fn vm_images() -> &'static VmImages {
    images().as_ref().expect("guests are available")
}

/// Whether tests with guests can run here. Where not, says so on the terminal, past the test runner's
/// capture.
///
/// # Panics
///
/// Where they cannot run, but must (`CI` or `SEETHROUGH_REQUIRE_GUESTS` is set).
pub fn guests_available() -> bool {
    let Err(reason) = requirements() else {
        return true;
    };
    skip(&reason, WITH_GUESTS);
    false
}

fn requirements() -> Result<(), String> {
    for tool in [
        "qemu-system-x86_64",
        "qemu-img",
        "mkfs.ext4",
        "e2fsck",
        "sgdisk",
    ] {
        if find_tool(tool).is_none() {
            return Err(format!(
                "{tool} is not installed (ci/test installs what is needed)"
            ));
        }
    }
    images().as_ref().map(|_| ()).map_err(Clone::clone)
}

/// A program on `PATH`, or where Debian keeps what root runs, which an ordinary user's `PATH` lacks.
pub fn find_tool(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|dir| dir.join(name))
        .find(|file| file.is_file())
}

fn images() -> &'static Result<VmImages, String> {
    static IMAGES: OnceLock<Result<VmImages, String>> = OnceLock::new();
    IMAGES.get_or_init(build_images)
}

fn build_images() -> Result<VmImages, String> {
    let recipes = Path::new(env!("CARGO_MANIFEST_DIR")).join("vm-images");
    let cache = env::var_os("SEETHROUGH_CACHE").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("target/vm-images"),
        PathBuf::from,
    );
    if !is_current(&cache.join("manifest"), &recipes) {
        let build = Command::new(recipes.join("build"))
            .output()
            .map_err(|e| format!("vm-images/build does not run: {e}"))?;
        if !build.status.success() {
            return Err(format!(
                "vm-images/build failed:\n{}",
                String::from_utf8_lossy(&build.stderr)
            ));
        }
    }
    Ok(VmImages {
        kernel: cache.join("vmlinuz"),
        initramfs: cache.join("initramfs"),
        share: cache.join("share.img"),
    })
}

/// Whether the build that `manifest` vouches for is newer than every recipe.
fn is_current(manifest: &Path, recipes: &Path) -> bool {
    let Some(built) = modified(manifest) else {
        return false;
    };
    fs::read_dir(recipes)
        .expect("vm-images is readable")
        .all(|entry| {
            modified(&entry.expect("vm-images is readable").path()).is_some_and(|at| at <= built)
        })
}

fn modified(path: &Path) -> Option<SystemTime> {
    fs::metadata(path).and_then(|meta| meta.modified()).ok()
}
