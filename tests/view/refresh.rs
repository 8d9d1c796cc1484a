//! When a child sees what its base has written: real images, real kernels, and a daemon that is started anew.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use seethrough::chain::host::{HostOptions, Locking};
use seethrough::chain::registry::{DiskRequest, Registry};
use seethrough::error::{Error, ErrorKind, Result};
use seethrough::image::{Access, Image};
use seethrough::storage::CacheMode;
use seethrough::sys::{IoBuf, block_on};
use seethrough::units::GuestOffset;
use seethrough::view::View;
use seethrough::view::declared::Views;
use seethrough::view::refresh::{Moved, Policy, base_to_pin};
use tempfile::TempDir;

use crate::bed::{Kernel, assert_clean, can_mount, dump, run};

/// The images of a base and a child.
struct Family {
    dir: TempDir,
    /// How it is mounted: nothing is committed but when the test asks for it.
    options: &'static str,
}

/// The views that a daemon serves.
struct Daemon {
    base: Arc<View>,
    tom: Arc<View>,
}

impl Family {
    fn new(mke2fs: &[&str]) -> Self {
        let family = Self {
            dir: TempDir::new().unwrap(),
            options: if mke2fs == JOURNALED {
                "commit=600"
            } else {
                "noatime"
            },
        };
        let raw = family.path("base.raw");
        fs::File::create(&raw).unwrap().set_len(64 << 20).unwrap();
        let raw = raw.to_str().unwrap();
        run(
            "mke2fs",
            &[&["-q", "-F", "-b", "4096", "-g", "2048"], mke2fs, &[raw]].concat(),
        );
        let [base, tom] = [family.name("base.qcow2"), family.name("tom.qcow2")];
        run("qemu-img", &["convert", "-O", "qcow2", raw, &base]);
        seethrough(&[
            "prepare",
            &base,
            "--reserve",
            "local=groups:6-7",
            "--dir",
            "/local",
        ]);
        seethrough(&["create", "-b", &base, "--region", "local", &tom]);
        family
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn name(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    /// What a daemon opens that serves both.
    fn try_open(&self, policy: Policy) -> Result<Daemon> {
        block_on(async {
            let registry = Registry::new(HostOptions {
                cache: CacheMode::Writeback,
                locking: Locking::Lock,
            });
            let request = |name: &str| DiskRequest {
                path: self.path(name),
                format: None,
                access: Access::ReadWrite,
            };
            let mut requests = vec![request("base.qcow2"), request("tom.qcow2")];
            if let Some(base) = base_to_pin(&requests[1], policy).await? {
                registry.expect_snapshots(&base.path)?;
                requests.push(base);
            }
            let disks = registry.open_family(&requests).await?;
            let mut views = Views::default();
            let base = views.view_of("base", &disks[0], Policy::Live).await?;
            let tom = views.view_of("tom", &disks[1], policy).await?;
            let view = |served: seethrough::view::declared::Served| {
                Arc::clone(served.view().expect("it is shared"))
            };
            Ok(Daemon {
                base: view(base),
                tom: view(tom),
            })
        })
    }

    fn open(&self, policy: Policy) -> Daemon {
        let daemon = self.try_open(policy).unwrap();
        for view in [&daemon.base, &daemon.tom] {
            block_on(view.begin_session()).unwrap();
        }
        daemon
    }

    fn mount<'a>(&self, view: &'a View, name: &str) -> Kernel<'a> {
        Kernel::mount_in(self.dir.path(), 0, view, name, self.options)
    }

    /// The names of the base's snapshots.
    fn pins(&self) -> Vec<String> {
        let list = run(
            "qemu-img",
            &["snapshot", "-U", "-l", &self.name("base.qcow2")],
        );
        let words = list.split_whitespace().map(str::to_owned);
        words
            .filter(|word| word.starts_with("seethrough-pin-"))
            .collect()
    }

    /// Nothing is left of pins, and stock tools find nothing amiss.
    fn judge(&self) {
        assert_eq!(self.pins(), [""; 0]);
        for name in ["base.qcow2", "tom.qcow2"] {
            run("qemu-img", &["check", "-q", &self.name(name)]);
        }
        let raw = self.name("base.after");
        run(
            "qemu-img",
            &["convert", "-O", "raw", &self.name("base.qcow2"), &raw],
        );
        assert_clean(Path::new(&raw));
        let flat = self.name("flat.raw");
        let _ = fs::remove_file(&flat);
        seethrough(&["flatten", "-O", "raw", &self.name("tom.qcow2"), &flat]);
        assert_clean(Path::new(&flat));
    }
}

impl Daemon {
    /// What happens when all front-ends leave, and the daemon ends.
    fn end(self) {
        for view in [&self.tom, &self.base] {
            block_on(view.close()).unwrap();
        }
    }

    fn refresh(&self) -> Result<Moved> {
        block_on(self.tom.refresh())
    }
}

