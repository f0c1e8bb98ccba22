//! `docs/compatibility.md` keeps its word: every row has a verdict, and every test exists.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use clap::CommandFactory;
use flannel_user::config::Flags;

/// A line of one of the document's tables.
struct Row {
    id: String,
    what: String,
    verdict: String,
    tests: Vec<String>,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn document() -> String {
    let path = root().join("docs/compatibility.md");
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Rows begin with their number (`| 3.5 |`).
fn rows(text: &str) -> Vec<Row> {
    text.lines()
        .filter_map(|line| {
            let line = line.replace("\\|", "\u{a6}");
            let cells: Vec<_> = line.strip_prefix("| ")?.split(" | ").collect();
            let (section, number) = cells[0].split_once('.')?;
            section.parse::<u8>().ok()?;
            number.parse::<u8>().ok()?;
            let [id, what, verdict, tests] = cells.as_slice() else {
                panic!("{line} has {} cells", cells.len());
            };
            Some(Row {
                id: (*id).to_owned(),
                what: (*what).to_owned(),
                verdict: (*verdict).to_owned(),
                tests: quoted(tests),
            })
        })
        .collect()
}

/// What stands between backticks.
fn quoted(cell: &str) -> Vec<String> {
    cell.split('`')
        .skip(1)
        .step_by(2)
        .map(str::to_owned)
        .collect()
}

/// Names of every test function, with the names of its cases.
fn tests_in_the_sources() -> BTreeMap<String, BTreeSet<String>> {
    let mut tests = BTreeMap::new();
    let mut directories: Vec<PathBuf> = [
        "flannel-user/src",
        "flannel-user/tests",
        "flannel-ebpf/src",
        "tests",
    ]
    .map(|name| root().join(name))
    .into();
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(&directory).expect("a source directory") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                directories.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                note_tests(&std::fs::read_to_string(&path).expect("text"), &mut tests);
            }
        }
    }
    tests
}

fn note_tests(source: &str, tests: &mut BTreeMap<String, BTreeSet<String>>) {
    let (mut is_test, mut cases) = (false, BTreeSet::new());
    for line in source.lines().map(str::trim_start) {
        is_test |= ["#[test]", "#[tokio::test", "#[rstest]"]
            .iter()
            .any(|attribute| line.starts_with(attribute));
        if let Some(case) = line.strip_prefix("#[case::") {
            let end = case.find('(').unwrap_or(case.len());
            cases.insert(case[..end].to_owned());
        }
        let name = line
            .strip_prefix("async ")
            .unwrap_or(line)
            .strip_prefix("fn ");
        if let Some(name) = name.and_then(|rest| rest.split(['(', '<']).next()) {
            if is_test {
                tests.insert(name.to_owned(), std::mem::take(&mut cases));
            }
            is_test = false;
            cases.clear();
        }
    }
}

#[test]
fn every_test_that_the_document_names_exists() {
    let tests = tests_in_the_sources();
    let rows = rows(&document());
    assert!(rows.len() > 150, "only {} rows", rows.len());
    let mut missing = Vec::new();
    for row in &rows {
        for name in &row.tests {
            let (function, case) = match name.split_once("::") {
                Some((function, case)) => (function, Some(case)),
                None => (name.as_str(), None),
            };
            let exists = tests
                .get(function)
                .is_some_and(|cases| case.is_none_or(|case| cases.contains(case)));
            if !exists {
                missing.push(format!("{}: {name}", row.id));
            }
        }
    }
    assert!(missing.is_empty(), "no such test: {missing:#?}");
}

#[test]
fn every_row_has_a_number_of_its_own_and_a_verdict_with_its_test() {
    let rows = rows(&document());
    let mut seen = BTreeSet::new();
    for row in &rows {
        assert!(seen.insert(&row.id), "{} stands twice", row.id);
        let kind = row.verdict.split([':', ',']).next().expect("a verdict");
        match kind {
            // What is not there has to be refused or explained.
            "same" | "better" | "not yet" => {
                assert!(!row.tests.is_empty(), "{} {}: no test", row.id, row.what);
            }
            "out" => {}
            other => panic!("{}: {other:?} is no verdict", row.id),
        }
    }
    for section in [
        "2", "3", "5", "6", "8", "9", "13", "14", "15", "16", "17", "21", "23", "24",
    ] {
        let prefix = format!("{section}.");
        assert!(
            seen.iter().any(|id| id.starts_with(&prefix)),
            "section {section} is missing"
        );
    }
}

#[test]
fn every_flag_stands_in_the_document() {
    let text = document();
    for argument in Flags::command().get_arguments() {
        let name = argument.get_long().expect("every flag is long");
        assert!(
            name == "help" || text.contains(&format!("`--{name}`")),
            "--{name} is missing"
        );
    }
}

#[test]
fn the_reader_of_the_document_finds_what_it_should() {
    let text = "# x\n| Row | Contract | Here | Test |\n|---|---|---|---|\n| 2.1 | a \\| b | same | `one`, `two::case` |\n";
    let found = rows(text);
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].tests, ["one", "two::case"]);
    let mut tests = BTreeMap::new();
    note_tests(
        "fn helper() {}\n#[rstest]\n#[case::x(1)]\nasync fn two() {}\nfn after() {}",
        &mut tests,
    );
    assert_eq!(tests.len(), 1);
    assert!(tests["two"].contains("x"));
}
