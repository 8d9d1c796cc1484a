//! The daemon as a vhost-user-blk back-end, driven by the `virtio-driver` crate: no guest, no QEMU.
// Disks of tests are small.
#![allow(clippy::cast_possible_truncation)]

#[path = "../common/mod.rs"]
mod common;
mod driver;
mod hostile;
mod memory;

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use common::Backend;
use driver::{Client, Request, SLOT_LEN, all_features, without_event_idx};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tempfile::TempDir;
use virtio_driver::VirtioBlkFeatureFlags;

const DISK_LEN: u64 = 16 << 20;

/// A raw disk with its daemon.
struct Setup {
    dir: TempDir,
    daemon: Backend,
}

impl Setup {
    fn new(options: &[&str]) -> Self {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
        fs::write(dir.path().join("disk.raw"), pattern(DISK_LEN as usize, 1)).expect("a disk");
        let daemon = start(dir.path(), options);
        Self { dir, daemon }
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("disk.sock")
    }

    fn client(&self) -> Client {
        Client::connect(&self.socket(), 1, 64, all_features())
    }

    /// Ends the daemon cleanly; what the image holds then.
    fn finish(self) -> Vec<u8> {
        self.daemon.stop();
        assert!(
            !self.dir.path().join("disk.sock").exists(),
            "the socket file is left behind"
        );
        fs::read(self.dir.path().join("disk.raw")).expect("the disk")
    }
}

fn start(dir: &Path, options: &[&str]) -> Backend {
    let (image, socket) = (dir.join("disk.raw"), dir.join("disk.sock"));
    let mut arguments: Vec<OsString> = vec![
        format!("--socket-path={}", socket.display()).into(),
        format!("--blk-file={}", image.display()).into(),
        "--format=raw".into(),
    ];
    arguments.extend(options.iter().map(OsString::from));
    Backend::seethrough(arguments, &[socket])
}

/// Bytes that differ from place to place and from seed to seed.
fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; len];
    StdRng::seed_from_u64(seed).fill(&mut bytes[..]);
    bytes
}

#[test]
fn what_is_written_is_read_and_is_in_the_image_after_the_end() {
    let setup = Setup::new(&[]);
    let mut client = setup.client();
    let data = pattern(SLOT_LEN, 2);
    client.write(4096, &data);
    assert_eq!(client.read(4096, SLOT_LEN), data);
    assert_eq!(client.run(Request::Flush), 0);
    let before = pattern(DISK_LEN as usize, 1);
    assert_eq!(client.read(0, 4096), before[..4096]);
    drop(client);

    let image = setup.finish();
    assert_eq!(image[4096..4096 + SLOT_LEN], data);
    assert_eq!(image[4096 + SLOT_LEN..], before[4096 + SLOT_LEN..]);
}

#[test]
fn zeroed_and_discarded_ranges_read_as_zeros_or_as_before() {
    let setup = Setup::new(&[]);
    let before = pattern(DISK_LEN as usize, 1);
    let mut client = setup.client();
    let range = |at: u64, len: usize| at as usize..at as usize + len;
    for (at, unmap) in [(1 << 20, true), (2 << 20, false)] {
        assert_eq!(
            client.run(Request::WriteZeroes {
                at,
                len: 65536,
                unmap
            }),
            0
        );
        assert_eq!(client.read(at, 65536), [0; 65536]);
        assert_eq!(client.read(at + 65536, 512), before[range(at + 65536, 512)]);
    }
    assert_eq!(
        client.run(Request::Discard {
            at: 3 << 20,
            len: 65536
        }),
        0
    );
    let discarded = client.read(3 << 20, 65536);
    assert!(discarded == [0; 65536] || discarded == before[range(3 << 20, 65536)]);
    // A range that no block of the host's begins or ends.
    assert_eq!(
        client.run(Request::WriteZeroes {
            at: 512,
            len: 1024,
            unmap: true
        }),
        0
    );
    assert_eq!(
        client.read(0, 2048),
        [&before[..512], &[0; 1024], &before[1536..2048]].concat()
    );
}

#[test]
fn requests_beyond_the_disk_fail_and_the_device_lives() {
    let setup = Setup::new(&[]);
    let mut client = setup.client();
    let end = DISK_LEN;
    assert_eq!(client.run(Request::Read { at: end, len: 512 }), -libc::EIO);
    assert_eq!(
        client.run(Request::Write {
            at: end - 512,
            len: 1024
        }),
        -libc::EIO
    );
    assert_eq!(
        client.run(Request::WriteZeroes {
            at: end,
            len: 512,
            unmap: false
        }),
        -libc::EIO
    );
    assert_eq!(
        client.run(Request::Discard { at: !511, len: 512 }),
        -libc::EIO
    );
    assert_eq!(
        client.read(end - 512, 512),
        pattern(DISK_LEN as usize, 1)[DISK_LEN as usize - 512..]
    );
}