fn seethrough(arguments: &[&str]) -> String {
    run(env!("CARGO_BIN_EXE_seethrough"), arguments)
}

fn in_order(_: &mut [crate::bed::Changed]) {}

fn write(kernel: &Kernel<'_>, name: &str, text: &str) {
    let mut file = fs::File::create(kernel.mount.join(name)).unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file.sync_all().unwrap();
}

fn read(kernel: &Kernel<'_>, name: &str) -> Option<String> {
    fs::read_to_string(kernel.mount.join(name)).ok()
}

/// Has the base write a file and commit it.
fn publish(base: &mut Kernel<'_>, name: &str) {
    write(base, name, &format!("what {name} holds\n").repeat(3000));
    base.commit(in_order);
}

const JOURNALED: &[&str] = &["-t", "ext4", "-J", "size=4"];
const UNJOURNALED: &[&str] = &["-t", "ext4", "-O", "^has_journal"];

#[test]
fn on_mount_a_view_moves_between_mounts_and_never_under_one() {
    if !can_mount() {
        return;
    }
    for mke2fs in [JOURNALED, UNJOURNALED] {
        let family = Family::new(mke2fs);
        let daemon = family.open(Policy::OnMount);
        let mut base = family.mount(&daemon.base, "base");
        publish(&mut base, "first");

        let mut tom = family.mount(&daemon.tom, "tom");
        // Without a journal in between, the base is not consistent while it is mounted.
        let has_journal = mke2fs == JOURNALED;
        if has_journal {
            assert!(read(&tom, "first").is_some_and(|text| text.contains("what first holds")));
        }
        write(&tom, "local/own", "tom's");
        tom.deliver(in_order);
        assert_eq!(family.pins().len(), 1);

        publish(&mut base, "second");
        assert!(
            dump(&*daemon.tom) == tom.seen(),
            "the view moved under a mount"
        );
        assert_eq!(daemon.refresh().unwrap_err().kind(), ErrorKind::Refused);

        // The daemon is started anew under both.
        let (base, tom) = (base.disconnected(), tom.disconnected());
        daemon.end();
        assert_eq!(family.pins().len(), 1);
        let daemon = family.open(Policy::OnMount);
        let mut base = base.reconnected(&*daemon.base);
        let mut tom = tom.reconnected(&*daemon.tom);
        publish(&mut base, "third");
        assert!(
            dump(&*daemon.tom) == tom.seen(),
            "the view moved with the daemon"
        );
        write(&tom, "local/more", "tom's, too");
        tom.deliver(in_order);
        assert!(dump(&*daemon.tom) == tom.seen());
        tom.unmount();

        let pins = family.pins();
        base.unmount();
        let tom = family.mount(&daemon.tom, "tom");
        for name in ["first", "second", "third"] {
            assert!(
                read(&tom, name).is_some_and(|text| text.contains(name)),
                "{name}"
            );
        }
        assert_eq!(read(&tom, "local/own").as_deref(), Some("tom's"));
        let moved = family.pins();
        assert_eq!(moved.len(), 1);
        assert_ne!(moved, pins, "another snapshot is shown");
        tom.unmount();
        // Nothing has been written to the base: the view stays where it is.
        dump(&*daemon.tom);
        assert_eq!(family.pins(), moved);
        daemon.end();
        family.judge();
    }
}

#[test]
fn a_manual_view_moves_on_command_and_only_while_nothing_is_mounted() {
    if !can_mount() {
        return;
    }
    let family = Family::new(JOURNALED);
    let daemon = family.open(Policy::Manual);
    let mut base = family.mount(&daemon.base, "base");
    publish(&mut base, "first");
    let mut tom = family.mount(&daemon.tom, "tom");
    assert_eq!(read(&tom, "first"), None);
    write(&tom, "local/own", "tom's");
    tom.deliver(in_order);
    let error = daemon.refresh().unwrap_err();
    assert!(error.to_string().contains("unmount it"), "{error}");
    tom.unmount();
    // Mounting alone moves nothing, nor does a new front-end or a new daemon.
    let base = base.disconnected();
    daemon.end();
    let daemon = family.open(Policy::Manual);
    let mut base = base.reconnected(&*daemon.base);
    let tom = family.mount(&daemon.tom, "tom");
    assert_eq!(read(&tom, "first"), None);
    tom.unmount();
    assert_eq!(daemon.refresh().unwrap(), Moved::ToNow);
    assert_eq!(daemon.refresh().unwrap(), Moved::Nowhere);
    publish(&mut base, "second");
    let tom = family.mount(&daemon.tom, "tom");
    assert!(read(&tom, "first").is_some());
    assert_eq!(read(&tom, "second"), None);
    tom.unmount();
    base.unmount();
    daemon.end();
    // Served live, a child gives its snapshot up.
    assert_eq!(family.pins().len(), 1);
    let daemon = family.open(Policy::Live);
    let tom = family.mount(&daemon.tom, "tom");
    assert!(read(&tom, "second").is_some());
    tom.unmount();
    let error = daemon.refresh().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidConfig);
    daemon.end();
    let left = family.pins();
    assert_eq!(
        left.len(),
        1,
        "it can be deleted only by who can take snapshots"
    );
    seethrough(&["snapshot", "-d", &left[0], &family.name("base.qcow2")]);
    family.judge();
}

