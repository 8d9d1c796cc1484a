//! New images that get their name only when they are whole.
//!
//! # Invariants
//!
//! 1. Until all of a new image is durable, it is a file of another name: whatever interrupts the work, nothing that
//!    looks finished is left, and an image that was there before stays as it was.

use std::ffi::OsString;
use std::fs::{self, File, Permissions};
use std::path::{Path, PathBuf};

use super::host::{HostOptions, open_file};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::image::Access;
use crate::storage::FileStorage;

/// A file that becomes `path` when it is finished, and goes otherwise.
pub struct PartFile {
    /// Where the whole image will be.
    path: PathBuf,
    /// Where its parts are.
    part: PathBuf,
    /// What is to be replaced; open, so that nobody begins to use it.
    replaced: Option<(FileStorage, Permissions)>,
    is_finished: bool,
}

impl PartFile {
    /// Begins a file that is to be `path`. One that is there already is replaced in the end, unless somebody uses
    /// it.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`] if somebody does, [`ErrorKind::InvalidConfig`] if it is no regular file; and the host's.
    pub fn begin(path: &Path) -> Result<Self> {
        // The file behind a symbolic link is replaced, not the link.
        let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
        let replaced = match fs::metadata(&path) {
            Ok(found) if found.is_file() => {
                let file = open_file(&path, Access::ReadWrite, HostOptions::default())?;
                Some((file, found.permissions()))
            }
            Ok(_) => return Err(not_a_file(&path)),
            Err(_) => None,
        };
        let part = part_of(&path)?;
        Ok(Self {
            path,
            part,
            replaced,
            is_finished: false,
        })
    }

    /// Where the image is to be made.
    #[must_use]
    pub fn part(&self) -> &Path {
        &self.part
    }

    /// Gives the file its name. All of it has to be durable.
    ///
    /// # Errors
    /// The host's; the file is gone then.
    pub fn finish(mut self) -> Result<()> {
        let named = || format!("{}: cannot get its name", self.path.display());
        if let Some((_, permissions)) = &self.replaced {
            fs::set_permissions(&self.part, permissions.clone()).context(named)?;
        }
        fs::rename(&self.part, &self.path).context(named)?;
        self.is_finished = true;
        // The name has to be durable, too.
        let directory = match self.path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        File::open(directory)
            .and_then(|directory| directory.sync_all())
            .context(|| directory.display().to_string())
    }
}

impl Drop for PartFile {
    fn drop(&mut self) {
        if !self.is_finished {
            // The failure that led here is the one to tell.
            let _ = fs::remove_file(&self.part);
        }
    }
}

/// A name in the same directory, since a file keeps its filesystem when it is renamed and images name their backing
/// files relative to it.
fn part_of(path: &Path) -> Result<PathBuf> {
    let Some(name) = path.file_name() else {
        return Err(not_a_file(path));
    };
    let mut part = OsString::from(name);
    part.push(format!(".{}.part", std::process::id()));
    Ok(path.with_file_name(part))
}

fn not_a_file(path: &Path) -> Error {
    Error::new(
        ErrorKind::InvalidConfig,
        format!(
            "{}: not a file that a new image can replace: write into what is there with -n",
            path.display()
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::LockRole;
    use std::os::unix::fs::{PermissionsExt, symlink};

    fn names(directory: &Path) -> Vec<OsString> {
        let mut names: Vec<_> = fs::read_dir(directory)
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn the_name_is_given_at_the_end_and_the_old_file_stays_until_then() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        fs::write(&path, "old").unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        symlink("image", directory.path().join("link")).unwrap();
        let file = PartFile::begin(&directory.path().join("link")).unwrap();
        fs::write(file.part(), "new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"old");
        file.finish().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(names(directory.path()), ["image", "link"]);
    }

    #[test]
    fn what_is_not_finished_goes_and_leaves_the_old_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        for old in [None, Some("old")] {
            if let Some(old) = old {
                fs::write(&path, old).unwrap();
            }
            let file = PartFile::begin(&path).unwrap();
            fs::write(file.part(), "new").unwrap();
            drop(file);
            assert_eq!(names(directory.path()).len(), usize::from(old.is_some()));
        }
        assert_eq!(fs::read(&path).unwrap(), b"old");
    }

    #[test]
    fn what_is_in_use_or_no_file_is_not_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        fs::write(&path, "old").unwrap();
        let user = open_file(&path, Access::ReadOnly, HostOptions::default()).unwrap();
        let error = PartFile::begin(&path).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::InUse);
        drop(user);
        let user = FileStorage::open(&path, Access::ReadWrite, HostOptions::default().cache);
        user.as_ref().unwrap().lock(LockRole::Writer).unwrap();
        assert!(PartFile::begin(&path).is_err());
        let error = PartFile::begin(directory.path()).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::InvalidConfig);
    }
}
