//! Moments as people of this host write them.

use std::fmt;

/// A date and a time of day in the host's time zone, printed as `2026-11-20 13:12:14`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LocalTime {
    year: i32,
    month: i32,
    day: i32,
    hour: i32,
    minute: i32,
    second: i32,
}

impl LocalTime {
    /// The moment `seconds` after the start of 1970, UTC; `None` where the host's calendar ends.
    #[must_use]
    pub fn at(seconds: u32) -> Option<Self> {
        let time = libc::time_t::from(seconds);
        // SAFETY: tm is plain integers and a pointer, for which zero is a value.
        let mut broken_down: libc::tm = unsafe { std::mem::zeroed() };
        // SAFETY: both pointers are to variables that outlive the call, which fills `broken_down`.
        let converted = unsafe { libc::localtime_r(&raw const time, &raw mut broken_down) };
        if converted.is_null() {
            return None;
        }
        Some(Self {
            year: broken_down.tm_year.checked_add(1900)?,
            month: broken_down.tm_mon + 1,
            day: broken_down.tm_mday,
            hour: broken_down.tm_hour,
            minute: broken_down.tm_min,
            second: broken_down.tm_sec,
        })
    }
}

impl fmt::Display for LocalTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = format!(
            "{:04}-{:02}-{:02} {:02}:{:02}:{:02}",
            self.year, self.month, self.day, self.hour, self.minute, self.second
        );
        f.pad(&text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moment_is_printed_within_a_day_of_utc() {
        let text = LocalTime::at(1_795_180_334).unwrap().to_string();
        assert!(
            ["2026-11-19", "2026-11-20", "2026-11-21"].contains(&&text[..10]),
            "{text}"
        );
        assert!(text.ends_with(":14"), "{text}");
        assert_eq!(format!("{:>20}", LocalTime::at(0).unwrap()).len(), 20);
    }
}
