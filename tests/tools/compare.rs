//! `seethrough compare` against `qemu-img compare`: the same words, the same exit codes.

use rand::RngExt;

use crate::bed::{Bed, Layer};
use crate::engine::{for_each_seed, rng};

/// Runs both programs, which have to agree. Returns the exit code.
fn agree(bed: &Bed, options: &[&str], a: (&str, &str), b: (&str, &str)) -> i32 {
    let images = ["-f", a.0, "-F", b.0, a.1, b.1];
    let arguments = [&["compare"][..], options, &images].concat();
    let (code, stock, _) = bed.stock("qemu-img", &arguments);
    let ours = bed.seethrough(&arguments);
    let printed = String::from_utf8_lossy(&ours.stdout);
    assert_eq!(printed, stock, "{arguments:?}");
    assert_eq!(ours.status.code(), Some(code), "{arguments:?}: {printed}");
    code
}

#[test]
fn random_disks_are_told_apart_as_the_stock_tool_does() {
    for_each_seed(10, "compare", |seed| {
        let rng = &mut rng(seed);
        let bed = Bed::new();
        let chain = bed.chain(rng, "l");
        let top = chain.last().expect("a chain has a layer");
        let source = (top.format, top.name.as_str());
        bed.qemu_img(&[
            "convert", "-f", top.format, "-O", "qcow2", &top.name, "copy",
        ]);
        let copy = Layer {
            name: "copy".into(),
            format: "qcow2",
            options: "",
            size: top.size,
        };
        assert_eq!(agree(&bed, &[], source, ("qcow2", "copy")), 0);
        assert_eq!(agree(&bed, &["-q"], ("qcow2", "copy"), source), 0);
        for _ in 0..3 {
            let at = rng.random_range(0..top.size / 512) * 512 + 7;
            let write = format!("write -P {} {at} 3", rng.random_range(0..4));
            bed.qemu_io("qcow2", "copy", &[write]);
            agree(&bed, &[], source, ("qcow2", "copy"));
            agree(&bed, &["-q"], ("qcow2", "copy"), source);
        }
        bed.fill(rng, &copy);
        agree(&bed, &[], source, ("qcow2", "copy"));
        let size = rng.random_range(1..top.size / 512 * 2) * 512;
        bed.qemu_img(&[
            "resize",
            "-q",
            "-f",
            "qcow2",
            "--shrink",
            "copy",
            &size.to_string(),
        ]);
        agree(&bed, &[], source, ("qcow2", "copy"));
        agree(&bed, &["-q"], ("qcow2", "copy"), source);
        // Other disks of the chain, whose layers are the same images.
        for other in &chain {
            agree(&bed, &[], source, (other.format, &other.name));
        }
    });
}

#[test]
fn longer_disks_are_identical_when_they_go_on_with_zeros() {
    let bed = Bed::new();
    bed.qemu_img(&["create", "-q", "-f", "raw", "short", "1M"]);
    bed.qemu_img(&["create", "-q", "-f", "qcow2", "long", "100M"]);
    let (short, long) = (("raw", "short"), ("qcow2", "long"));
    assert_eq!(agree(&bed, &[], short, long), 0);
    assert_eq!(agree(&bed, &[], long, short), 0);
    assert_eq!(agree(&bed, &["-s"], long, short), 1);
    bed.qemu_io("qcow2", "long", &["write -P 0 50M 1M".into()]);
    assert_eq!(agree(&bed, &[], long, short), 0);
    bed.qemu_io("qcow2", "long", &["write -P 1 50000000 1".into()]);
    assert_eq!(agree(&bed, &[], long, short), 1);
    bed.qemu_io("raw", "short", &["write -P 1 1000 1".into()]);
    assert_eq!(agree(&bed, &[], short, long), 1);
}

#[test]
fn of_many_differences_the_first_is_told() {
    let bed = Bed::new();
    bed.qemu_img(&["create", "-q", "-f", "raw", "a", "64M"]);
    bed.qemu_img(&["create", "-q", "-f", "raw", "b", "64M"]);
    bed.qemu_io("raw", "a", &["write -P 3 0 64M".into()]);
    let mut writes = vec!["write -P 3 0 64M".to_owned()];
    writes.extend((20..60).map(|mib| format!("write -P 4 {} 1k", (mib << 20) + 5000)));
    bed.qemu_io("raw", "b", &writes);
    for _ in 0..5 {
        assert_eq!(agree(&bed, &[], ("raw", "a"), ("raw", "b")), 1);
    }
}

/// Where exactly is another matter: the stock tool also minds how long runs are.
#[test]
fn a_strict_comparison_minds_what_is_allocated() {
    let bed = Bed::new();
    for name in ["a", "b"] {
        bed.qemu_img(&["create", "-q", "-f", "qcow2", name, "1M"]);
        bed.qemu_io("qcow2", name, &["write -P 3 64k 64k".into()]);
    }
    let strictly = ["compare", "-s", "a", "b"];
    let both = |code: i32| {
        assert_eq!(bed.stock("qemu-img", &strictly).0, code);
        let ours = bed.seethrough(&strictly);
        assert_eq!(ours.status.code(), Some(code));
        String::from_utf8_lossy(&ours.stdout).into_owned()
    };
    both(0);
    bed.qemu_io("qcow2", "b", &["write -P 0 256k 64k".into()]);
    assert_eq!(agree(&bed, &[], ("qcow2", "a"), ("qcow2", "b")), 0);
    assert_eq!(
        both(1),
        "Strict mode: Offset 262144 block status mismatch!\n"
    );
    bed.qemu_img(&["resize", "-q", "-f", "qcow2", "b", "2M"]);
    assert_eq!(both(1), "Strict mode: Image size mismatch!\n");
}

#[test]
fn failures_are_told_apart_from_differences() {
    let bed = Bed::new();
    bed.qemu_img(&["create", "-q", "-f", "qcow2", "a", "1M"]);
    bed.fails(&["compare", "a", "missing"], 2);
    std::fs::write(bed.path("raw"), [1; 1024]).expect("writable");
    bed.fails(&["compare", "a", "raw"], 2);
    // An L1 entry with reserved bits: what lies there cannot be told.
    let header = std::fs::read(bed.path("a")).expect("readable");
    let l1 = u64::from_be_bytes(header[40..48].try_into().expect("eight bytes"));
    bed.qemu_img(&["create", "-q", "-f", "qcow2", "b", "1M"]);
    let mut bytes = header;
    bytes[usize::try_from(l1).expect("small")] = 0x41;
    std::fs::write(bed.path("a"), bytes).expect("writable");
    bed.fails(&["compare", "-f", "qcow2", "-F", "qcow2", "a", "b"], 3);
}