/// Random requests on all queues at once, each on blocks of its own, against a copy in memory.
fn many_in_flight(features: u64) {
    const QUEUES: usize = 3;
    const DEPTH: usize = 16;
    let setup = Setup::new(&["--num-queues=3"]);
    let seed = rand::random();
    println!("seed {seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let mut model = pattern(DISK_LEN as usize, 1);
    let mut client = Client::connect(&setup.socket(), QUEUES, 64, features);
    for round in 0..40 {
        let mut expected: HashMap<usize, Vec<u8>> = HashMap::new();
        for queue in 0..QUEUES {
            for depth in 0..DEPTH {
                let slot = queue * DEPTH + depth;
                // Each slot has a stretch of the disk: requests under way never overlap.
                let stretch = DISK_LEN / (QUEUES * DEPTH) as u64 / 4096 * 4096;
                let len = rng.random_range(1..=16) * 512;
                let at =
                    stretch * slot as u64 + rng.random_range(0..(stretch - len as u64) / 512) * 512;
                let range = at as usize..at as usize + len;
                if rng.random() {
                    let data = pattern(len, rng.random());
                    client.fill(slot, &data);
                    model[range].copy_from_slice(&data);
                    client.offer(queue, slot, Request::Write { at, len });
                } else {
                    expected.insert(slot, model[range].to_vec());
                    client.offer(queue, slot, Request::Read { at, len });
                }
                if rng.random_range(0..4) == 0 {
                    client.kick(queue);
                }
            }
            client.kick(queue);
        }
        for queue in 0..QUEUES {
            let ended = client.wait(queue, DEPTH);
            assert!(ended.values().all(|ret| *ret == 0), "{ended:?}");
        }
        for (slot, bytes) in expected {
            assert_eq!(
                client.slot(slot, bytes.len()),
                bytes,
                "round {round}, slot {slot}"
            );
        }
    }
    drop(client);
    assert!(setup.finish() == model, "the image is not what was written");
}

#[test]
fn many_requests_in_flight_keep_their_data_apart() {
    many_in_flight(all_features());
}

#[test]
fn many_requests_in_flight_without_event_idx() {
    many_in_flight(without_event_idx());
}

#[test]
fn one_request_at_a_time_never_misses_its_kick_or_its_notification() {
    let setup = Setup::new(&[]);
    let mut client = setup.client();
    let before = pattern(DISK_LEN as usize, 1);
    for i in 0..3000 {
        let at = i % 1000 * 4096;
        assert_eq!(client.read(at, 512), before[at as usize..at as usize + 512]);
    }
}

#[test]
fn front_ends_come_and_go_with_the_state_intact() {
    let setup = Setup::new(&[]);
    let data = pattern(4096, 3);
    let mut client = setup.client();
    client.write(8192, &data);
    // Leaves with a request under way.
    client.offer(0, 0, Request::Write { at: 0, len: 4096 });
    client.kick(0);
    drop(client);
    for _ in 0..3 {
        let mut client = setup.client();
        assert_eq!(client.read(8192, 4096), data);
    }
    // The next one waits until the first has left.
    let first = setup.client();
    let socket = setup.socket();
    let second = std::thread::spawn(move || {
        Client::connect(&socket, 1, 64, all_features()).read(8192, 4096)
    });
    drop(first);
    assert_eq!(second.join().expect("it was served"), data);
}

#[test]
fn nonsense_ends_its_own_session_only() {
    use std::io::{Read, Write};
    let setup = Setup::new(&[]);
    for nonsense in [&[0xff; 64][..], b"GET / HTTP/1.1\r\n\r\n", &[0; 12], b"x"] {
        let mut stream = UnixStream::connect(setup.socket()).expect("the daemon listens");
        stream.write_all(nonsense).expect("it reads");
        stream
            .shutdown(std::net::Shutdown::Write)
            .expect("the stream is open");
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
    }
    assert_eq!(
        setup.client().read(0, 512),
        pattern(DISK_LEN as usize, 1)[..512]
    );
}

#[test]
fn several_vms_in_one_process_are_apart() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
    let names = ["base", "tom"];
    let sockets: Vec<PathBuf> = names
        .iter()
        .map(|name| dir.path().join(format!("{name}.sock")))
        .collect();
    let mut arguments = vec!["serve".to_owned()];
    for (name, socket) in names.iter().zip(&sockets) {
        let image = dir.path().join(format!("{name}.raw"));
        fs::File::create(&image)
            .and_then(|file| file.set_len(DISK_LEN))
            .expect("a disk");
        let (image, socket) = (image.display(), socket.display());
        arguments.push("--vm".to_owned());
        arguments.push(format!(
            "name={name},image={image},socket={socket},format=raw"
        ));
    }
    let daemon = Backend::seethrough(&arguments, &sockets);
    let mut clients: Vec<Client> = sockets
        .iter()
        .map(|socket| Client::connect(socket, 1, 64, all_features()))
        .collect();
    for (seed, client) in clients.iter_mut().enumerate() {
        client.write(0, &pattern(4096, seed as u64));
    }
    for (seed, client) in clients.iter_mut().enumerate() {
        assert_eq!(client.read(0, 4096), pattern(4096, seed as u64));
    }
    // One VM's end is none of the other's business.
    drop(clients.remove(0));
    assert_eq!(clients[0].read(0, 4096), pattern(4096, 1));
    daemon.stop();
    assert!(sockets.iter().all(|socket| !socket.exists()));
}

