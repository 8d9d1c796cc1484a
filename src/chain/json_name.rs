//! Names of backing files in stock QEMU's `json:` form, as far as they name a file of this host.
//!
//! ```text
//! json:{"driver": "qcow2", "file": {"driver": "file", "filename": "PATH"}}      or, flat:
//! json:{"driver": "qcow2", "file.driver": "file", "file.filename": "PATH"}
//! ```
//!
//! Everything else that can be said there (offsets, networks, caches, filters) changes what is read or how: it is
//! refused by its name, and never ignored.

use std::path::PathBuf;

use serde_json::{Map, Value};

use super::format::Format;

/// What a `json:` name says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct JsonName {
    /// The file; relative to the working directory.
    pub(super) path: PathBuf,
    /// What it is, if that is said.
    pub(super) format: Option<Format>,
}

impl JsonName {
    /// Reads what follows `json:`.
    ///
    /// # Errors
    /// Why it is not supported, to go on "the backing file … ".
    pub(super) fn parse(text: &[u8]) -> Result<Self, String> {
        let object: Map<String, Value> =
            serde_json::from_slice(text).map_err(|error| format!("is no JSON object ({error})"))?;
        let mut name = Parts::default();
        for (key, value) in &object {
            match (key.as_str(), value) {
                ("file", Value::Object(file)) => {
                    for (key, value) in file {
                        name.set(&format!("file.{key}"), value)?;
                    }
                }
                _ => name.set(key, value)?,
            }
        }
        match name.protocol.as_deref() {
            None | Some("file") => {}
            Some(other) => {
                return Err(format!(
                    "has the protocol driver {other:?}, and only files of this host are supported"
                ));
            }
        }
        Ok(Self {
            path: name.filename.ok_or("has no \"file.filename\"")?.into(),
            format: match name.driver {
                Some(driver) => Some(driver.parse().map_err(|error| format!("has {error}"))?),
                None => None,
            },
        })
    }
}

/// The keys that are known, each given once at most.
#[derive(Default)]
struct Parts {
    driver: Option<String>,
    protocol: Option<String>,
    filename: Option<String>,
}

impl Parts {
    fn set(&mut self, key: &str, value: &Value) -> Result<(), String> {
        let place = match key {
            "driver" => &mut self.driver,
            "file.driver" => &mut self.protocol,
            "file.filename" => &mut self.filename,
            _ => return Err(format!("has {key:?}, which is not supported")),
        };
        let Value::String(text) = value else {
            return Err(format!("has a {key:?} that is no string"));
        };
        match place.replace(text.clone()) {
            None => Ok(()),
            Some(_) => Err(format!("has {key:?} twice")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<(String, Option<Format>), String> {
        let name = JsonName::parse(text.as_bytes())?;
        Ok((name.path.display().to_string(), name.format))
    }

    #[test]
    fn files_are_named_nested_and_flat() {
        for (text, format) in [
            (
                r#"{"driver":"qcow2","file":{"driver":"file","filename":"a b"}}"#,
                Some(Format::Qcow2),
            ),
            (
                r#"{"driver":"raw","file.driver":"file","file.filename":"a b"}"#,
                Some(Format::Raw),
            ),
            (r#"{"file.filename":"a b"}"#, None),
            (r#" {"file": {"filename": "a b"}} "#, None),
        ] {
            assert_eq!(parsed(text).unwrap(), ("a b".to_owned(), format), "{text}");
        }
    }

    #[test]
    fn whatever_else_is_said_is_refused_by_its_name() {
        for (text, words) in [
            (
                r#"{"driver":"raw","offset":512,"file.filename":"a"}"#,
                "\"offset\"",
            ),
            (
                r#"{"driver":"raw","file":{"filename":"a","aio":"native"}}"#,
                "\"file.aio\"",
            ),
            (r#"{"driver":"nbd","file.filename":"a"}"#, "nbd"),
            (
                r#"{"file.driver":"https","file.filename":"a"}"#,
                "\"https\"",
            ),
            (r#"{"driver":"raw"}"#, "no \"file.filename\""),
            (r#"{"file":{"filename":"a"},"file.filename":"b"}"#, "twice"),
            (r#"{"file":"a"}"#, "\"file\""),
            (r#"{"file.filename":7}"#, "no string"),
            (r#"["a"]"#, "no JSON object"),
            ("", "no JSON object"),
        ] {
            let error = parsed(text).unwrap_err();
            assert!(error.contains(words), "{text}: {error}");
        }
        let deep = "[".repeat(100_000);
        assert!(parsed(&deep).is_err());
    }
}
