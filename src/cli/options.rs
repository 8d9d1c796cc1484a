//! Values that several verbs take, read as `qemu-img` reads them.

use crate::chain::format::Format;
use crate::error::{Error, ErrorKind, Result};
use crate::storage::CacheMode;

/// A size in bytes: digits, perhaps a fraction, and perhaps a suffix b, k, M, G, T, P or E in either case, which
/// are powers of 1024. Hexadecimal digits after `0x` take no suffix.
///
/// # Errors
/// A sentence for clap if it is none.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let invalid = || {
        format!(
            "'{text}' is no size: give a number and perhaps one of the suffixes k, M, G, T, P, E"
        )
    };
    let too_large = || {
        format!(
            "'{text}' is more than the {} bytes a disk can have",
            i64::MAX
        )
    };
    if let Some(digits) = text.strip_prefix("0x") {
        return u64::from_str_radix(digits, 16).map_err(|_| invalid());
    }
    let end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    let shift = match suffix {
        "" | "b" | "B" => 0,
        "k" | "K" => 10,
        "m" | "M" => 20,
        "g" | "G" => 30,
        "t" | "T" => 40,
        "p" | "P" => 50,
        "e" | "E" => 60,
        _ => return Err(invalid()),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let whole: u128 = whole.parse().map_err(|_| invalid())?;
    let mut bytes = whole.checked_shl(shift).filter(|_| whole < 1 << 64);
    if !fraction.is_empty() {
        if shift == 0 || fraction.len() > 18 {
            return Err(invalid());
        }
        let digits: u128 = fraction.parse().map_err(|_| invalid())?;
        let scale = fraction.chars().fold(1u128, |scale, _| scale * 10);
        let part = (digits << shift) / scale;
        bytes = bytes.and_then(|bytes| bytes.checked_add(part));
    }
    bytes
        .and_then(|bytes| u64::try_from(bytes).ok())
        .filter(|bytes| i64::try_from(*bytes).is_ok())
        .ok_or_else(too_large)
}

/// The format of an image.
///
/// # Errors
/// A sentence for clap if it is not supported.
pub fn parse_format(name: &str) -> Result<Format, String> {
    name.parse().map_err(|error: Error| error.to_string())
}

/// A host cache mode, of those that `qemu-img` knows.
///
/// # Errors
/// A sentence for clap if there is none of this name, or it is not supported.
pub fn parse_cache(name: &str) -> Result<CacheMode, String> {
    match name {
        // What is unsafe to leave out is done all the same: whoever allows it loses nothing.
        "writeback" | "unsafe" => Ok(CacheMode::Writeback),
        "none" => Ok(CacheMode::None),
        "writethrough" | "directsync" => Err(format!(
            "the cache mode '{name}' is not supported: use writeback or none, after which all is flushed at the end"
        )),
        _ => Err(format!(
            "there is no cache mode '{name}': use writeback or none"
        )),
    }
}

/// The pairs of a list `key=value,key=value`: a comma in a value is written twice, and a key alone stands for
/// `key=on`.
///
/// # Errors
/// [`ErrorKind::InvalidConfig`] for a pair without a key.
pub fn parse_key_values(list: &str) -> Result<Vec<(String, String)>> {
    split_at_single_commas(list)
        .into_iter()
        .filter(|pair| !pair.is_empty())
        .map(|pair| {
            let (key, value) = pair.split_once('=').unwrap_or((&pair, "on"));
            if key.is_empty() {
                return Err(Error::new(
                    ErrorKind::InvalidConfig,
                    format!("'{pair}' has no key: options are written key=value,key=value"),
                ));
            }
            Ok((key.to_owned(), value.to_owned()))
        })
        .collect()
}

fn split_at_single_commas(list: &str) -> Vec<String> {
    let mut pairs = vec![String::new()];
    let mut chars = list.chars().peekable();
    while let Some(c) = chars.next() {
        let escaped = c == ',' && chars.next_if_eq(&',').is_some();
        if c == ',' && !escaped {
            pairs.push(String::new());
        } else if let Some(pair) = pairs.last_mut() {
            pair.push(c);
        }
    }
    pairs
}

/// The value of a switch, `on` or `off`.
///
/// # Errors
/// [`ErrorKind::InvalidConfig`] for anything else.
pub fn parse_switch(key: &str, value: &str) -> Result<bool> {
    match value {
        "on" | "yes" | "true" | "y" => Ok(true),
        "off" | "no" | "false" | "n" => Ok(false),
        _ => Err(Error::new(
            ErrorKind::InvalidConfig,
            format!("'{key}={value}': the value is 'on' or 'off'"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_qemu_img_reads_them() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("512b", 512),
            ("4k", 4096),
            ("64K", 65536),
            ("1.5G", 3 << 29),
            ("0.25k", 256),
            ("10T", 10 << 40),
            ("7E", 7 << 60),
            ("0x200", 512),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in [
            "",
            "k",
            "-1",
            "1.5",
            "1x",
            "1 G",
            "10GiB",
            "1.2.3k",
            "0x",
            "8E",
            "99999999999E",
        ] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn key_values_keep_doubled_commas_and_take_bare_switches() {
        let pairs = parse_key_values("cluster_size=64k,backing_file=a,,b,lazy_refcounts").unwrap();
        let expected = [
            ("cluster_size", "64k"),
            ("backing_file", "a,b"),
            ("lazy_refcounts", "on"),
        ];
        assert_eq!(
            pairs,
            expected.map(|(key, value)| (key.to_owned(), value.to_owned()))
        );
        assert!(parse_key_values("=4").is_err());
        assert!(parse_key_values("").unwrap().is_empty());
    }

    #[test]
    fn switches_are_on_or_off() {
        assert!(parse_switch("a", "on").unwrap());
        assert!(!parse_switch("a", "off").unwrap());
        assert!(parse_switch("a", "maybe").is_err());
    }

    #[test]
    fn cache_modes_are_those_of_qemu_img_as_far_as_there_are_any() {
        assert_eq!(parse_cache("none"), Ok(CacheMode::None));
        for name in ["writeback", "unsafe"] {
            assert_eq!(parse_cache(name), Ok(CacheMode::Writeback));
        }
        assert!(
            parse_cache("directsync")
                .unwrap_err()
                .contains("not supported")
        );
        assert!(parse_cache("fast").unwrap_err().contains("no cache mode"));
    }
}
