//! The policies, by the names that people give them.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, ErrorKind, Result};

/// When a child's view of its base moves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Policy {
    /// Always: the child reads what the base has committed last.
    #[default]
    Live,
    /// When the child's guest reads its superblock, as a kernel does that mounts, unless its filesystem is mounted.
    OnMount,
    /// When an operator says so, unless the child's filesystem is mounted.
    Manual,
}

impl FromStr for Policy {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "live" => Ok(Self::Live),
            "on-mount" => Ok(Self::OnMount),
            "manual" => Ok(Self::Manual),
            _ => Err(Error::new(
                ErrorKind::InvalidConfig,
                format!(
                    "'{}' is no refresh policy: it is live, on-mount or manual",
                    name.escape_debug()
                ),
            )),
        }
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Live => "live",
            Self::OnMount => "on-mount",
            Self::Manual => "manual",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_is_read_as_it_is_written_and_others_are_refused_by_name() {
        for policy in [Policy::Live, Policy::OnMount, Policy::Manual] {
            assert_eq!(policy.to_string().parse::<Policy>().unwrap(), policy);
        }
        let error = "daily".parse::<Policy>().unwrap_err();
        assert!(error.to_string().contains("'daily'"), "{error}");
    }
}