#[test]
fn sigterm_ends_the_daemon_while_a_front_end_is_connected() {
    let setup = Setup::new(&[]);
    let data = pattern(SLOT_LEN, 5);
    let mut client = setup.client();
    for slot in 0..8 {
        client.fill(slot, &data);
        client.offer(
            0,
            slot,
            Request::Write {
                at: (slot * SLOT_LEN) as u64,
                len: SLOT_LEN,
            },
        );
    }
    client.kick(0);
    let ended = client.wait(0, 8);
    assert!(ended.values().all(|ret| *ret == 0));
    let image = setup.finish();
    for slot in 0..8 {
        assert_eq!(image[slot * SLOT_LEN..(slot + 1) * SLOT_LEN], data);
    }
}

#[test]
fn a_read_only_disk_says_so_and_refuses_writes() {
    let setup = Setup::new(&["--read-only"]);
    let mut client = setup.client();
    let features = VirtioBlkFeatureFlags::from_bits_truncate(client.features());
    assert!(features.contains(VirtioBlkFeatureFlags::RO));
    assert!(
        !features.intersects(VirtioBlkFeatureFlags::DISCARD | VirtioBlkFeatureFlags::WRITE_ZEROES)
    );
    assert_eq!(client.run(Request::Write { at: 0, len: 512 }), -libc::EIO);
    assert_eq!(
        client.run(Request::WriteZeroes {
            at: 0,
            len: 512,
            unmap: true
        }),
        -libc::EIO
    );
    assert_eq!(client.run(Request::Flush), 0);
    assert_eq!(client.read(0, 512), pattern(DISK_LEN as usize, 1)[..512]);
    drop(client);
    assert!(setup.finish() == pattern(DISK_LEN as usize, 1));
}

#[test]
fn the_configuration_is_that_of_the_image_and_the_options() {
    let setup = Setup::new(&["--num-queues=5", "--queue-size=128"]);
    let config = setup.client().config();
    let (capacity, seg_max, queues) = (config.capacity, config.seg_max, config.num_queues);
    assert_eq!(u64::from(capacity), DISK_LEN / 512);
    assert_eq!(u32::from(seg_max), 126);
    assert_eq!(u16::from(queues), 5);
    assert_eq!((config.writeback, config.write_zeroes_may_unmap), (1, 1));
}

#[test]
fn direct_io_serves_requests_of_any_alignment() {
    let setup = Setup::new(&["--cache=none"]);
    let mut model = pattern(DISK_LEN as usize, 1);
    let mut client = setup.client();
    for (at, len) in [
        (0u64, 4096),
        (512, 512),
        (1536, 8192),
        (DISK_LEN - 512, 512),
    ] {
        let range = at as usize..at as usize + len;
        assert_eq!(client.read(at, len), model[range.clone()]);
        model[range].copy_from_slice(&pattern(len, at));
        client.write(at, &pattern(len, at));
        assert_eq!(client.read(at, len), pattern(len, at));
    }
    drop(client);
    assert!(setup.finish() == model, "the image is not what was written");
}

#[test]
fn unmapped_zeroes_give_their_room_back() {
    let setup = Setup::new(&[]);
    let mut client = setup.client();
    assert_eq!(client.run(Request::Flush), 0);
    let image = setup.dir.path().join("disk.raw");
    let blocks = || fs::metadata(&image).expect("the disk").blocks();
    let before = blocks();
    assert_eq!(
        client.run(Request::WriteZeroes {
            at: 0,
            len: DISK_LEN / 2,
            unmap: true
        }),
        0
    );
    assert!(blocks() < before, "nothing was given back");
    let holes = blocks();
    assert_eq!(
        client.run(Request::WriteZeroes {
            at: 0,
            len: DISK_LEN / 2,
            unmap: false
        }),
        0
    );
    assert!(blocks() > holes, "the room is not reserved");
}
