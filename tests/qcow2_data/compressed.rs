//! Compressed clusters: where they are put, and that stock tools read them.

use std::sync::Arc;
use std::task::Poll;

use rand::RngExt;
use seethrough::error::ErrorKind;
use seethrough::image::{Access, Image};
use seethrough::qcow2::Qcow2;
use seethrough::qcow2::compressed::compress;
use seethrough::storage::{Fault, FaultStorage, Operation, Storage};
use seethrough::sys::{IoBuf, block_on};
use seethrough::units::GuestOffset;

use crate::engine::workload::read_range;
use crate::engine::{Allowed, Backing, Chain, Shape, rng, run_interleaved};

/// Every cluster size, refcount width and compression type.
const KINDS: &[&str] = &[
    "cluster_size=512",
    "cluster_size=1k,refcount_bits=1",
    "cluster_size=2k,refcount_bits=2",
    "cluster_size=4k,compression_type=zstd",
    "cluster_size=8k,refcount_bits=4",
    "cluster_size=16k,extended_l2=on",
    "cluster_size=32k,extended_l2=on,compression_type=zstd",
    "compat=0.10",
    "cluster_size=64k,refcount_bits=64",
    "cluster_size=128k,refcount_bits=8",
    "cluster_size=256k",
    "cluster_size=512k,compression_type=zstd",
    "cluster_size=1M",
    "cluster_size=2M",
];

fn chain(options: &'static str, size: u64, seed: u64) -> Chain {
    let shape = Shape {
        options,
        size,
        backing: Backing::None,
    };
    Chain::create(&shape, &mut rng(seed))
}

fn open(storage: Arc<dyn Storage>) -> Qcow2 {
    block_on(Qcow2::open(storage, None, Access::ReadWrite)).unwrap()
}

fn open_top(chain: &Chain) -> Qcow2 {
    open(Arc::clone(chain.top()) as Arc<dyn Storage>)
}

/// Half random, half zeros.
fn cluster_of(image: &Qcow2, seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(image.cluster_size()).unwrap()];
    let half = bytes.len() / 2;
    rng(seed).fill(&mut bytes[..half]);
    bytes
}

fn compressed(image: &Qcow2, cluster: &[u8]) -> IoBuf {
    let mut out = vec![0; cluster.len()];
    let len = compress(image.compression_type(), cluster, &mut out).expect("half of it is zeros");
    IoBuf::from_bytes(&out[..len])
}

fn write(image: &Qcow2, number: u64, bytes: &[u8]) -> seethrough::error::Result<()> {
    let at = GuestOffset(number * image.cluster_size());
    block_on(image.write_compressed(at, compressed(image, bytes)))
}

#[test]
fn compressed_clusters_of_every_size_are_read_by_stock_tools() {
    for (seed, options) in (0..).zip(KINDS) {
        let size = if options.contains('M') {
            16 << 20
        } else {
            3 << 20
        };
        // The last cluster is cut short by the disk's end.
        let mut chain = chain(options, size - 512, seed);
        let image = open_top(&chain);
        let cluster = image.cluster_size();
        let clusters = image.virtual_size().div_ceil(cluster);
        for number in (0..clusters.min(200)).chain([clusters - 1]) {
            let mut bytes = cluster_of(&image, number);
            let at = usize::try_from(number * cluster).unwrap();
            let within = bytes.len().min(chain.flat.len() - at);
            bytes[within..].fill(0);
            write(&image, number, &bytes).unwrap();
            chain.flat[at..at + within].copy_from_slice(&bytes[..within]);
        }
        let found = read_range(&image, 0..image.virtual_size()).unwrap();
        assert!(found == chain.flat, "{options}");
        block_on(image.flush()).unwrap();
        chain
            .judge(Allowed::Nothing)
            .unwrap_or_else(|error| panic!("{options}: {error}"));
    }
}

