//! Holds the README to the program: every option that it names is one that `--help` knows.

use std::collections::BTreeSet;
use std::process::Command;

const VERBS: &[&str] = &[
    "serve", "status", "refusals", "prepare", "create", "regions", "df", "flatten", "info", "map",
    "convert", "snapshot", "resize", "check", "measure", "compare", "rebase", "dump", "commit",
    "bench",
];

fn help(verb: &str) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_seethrough"))
        .args([verb, "--help"])
        .output()
        .expect("the program runs");
    assert!(output.status.success(), "{verb} --help fails");
    String::from_utf8(output.stdout).expect("help is UTF-8")
}

/// The long options that `text` names.
fn long_options(text: &str) -> BTreeSet<String> {
    text.split(|c: char| !(c.is_ascii_lowercase() || c == '-'))
        .filter(|word| word.len() > 3 && word.starts_with("--") && !word.starts_with("---"))
        .map(str::to_owned)
        .collect()
}

#[test]
fn the_reference_names_the_options_that_there_are() {
    let readme = include_str!("../README.md");
    let start = readme.find("## Reference").expect("there is a reference");
    let reference = readme[start..].split("\n## ").next().unwrap_or_default();
    let known: BTreeSet<String> = VERBS
        .iter()
        .flat_map(|verb| long_options(&help(verb)))
        .collect();
    let named = long_options(reference);
    let unknown: Vec<_> = named.difference(&known).collect();
    assert!(
        unknown.is_empty(),
        "the README names options that are not there: {unknown:?}"
    );
    let own = ["--help", "--version", "--force-share"]
        .map(str::to_owned)
        .into();
    let hidden: Vec<_> = known
        .difference(&named)
        .filter(|option| !BTreeSet::contains(&own, *option))
        .collect();
    assert!(
        hidden.is_empty(),
        "options that the README does not name: {hidden:?}"
    );
}

#[test]
fn every_verb_has_its_chapter() {
    let readme = include_str!("../README.md");
    for &verb in VERBS {
        assert!(
            readme.contains(&format!("### `seethrough {verb}")),
            "the README lacks {verb}"
        );
    }
}