/// The superblock of a child's view, written back: mounted, or cleanly unmounted.
fn mark(view: &View, mounted: bool) {
    const STATE: usize = 0x3a;
    let buf = IoBuf::zeroed(1024);
    block_on(view.read(GuestOffset(1024), buf.clone())).unwrap();
    let mut superblock = buf.to_vec();
    superblock[STATE] = u8::from(!mounted);
    let superblock = IoBuf::from_bytes(&superblock);
    block_on(view.write(GuestOffset(1024), superblock)).unwrap();
    block_on(view.flush()).unwrap();
}

#[test]
fn a_mounted_child_whose_snapshot_is_gone_is_not_served_another() {
    let family = Family::new(UNJOURNALED_UNSEALED);
    let daemon = family.open(Policy::OnMount);
    mark(&daemon.tom, true);
    daemon.end();
    let pins = family.pins();
    seethrough(&["snapshot", "-d", &pins[0], &family.name("base.qcow2")]);
    let begin = |policy| {
        let daemon = family.try_open(policy).unwrap();
        block_on(daemon.tom.begin_session()).map(|()| daemon)
    };
    let error = begin(Policy::Manual).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Refused);
    assert!(error.to_string().contains("refresh=live"), "{error}");
    let daemon = begin(Policy::Live).unwrap();
    mark(&daemon.tom, false);
    daemon.end();
    begin(Policy::OnMount).unwrap().end();
    family.judge();
}

/// No checksum, so that a superblock can be changed by hand.
const UNJOURNALED_UNSEALED: &[&str] = &["-t", "ext4", "-O", "^has_journal,^metadata_csum"];

#[test]
fn what_a_power_cut_leaves_of_snapshots_is_deleted_when_the_child_is_served_next() {
    let family = Family::new(UNJOURNALED_UNSEALED);
    let daemon = family.open(Policy::OnMount);
    mark(&daemon.tom, true);
    daemon.end();
    let pins = family.pins();
    let (child, number) = pins[0].rsplit_once('-').unwrap();
    let next = number.parse::<u64>().unwrap() + 1;
    let base = family.name("base.qcow2");
    let other = "seethrough-pin-0123456789abcdef0123456789abcdef-1";
    for left in [
        format!("{child}-{next}"),
        format!("{child}-7"),
        other.to_owned(),
    ] {
        seethrough(&["snapshot", "-c", &left, &base]);
    }
    let daemon = family.open(Policy::OnMount);
    assert_eq!(family.pins(), [&pins[0], other]);
    mark(&daemon.tom, false);
    daemon.end();
    assert_eq!(family.pins(), [other]);
    seethrough(&["snapshot", "-d", other, &base]);
    family.judge();
}

#[test]
fn what_cannot_follow_a_policy_is_refused_with_a_remedy() {
    let family = Family::new(UNJOURNALED);
    let open = |name: &str, access, policy| {
        block_on(async {
            let registry = Registry::new(HostOptions::default());
            let request = DiskRequest {
                path: family.path(name),
                format: None,
                access,
            };
            let mut requests = vec![request];
            if let Some(base) = base_to_pin(&requests[0], policy).await? {
                registry.expect_snapshots(&base.path)?;
                requests.push(base);
            }
            let disks = registry.open_family(&requests).await?;
            let served = Views::default().view_of("vm", &disks[0], policy).await;
            served.map(|_| ())
        })
    };
    let refused = |outcome: Result<(), Error>, what: &str| {
        let error = outcome.unwrap_err().to_string();
        assert!(error.contains(what), "{error}");
    };
    refused(
        open("base.qcow2", Access::ReadWrite, Policy::OnMount),
        "is for children",
    );
    refused(
        open("tom.qcow2", Access::ReadOnly, Policy::OnMount),
        "read-only",
    );
    open("tom.qcow2", Access::ReadWrite, Policy::OnMount).unwrap();

    let raw = family.name("base.raw");
    seethrough(&[
        "prepare",
        "-f",
        "raw",
        &raw,
        "--reserve",
        "local=groups:6-7",
        "--dir",
        "/local",
    ]);
    let child = family.name("on-raw.qcow2");
    seethrough(&[
        "create", "-b", &raw, "-F", "raw", "--region", "local", &child,
    ]);
    refused(
        open("on-raw.qcow2", Access::ReadWrite, Policy::Manual),
        "seethrough convert -O qcow2",
    );
    open("on-raw.qcow2", Access::ReadWrite, Policy::Live).unwrap();
}
