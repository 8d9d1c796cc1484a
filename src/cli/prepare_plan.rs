//! What the arguments of `prepare` ask for: every name paired with its groups, size and directory.

use std::slice::Iter;

use super::prepare::Prepare;
use crate::error::{Error, ErrorKind, Result};
use crate::view::declaration::Sharing;
use crate::view::prepare::{Groups, Request, Reserve};

/// Everything that is to change.
pub(super) struct Plan {
    /// Regions to declare.
    pub(super) reserve: Vec<Request>,
    /// Regions to enlarge, and by which groups.
    pub(super) enlarge: Vec<(String, Groups)>,
    /// Regions to give back.
    pub(super) release: Vec<String>,
    /// Shared regions to take from their holders.
    pub(super) evict: Vec<String>,
}

impl Plan {
    /// Reads the arguments.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfig`] for those that cannot be, or do not belong together.
    pub(super) fn of(arguments: &Prepare) -> Result<Self> {
        let mut sizes = arguments.sizes.iter();
        let mut directories = arguments.directories.iter();
        let mut reserve = Vec::new();
        for text in &arguments.reserve {
            reserve.push(reserve_request(text, &mut sizes, &mut directories)?);
        }
        for name in &arguments.shared {
            let request = reserve.iter_mut().find(|request| request.name == *name);
            let request = request.ok_or_else(|| {
                invalid(format!(
                    "--shared {name} belongs to no --reserve: name the region there"
                ))
            })?;
            request.sharing = Sharing::Shared;
        }
        let mut enlarge = Vec::new();
        for text in &arguments.enlarge {
            let (name, what) = split(text);
            enlarge.push((
                name.to_owned(),
                groups("--enlarge", text, what, &mut sizes)?,
            ));
        }
        if let Some(extra) = directories.next() {
            return Err(invalid(format!(
                "--dir {extra} belongs to no --reserve of block groups"
            )));
        }
        if let Some(extra) = sizes.next() {
            return Err(invalid(format!(
                "--size {extra} belongs to no --reserve or --enlarge: give the size or the groups, not both"
            )));
        }
        Ok(Self {
            reserve,
            enlarge,
            release: arguments.release.clone(),
            evict: arguments.evict.clone(),
        })
    }
}

fn reserve_request(
    text: &str,
    sizes: &mut Iter<'_, u64>,
    directories: &mut Iter<'_, String>,
) -> Result<Request> {
    let (name, what) = split(text);
    let partition = what.and_then(|what| what.strip_prefix("partition:"));
    let reserve = match partition {
        Some(number) => Reserve::Partition(number.parse().map_err(|_| wrong("--reserve", text))?),
        None => Reserve::Groups {
            groups: groups("--reserve", text, what, sizes)?,
            directory: directories.next().cloned().ok_or_else(|| {
                invalid(format!(
                    "--reserve {text} needs a directory for its children's files: add --dir /{name}"
                ))
            })?,
        },
    };
    Ok(Request {
        name: name.to_owned(),
        sharing: Sharing::Private,
        reserve,
    })
}

fn split(text: &str) -> (&str, Option<&str>) {
    match text.split_once('=') {
        Some((name, what)) => (name, Some(what)),
        None => (text, None),
    }
}

/// The groups that `what` lists, or any of the next size.
fn groups(
    option: &str,
    text: &str,
    what: Option<&str>,
    sizes: &mut Iter<'_, u64>,
) -> Result<Groups> {
    match what {
        Some(what) => match what.strip_prefix("groups:") {
            Some(list) => Ok(Groups::Listed(list.parse()?)),
            None => Err(wrong(option, text)),
        },
        None => sizes.next().copied().map(Groups::Sized).ok_or_else(|| {
            invalid(format!(
                "{option} {text} needs a size: add --size 2G, or say which groups: {option} {text}=groups:8-15"
            ))
        }),
    }
}

fn wrong(option: &str, text: &str) -> Error {
    let partition = match option {
        "--reserve" => ", or NAME=partition:2",
        _ => "",
    };
    invalid(format!(
        "{option} {text}: write NAME=groups:8-15, NAME with a --size{partition}"
    ))
}

fn invalid(what: impl Into<Box<str>>) -> Error {
    Error::new(ErrorKind::InvalidConfig, what)
}
