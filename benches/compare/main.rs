//! Compares seethrough with other daemons that serve disks over vhost-user; `ci/bench` runs it.
//!
//! - [`cells`]: which loads on which disks; [`load`], [`images`] and [`disk`] say what those are;
//! - [`contender`]: who competes, and with which settings; [`bound`]: what the host does without a daemon;
//! - [`tournament`]: who measures whom in which order; [`measure`]: one measurement;
//! - [`client`]: the vhost-user client, which checks every block that it reads by its [`stamp`];
//! - [`results`], [`targets`], [`table`], [`picture`]: what came of it.

mod bound;
mod cells;
mod client;
mod conditions;
mod contender;
mod cpus;
mod daemon;
mod device;
mod disk;
mod filling;
mod histogram;
mod images;
mod load;
mod measure;
mod picture;
mod places;
mod results;
mod stamp;
mod table;
mod targets;
mod tournament;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use clap::Parser;

use cells::Cell;
use contender::{Aio, Contender};
use cpus::Cpus;
use images::Images;
use results::Results;
use table::Style;
use tournament::{Effort, Tournament};

/// Anything that fails here ends up as a gap in the table or as a message: its words are all that matters.
pub(crate) type Result<T> = std::result::Result<T, String>;

/// Marks in a document, between which the tables go.
const BEGIN_MARK: &str = "<!-- ci/bench: begin -->";
const END_MARK: &str = "<!-- ci/bench: end -->";

/// Compare seethrough with qemu-storage-daemon and fio.
#[derive(Debug, Parser)]
#[command(name = "ci/bench")]
struct Options {
    /// Only cells whose name contains this text, in any case; may be repeated, and one is enough
    #[arg(long, value_name = "TEXT")]
    filter: Vec<String>,

    /// Name the cells and measure nothing
    #[arg(long)]
    list: bool,

    /// One short round: shows that everything works, and no more
    #[arg(long)]
    quick: bool,

    /// Rounds, in each of which every contender has its turn
    #[arg(long, default_value_t = 5, value_name = "N")]
    rounds: usize,

    /// Seconds of each measurement
    #[arg(long, default_value_t = 1.0, value_name = "SECONDS")]
    time: f64,

    /// The seethrough to measure
    #[arg(long, default_value = env!("CARGO_BIN_EXE_seethrough"), value_name = "PATH")]
    seethrough: PathBuf,

    /// Another qemu-storage-daemon, which takes part beside the installed one; may be repeated
    #[arg(long, value_name = "NAME=PATH")]
    peer: Vec<String>,

    /// Where images and results go, on a disk with ext4
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/target/bench"), value_name = "DIR")]
    dir: PathBuf,

    /// Where images for writing go, on tmpfs
    #[arg(long, default_value = "/dev/shm/seethrough-bench", value_name = "DIR")]
    memory: PathBuf,

    /// Show the results of an earlier run, and measure nothing
    #[arg(long, value_name = "FILE")]
    show: Option<PathBuf>,

    /// Put the tables into this document as Markdown, between its marks
    #[arg(
        long,
        value_name = "FILE",
        num_args = 0..=1,
        default_missing_value = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/performance.md")
    )]
    markdown: Option<PathBuf>,

    /// What cargo passes to every bench
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ci/bench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<()> {
    let cells = chosen_cells(&options.filter);
    if options.list {
        cells.iter().for_each(|cell| println!("{}", cell.name()));
        return Ok(());
    }
    let results = match &options.show {
        Some(file) => {
            let text = fs::read(file).map_err(|error| format!("{}: {error}", file.display()))?;
            serde_json::from_slice(&text).map_err(|error| format!("{}: {error}", file.display()))?
        }
        None => measure_all(options, &cells)?,
    };
    println!("{}", table::report(&results, Style::Terminal));
    if let Some(document) = &options.markdown {
        put_between_marks(document, &table::report(&results, Style::Markdown))?;
    }
    let failed = results
        .cells
        .iter()
        .filter(|cell| cell.own().is_some_and(|own| own.gap.is_some()));
    match failed.count() {
        0 => Ok(()),
        count => Err(format!(
            "seethrough failed in {count} cells; the gaps say how"
        )),
    }
}

