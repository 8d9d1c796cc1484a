//! How the VMs of a daemon are named on the command line and in its configuration file: one set of keys for both.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::options::{parse_key_values, parse_switch};
use crate::chain::format::Format;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::view::refresh::Policy;
use crate::virtio_blk::ID_LEN;

/// One VM's disk, as asked for; what is missing follows the daemon's defaults.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct VmOptions {
    /// The VM's name, for messages and as its default serial.
    pub name: String,
    /// The disk image.
    pub image: PathBuf,
    /// Where the front-end connects.
    pub socket: PathBuf,
    /// The image's format, `raw` or `qcow2`; without it, the image has to be qcow2.
    #[serde(default, deserialize_with = "format_from_name")]
    pub format: Option<Format>,
    /// Whether the disk refuses writes.
    #[serde(default)]
    pub readonly: bool,
    /// What the guest reads as the disk's serial.
    pub serial: Option<String>,
    /// Virtqueues that the guest may use.
    pub num_queues: Option<u16>,
    /// Entries of each virtqueue.
    pub queue_size: Option<u16>,
    /// When a child sees what its base has written.
    #[serde(default, deserialize_with = "policy_from_name")]
    pub refresh: Policy,
}

fn policy_from_name<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Policy, D::Error> {
    let name = String::deserialize(deserializer)?;
    name.parse().map_err(serde::de::Error::custom)
}

fn format_from_name<'de, D: serde::Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<Format>, D::Error> {
    let name = String::deserialize(deserializer)?;
    name.parse().map(Some).map_err(serde::de::Error::custom)
}

/// The configuration file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct ConfigFile {
    #[serde(default)]
    vm: Vec<VmOptions>,
}

impl VmOptions {
    /// Reads `name=…,image=…,socket=…` and so on, as `--vm` takes it.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfig`] for unknown, repeated, missing and unreadable keys.
    pub fn parse(list: &str) -> Result<Self> {
        let mut options = Self::default();
        let mut seen = HashSet::new();
        for (key, value) in parse_key_values(list)? {
            options.set(&key, value)?;
            if !seen.insert(key.clone()) {
                return Err(invalid(format!("--vm {list}: '{key}' is there twice")));
            }
        }
        for key in ["name", "image", "socket"] {
            if !seen.contains(key) {
                return Err(invalid(format!("--vm {list}: '{key}=' is missing")));
            }
        }
        Ok(options)
    }

    fn set(&mut self, key: &str, value: String) -> Result<()> {
        match key {
            "name" => self.name = value,
            "image" => self.image = value.into(),
            "socket" => self.socket = value.into(),
            "format" => self.format = Some(value.parse()?),
            "readonly" => self.readonly = parse_switch(key, &value)?,
            "serial" => self.serial = Some(value),
            "num-queues" => self.num_queues = Some(number(key, &value)?),
            "queue-size" => self.queue_size = Some(number(key, &value)?),
            "refresh" => self.refresh = value.parse()?,
            _ => {
                return Err(invalid(format!(
                    "'{}' is no key of --vm: the keys are name, image, socket, format, readonly, serial, \
                     num-queues, queue-size and refresh",
                    key.escape_debug()
                )));
            }
        }
        Ok(())
    }

    /// The serial that the guest reads: the one given, or as much of the name as fits.
    #[must_use]
    pub fn serial(&self) -> &str {
        if let Some(serial) = &self.serial {
            return serial;
        }
        let mut end = self.name.len().min(ID_LEN);
        while !self.name.is_char_boundary(end) {
            end -= 1;
        }
        &self.name[..end]
    }
}

/// Reads the VMs of a configuration file. Relative paths in it start at its directory.
///
/// # Errors
/// If the file cannot be read, is no TOML, or has unknown or missing keys.
pub fn read_config(path: &Path) -> Result<Vec<VmOptions>> {
    let text = std::fs::read_to_string(path).context(|| path.display().to_string())?;
    let mut config: ConfigFile = toml::from_str(&text).map_err(|error| {
        invalid(format!(
            "{}: {}",
            path.display(),
            error.to_string().trim_end()
        ))
    })?;
    let directory = path.parent().unwrap_or(Path::new(""));
    for vm in &mut config.vm {
        vm.image = directory.join(&vm.image);
        vm.socket = directory.join(&vm.socket);
    }
    Ok(config.vm)
}