#[test]
fn compressed_clusters_follow_one_another_without_gaps() {
    let chain = chain("cluster_size=64k", 8 << 20, 1);
    let image = open_top(&chain);
    // The first makes the L2 table too.
    write(&image, 0, &cluster_of(&image, 0)).unwrap();
    let before = chain.top().len();
    let mut total = 0;
    for number in 1..100 {
        let bytes = cluster_of(&image, number);
        total += compressed(&image, &bytes).len() as u64;
        write(&image, number, &bytes).unwrap();
    }
    assert_eq!(chain.top().len() - before, total);
}

#[test]
fn a_refcount_that_is_full_ends_the_packing_of_its_cluster() {
    for (options, most) in [
        ("cluster_size=64k,refcount_bits=1", 1),
        ("cluster_size=64k,refcount_bits=2", 3),
    ] {
        let mut chain = chain(options, 2 << 20, 2);
        let image = open_top(&chain);
        let cluster = 65536;
        for number in 0..9 {
            let mut bytes = vec![0; cluster];
            bytes[..100].fill(number + 1);
            write(&image, number.into(), &bytes).unwrap();
            let at = usize::from(number) * cluster;
            chain.flat[at..at + cluster].copy_from_slice(&bytes);
        }
        block_on(image.flush()).unwrap();
        chain.judge(Allowed::Nothing).unwrap();
        // Header, refcount table, refcount block, L1 table, L2 table, and these; the last is not filled.
        let expected = 5 + 9 / most;
        assert_eq!(
            chain.top().len().div_ceil(cluster as u64),
            expected,
            "{options}"
        );
    }
}

#[test]
fn rewritten_and_discarded_compressed_clusters_leave_nothing_behind() {
    let mut chain = chain("cluster_size=4k", 1 << 20, 3);
    let image = open_top(&chain);
    for round in 0..4u64 {
        for number in 0..64 {
            let bytes = cluster_of(&image, round * 64 + number);
            write(&image, number, &bytes).unwrap();
            let at = usize::try_from(number).unwrap() * 4096;
            chain.flat[at..at + 4096].copy_from_slice(&bytes);
        }
        block_on(image.flush()).unwrap();
        chain.judge(Allowed::Nothing).unwrap();
    }
    block_on(image.discard(GuestOffset(0), 32 * 4096)).unwrap();
    chain.flat[..32 * 4096].fill(0);
    block_on(image.flush()).unwrap();
    chain.judge(Allowed::Nothing).unwrap();
}

#[test]
fn nothing_is_packed_into_a_cluster_that_is_being_punched_out() {
    for seed in 0..100 {
        let mut rng = rng(seed);
        let chain = chain("cluster_size=64k", 1 << 20, seed);
        let image = chain.open_yielding(seed);
        write(&image, 0, &cluster_of(&image, 0)).unwrap();
        block_on(image.flush()).unwrap();
        block_on(image.discard(GuestOffset(0), 65536)).unwrap();
        let expected = cluster_of(&image, 1);
        let data = compressed(&image, &expected);
        let mut turns = rng.random_range(0..20);
        let flush = image.flush();
        let write = Box::pin(async {
            std::future::poll_fn(|_| {
                turns -= 1;
                if turns < 0 {
                    Poll::Ready(())
                } else {
                    Poll::Pending
                }
            })
            .await;
            image.write_compressed(GuestOffset(65536), data).await
        });
        for result in run_interleaved(&mut rng, vec![flush, write]) {
            result.unwrap();
        }
        let found = read_range(image.as_ref(), 65536..2 * 65536);
        assert!(found.is_ok_and(|found| found == expected), "seed {seed}");
    }
}

#[test]
fn a_failed_write_of_compressed_data_gives_its_room_back() {
    let mut chain = chain("cluster_size=64k", 2 << 20, 4);
    let storage = Arc::new(FaultStorage::new(
        Arc::clone(chain.top()) as Arc<dyn Storage>
    ));
    let image = open(Arc::clone(&storage) as Arc<dyn Storage>);
    let bytes = cluster_of(&image, 1);
    write(&image, 0, &bytes).unwrap();
    chain.flat[..65536].copy_from_slice(&bytes);
    for number in 1..8 {
        storage.inject(Fault::nth(0, ErrorKind::NoSpace).only(Operation::Write));
        let error = write(&image, number, &bytes).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NoSpace);
    }
    block_on(image.flush()).unwrap();
    chain.judge(Allowed::Nothing).unwrap();
}

