//! `seethrough bench` against `qemu-img bench`: the same words, and the same bytes written.

use crate::bed::Bed;

#[test]
fn requests_are_announced_and_written_as_by_the_stock_tool() {
    let bed = Bed::new();
    for (number, arguments) in [
        &["-c", "100", "-d", "7", "-w", "--pattern=5"][..],
        &[
            "-c",
            "50",
            "-s",
            "512",
            "-S",
            "70000",
            "-o",
            "1024",
            "-w",
            "--pattern=9",
        ],
        &["-c", "60", "-d", "10", "-w", "--flush-interval=20"],
        &[
            "-c",
            "60",
            "-d",
            "10",
            "-w",
            "--flush-interval=20",
            "--no-drain",
        ],
        &["-c", "300", "-s", "64k"],
    ]
    .into_iter()
    .enumerate()
    {
        let run = |prefix: &str, program: &dyn Fn(&[&str]) -> String| {
            let name = format!("{prefix}{number}");
            bed.qemu_img(&["create", "-q", "-f", "qcow2", &name, "32M"]);
            bed.qemu_io("qcow2", &name, &["write -P 1 0 1M".into()]);
            let printed = program(&[&["bench"][..], arguments, &[&name]].concat());
            let told: Vec<String> = printed
                .lines()
                .take_while(|line| !line.starts_with("Run completed in "))
                .map(str::to_owned)
                .collect();
            assert!(told.len() < printed.lines().count(), "{printed}");
            bed.check(&name);
            (name, told)
        };
        let (ours, our_words) = run("ours", &|arguments| bed.ok(arguments));
        let (stock, stock_words) = run("stock", &|arguments| bed.qemu_img(arguments));
        assert_eq!(our_words, stock_words);
        bed.assert_same(("qcow2", &ours), ("qcow2", &stock));
    }
}

#[test]
fn programs_get_numbers_and_nonsense_is_refused() {
    let bed = Bed::new();
    bed.qemu_img(&["create", "-q", "-f", "raw", "a", "1M"]);
    let json = bed.ok(&["bench", "-f", "raw", "-c", "10", "--output", "json", "a"]);
    let json: serde_json::Value = serde_json::from_str(&json).expect("JSON");
    assert_eq!(json["requests"], 10);
    assert!(json["requests-per-second"].as_u64().is_some());
    assert_eq!(bed.ok(&["bench", "-f", "raw", "-q", "-c", "10", "a"]), "");
    for wrong in [
        &["--flush-interval=100"][..],
        &["-w", "--flush-interval=5", "-d", "6"],
        &["-s", "2M"],
        &["-o", "1M"],
        &["--pattern=1"],
        &["-w", "-U"],
    ] {
        bed.fails(&[&["bench", "-f", "raw"][..], wrong, &["a"]].concat(), 2);
    }
}
