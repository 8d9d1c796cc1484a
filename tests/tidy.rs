//! Holds the structure of the source: which way imports point, where unsafe code may be, how long files
//! and lines get. Every limit is a ratchet: lower it when the code allows, never raise it.

use std::fs;
use std::path::{Path, PathBuf};

/// The layers, top first: a module imports only from those after it, or from the leaves.
const LAYERS: &[&[&str]] = &[
    &["cli"],
    &["control"],
    &["vhost_user"],
    &["virtio_blk"],
    &["view"],
    &["jobs"],
    &["chain"],
    &["qcow2", "ext4", "partition"],
    &["image"],
    &["storage"],
    &["sys"],
];
const LEAVES: &[&str] = &["units", "error", "metrics", "log_limit", "progress"];

/// Lines in a file without its unit tests.
const MAX_FILE_LINES: usize = 600;
const MAX_LINE_WIDTH: usize = 120;

fn source_files(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).expect("src is readable") {
        let path = entry.expect("src is readable").path();
        if path.is_dir() {
            source_files(&path, found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
}

/// Every source file: its path below `src`, its top-level module, and its text.
fn sources() -> Vec<(String, String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    source_files(&root, &mut files);
    files.sort();
    files
        .into_iter()
        .map(|path| {
            let relative = path
                .strip_prefix(&root)
                .expect("below src")
                .display()
                .to_string();
            let module = relative
                .split(['/', '.'])
                .next()
                .unwrap_or_default()
                .to_owned();
            let text = fs::read_to_string(&path).expect("source is UTF-8");
            (relative, module, text)
        })
        .collect()
}

/// The text before the unit tests.
fn without_tests(text: &str) -> &str {
    text.split("\n#[cfg(test)]\nmod tests {")
        .next()
        .unwrap_or_default()
}

fn layer_of(module: &str) -> Option<usize> {
    LAYERS.iter().position(|layer| layer.contains(&module))
}

#[test]
fn imports_point_down_the_layers() {
    let mut wrong = Vec::new();
    for (file, module, text) in sources() {
        let Some(own) = layer_of(&module) else {
            continue;
        };
        for (number, line) in without_tests(&text).lines().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            for (at, _) in code.match_indices("crate::") {
                let name: String = code[at + 7..]
                    .chars()
                    .take_while(|c| c.is_alphanumeric() || *c == '_')
                    .collect();
                let allowed = name == module
                    || LEAVES.contains(&name.as_str())
                    || layer_of(&name).is_none_or(|other| other > own);
                if !allowed {
                    wrong.push(format!(
                        "src/{file}:{}: {module} imports {name}",
                        number + 1
                    ));
                }
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "imports against the layers:\n{}",
        wrong.join("\n")
    );
}

#[test]
fn leaves_import_nothing_but_leaves() {
    for (file, module, text) in sources() {
        if !LEAVES.contains(&module.as_str()) {
            continue;
        }
        for layer in LAYERS.iter().flat_map(|layer| layer.iter()) {
            assert!(
                !without_tests(&text).contains(&format!("crate::{layer}")),
                "src/{file} imports {layer}"
            );
        }
    }
}

#[test]
fn unsafe_code_is_in_sys_only() {
    for (file, module, text) in sources() {
        let allows = text.contains("allow(unsafe_code)");
        assert!(
            !allows || module == "sys",
            "src/{file} allows unsafe code outside sys"
        );
    }
}

#[test]
fn files_and_lines_stay_readable() {
    let mut wrong = Vec::new();
    for (file, _, text) in sources() {
        let lines = without_tests(&text).lines().count();
        if lines > MAX_FILE_LINES {
            wrong.push(format!(
                "src/{file}: {lines} lines, at most {MAX_FILE_LINES}"
            ));
        }
        for (number, line) in text.lines().enumerate() {
            if line.chars().count() > MAX_LINE_WIDTH {
                wrong.push(format!(
                    "src/{file}:{}: wider than {MAX_LINE_WIDTH}",
                    number + 1
                ));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_file_begins_with_its_purpose() {
    for (file, _, text) in sources() {
        assert!(text.starts_with("//! "), "src/{file} has no header");
    }
}