#[test]
fn nothing_is_packed_into_a_cluster_that_was_given_back() {
    let mut chain = chain("cluster_size=64k", 1 << 20, 6);
    let storage = Arc::new(FaultStorage::new(
        Arc::clone(chain.top()) as Arc<dyn Storage>
    ));
    let image = open(Arc::clone(&storage) as Arc<dyn Storage>);
    let bytes = cluster_of(&image, 1);
    storage.inject(Fault::nth(0, ErrorKind::NoSpace).only(Operation::Write));
    write(&image, 0, &bytes).unwrap_err();
    // Takes the host cluster in which the compressed data was to lie.
    let plain = vec![7; 65536];
    block_on(image.write(GuestOffset(65536), IoBuf::from_bytes(&plain))).unwrap();
    write(&image, 2, &bytes).unwrap();
    chain.flat[65536..3 * 65536].copy_from_slice(&[plain, bytes].concat());
    block_on(image.flush()).unwrap();
    chain.judge(Allowed::Nothing).unwrap();
}

#[test]
fn what_is_no_cluster_is_refused() {
    let chain = chain("cluster_size=64k", (1 << 20) + 512, 5);
    let before = chain.top().contents();
    let image = open_top(&chain);
    let data = |len| IoBuf::zeroed(len);
    for (at, len) in [
        (512, 100),
        (0, 0),
        (0, 65536),
        (2 << 20, 100),
        (u64::MAX - 65535, 100),
    ] {
        let error = block_on(image.write_compressed(GuestOffset(at), data(len))).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::OutOfBounds, "{len} bytes at {at}");
    }
    assert!(chain.top().contents() == before);
}

#[test]
fn nothing_is_packed_behind_data_that_ends_with_its_cluster() {
    let chain = chain("cluster_size=64k", 2 << 20, 5);
    let image = open_top(&chain);
    let pack = |number: u64, len: usize| {
        let data = IoBuf::from_bytes(&vec![0xee; len]);
        block_on(image.write_compressed(GuestOffset(number << 16), data)).unwrap();
    };
    pack(0, 60_000);
    pack(1, 5_536);
    let plain = GuestOffset(2 << 16);
    block_on(image.write(plain, IoBuf::from_bytes(&[7; 65536]))).unwrap();
    pack(3, 1000);
    let found = read_range(&image, plain.0..plain.0 + 65536).unwrap();
    assert!(found.iter().all(|byte| *byte == 7));
}

#[test]
fn what_is_kept_in_memory_goes_when_its_place_holds_another_cluster() {
    let chain = chain("cluster_size=64k", 1 << 20, 3);
    let image = open_top(&chain);
    let mut wanted: Vec<Vec<u8>> = Vec::new();
    for round in 0..200u64 {
        let number = round % 4;
        let bytes = cluster_of(&image, round);
        write(&image, number, &bytes).unwrap();
        match wanted.get_mut(usize::try_from(number).unwrap()) {
            Some(old) => *old = bytes,
            None => wanted.push(bytes),
        }
        for (number, bytes) in (0..).zip(&wanted) {
            // The second time, and from then on, they come from memory.
            for part in [0..512, 4096..8192, 60_000..65_536] {
                let at = number * image.cluster_size();
                let found = read_range(&image, at + part.start..at + part.end).unwrap();
                let part = usize::try_from(part.start).unwrap()..usize::try_from(part.end).unwrap();
                assert!(
                    found == bytes[part.clone()],
                    "round {round}: {number} {part:?}"
                );
            }
        }
        // Gives the room of what was overwritten back.
        block_on(image.flush()).unwrap();
    }
    assert!(
        chain.top().len() < 2 << 20,
        "no place was used a second time"
    );
}