/// Checks that every VM has a name and a socket of its own.
///
/// # Errors
/// [`ErrorKind::InvalidConfig`] if two have the same, or there is no VM at all.
pub fn check_apart(vms: &[VmOptions]) -> Result<()> {
    let mut names = HashSet::new();
    let mut sockets = HashSet::new();
    for vm in vms {
        if vm.name.is_empty() {
            return Err(invalid(format!(
                "the VM with image {} has no name",
                vm.image.display()
            )));
        }
        if !names.insert(&vm.name) {
            return Err(invalid(format!("two VMs have the name '{}'", vm.name)));
        }
        if !vm.socket.as_os_str().is_empty() && !sockets.insert(&vm.socket) {
            return Err(invalid(format!(
                "two VMs have the socket {}",
                vm.socket.display()
            )));
        }
    }
    Ok(())
}

fn number(key: &str, value: &str) -> Result<u16> {
    value.parse().map_err(|_| {
        invalid(format!(
            "'{key}={value}': the value is a number up to 65535"
        ))
    })
}

fn invalid(why: String) -> Error {
    Error::new(ErrorKind::InvalidConfig, why)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tom() -> VmOptions {
        VmOptions {
            name: "tom".to_owned(),
            image: "tom.qcow2".into(),
            socket: "tom.sock".into(),
            format: Some(Format::Qcow2),
            readonly: true,
            serial: Some("disk, first".to_owned()),
            num_queues: Some(4),
            queue_size: Some(128),
            refresh: Policy::OnMount,
        }
    }

    #[test]
    fn the_command_line_and_the_file_say_the_same() {
        let list = "name=tom,image=tom.qcow2,socket=tom.sock,format=qcow2,readonly=on,serial=disk,, first,\
                    num-queues=4,queue-size=128,refresh=on-mount";
        assert_eq!(VmOptions::parse(list).unwrap(), tom());

        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("family.toml");
        let text = r#"
            [[vm]]
            name = "tom"
            image = "tom.qcow2"
            socket = "tom.sock"
            format = "qcow2"
            readonly = true
            serial = "disk, first"
            num-queues = 4
            queue-size = 128
            refresh = "on-mount"

            [[vm]]
            name = "base"
            image = "/images/base.qcow2"
            socket = "base.sock"
        "#;
        std::fs::write(&path, text).unwrap();
        let vms = read_config(&path).unwrap();
        let beside = VmOptions {
            image: dir.path().join("tom.qcow2"),
            socket: dir.path().join("tom.sock"),
            ..tom()
        };
        assert_eq!(vms[0], beside);
        assert_eq!(vms[1].image, Path::new("/images/base.qcow2"));
        assert_eq!(vms[1].format, None);
    }

    #[test]
    fn unknown_repeated_and_missing_keys_are_refused() {
        let good = "name=a,image=b,socket=c";
        assert!(VmOptions::parse(good).is_ok());
        for bad in [
            format!("{good},colour=red"),
            format!("{good},name=d"),
            "name=a,image=b".to_owned(),
            format!("{good},num-queues=many"),
            format!("{good},readonly=perhaps"),
            format!("{good},format=vmdk"),
        ] {
            assert!(VmOptions::parse(&bad).is_err(), "{bad}");
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("family.toml");
        for bad in ["colour = 1", "[[vm]]\nname = \"a\"", "[[vm]\n"] {
            std::fs::write(&path, bad).unwrap();
            let error = read_config(&path).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidConfig, "{bad}");
            assert!(error.to_string().contains("family.toml"), "{error}");
        }
    }

    #[test]
    fn vms_have_names_and_sockets_of_their_own() {
        let other = VmOptions {
            name: "huck".to_owned(),
            socket: "huck.sock".into(),
            ..tom()
        };
        assert!(check_apart(&[tom(), other.clone()]).is_ok());
        assert!(
            check_apart(&[
                tom(),
                VmOptions {
                    name: "huck".to_owned(),
                    ..tom()
                }
            ])
            .is_err()
        );
        assert!(
            check_apart(&[
                tom(),
                VmOptions {
                    name: "tom".to_owned(),
                    ..other.clone()
                }
            ])
            .is_err()
        );
        assert!(
            check_apart(&[VmOptions {
                name: String::new(),
                ..other
            }])
            .is_err()
        );
    }

    #[test]
    fn the_name_is_the_serial_as_far_as_it_fits() {
        let named = |name: &str| VmOptions {
            name: name.to_owned(),
            ..VmOptions::default()
        };
        assert_eq!(named("tom").serial(), "tom");
        assert_eq!(
            named("a name of more than twenty bytes").serial(),
            "a name of more than "
        );
        assert_eq!(named("öööööööööxö").serial(), "öööööööööx");
        assert_eq!(tom().serial(), "disk, first");
    }
}