fn chosen_cells(filters: &[String]) -> Vec<Cell> {
    let filters: Vec<String> = filters.iter().map(|text| text.to_lowercase()).collect();
    let is_chosen = |cell: &Cell| {
        let name = cell.name().to_lowercase();
        filters.is_empty() || filters.iter().any(|text| name.contains(text))
    };
    cells::all().into_iter().filter(is_chosen).collect()
}

fn measure_all(options: &Options, cells: &[Cell]) -> Result<Results> {
    let effort = if options.quick {
        Effort {
            rounds: 1,
            measured: Duration::from_millis(200),
        }
    } else {
        let measured = Duration::try_from_secs_f64(options.time)
            .map_err(|error| format!("--time: {error}"))?;
        Effort {
            rounds: options.rounds.max(1),
            measured,
        }
    };
    let contenders = contenders(options)?;
    let cpus = Cpus::new()?;
    let conditions = conditions::conditions(&contenders, &cpus, effort);
    let mut tournament = Tournament {
        images: Images::new(
            &options.dir.join("images"),
            &options.memory,
            &options.seethrough,
        )?,
        cpus,
        contenders,
        with_bound: Command::new("fio").arg("--version").output().is_ok(),
        effort,
        generation: 1000,
    };
    let mut results = Results {
        conditions,
        rounds: effort.rounds,
        cells: Vec::new(),
    };
    let start = Instant::now();
    for (number, cell) in (1..).zip(cells) {
        eprintln!(
            "[{number}/{}] {} ({} s)",
            cells.len(),
            cell.name(),
            start.elapsed().as_secs()
        );
        results.cells.push(tournament.play(cell));
        // After every cell, so that nothing is lost when the run is ended early.
        store(&options.dir, &results)?;
    }
    Ok(results)
}

fn contenders(options: &Options) -> Result<Vec<Contender>> {
    const AIO: [Aio; 3] = [Aio::Threads, Aio::IoUring, Aio::Native];
    let mut contenders = vec![Contender::seethrough(&options.seethrough)];
    let installed = Path::new("qemu-storage-daemon");
    contenders.extend(AIO.map(|aio| Contender::qemu("qemu", installed, aio)));
    for peer in &options.peer {
        let (name, path) = peer
            .split_once('=')
            .ok_or_else(|| format!("--peer {peer}: NAME=PATH is wanted"))?;
        contenders.extend(AIO.map(|aio| Contender::qemu(name, Path::new(path), aio)));
    }
    Ok(contenders)
}

fn store(dir: &Path, results: &Results) -> Result<()> {
    let json = serde_json::to_string_pretty(results).map_err(|error| error.to_string())?;
    for (name, text) in [
        ("results.json", json),
        ("results.svg", picture::draw(results)),
    ] {
        let path = dir.join(name);
        fs::write(&path, text).map_err(|error| format!("{}: {error}", path.display()))?;
    }
    Ok(())
}

/// Replaces what stands between the marks of a document.
fn put_between_marks(document: &Path, tables: &str) -> Result<()> {
    let describe = |error: std::io::Error| format!("{}: {error}", document.display());
    let text = fs::read_to_string(document).map_err(describe)?;
    let parts = text
        .split_once(BEGIN_MARK)
        .and_then(|(before, rest)| Some((before, rest.split_once(END_MARK)?.1)));
    let (before, after) = parts.ok_or_else(|| {
        format!(
            "{}: lacks the marks {BEGIN_MARK} and {END_MARK}",
            document.display()
        )
    })?;
    fs::write(
        document,
        format!("{before}{BEGIN_MARK}\n\n{tables}\n{END_MARK}{after}"),
    )
    .map_err(describe)
}
