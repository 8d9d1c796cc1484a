//! Copying a disk: holes stay holes, zeros in data are found, and reads, writes and compression are spread over
//! lanes.
//!
//! ```text
//! plan ─ step ─┬─ lane: read ─ find zeros ─ compress ─ (its turn) ─ write
//!              ├─ lane: …
//! ```
//!
//! # Invariants
//!
//! 1. No two steps touch one unit of the target (a cluster where it is compressed): what is read is what is written.
//! 2. Memory is bounded: every lane has one buffer of [`CHUNK`], and what it has compressed of it.
//! 3. What the target reads where nothing is written is known ([`Blank`]): zeros are left out only there.

use std::ops::Range;

use super::lanes::Lanes;
use super::source::{Content, Source, Walk};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::image::Image;
use crate::progress::Progress;
use crate::qcow2::Qcow2;
use crate::qcow2::compressed::compress;
use crate::qcow2::join::{Piece, join_all};
use crate::storage::ZeroMode;
use crate::sys::{IoBuf, block_on};
use crate::units::GuestOffset;

/// What a lane reads and writes at a time, in bytes: at least the largest cluster.
const CHUNK: u64 = 2 << 20;
/// What a lane compresses at a time, unless clusters are larger: it has to wait for its turn with the outcome.
const COMPRESSED_CHUNK: u64 = 512 << 10;
/// What is zeroed at a time, so that progress shows.
const ZERO_CHUNK: u64 = 1 << 30;
/// The unit in which zeros are looked for, unless shorter runs count.
const SCAN_BLOCK: u64 = 4096;

/// What is written to.
pub enum Target<'a> {
    /// As it is.
    Plain(&'a dyn Image),
    /// Compressed cluster by cluster.
    Compressed(&'a Qcow2),
}

/// What the target reads where nothing is written to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blank {
    /// Zeros.
    Zeros,
    /// Something else, or what is to be inherited.
    Unknown,
}

/// What becomes of zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zeros {
    /// Those that the source knows of, and runs of at least this many bytes in what is read, need no room.
    Found(u64),
    /// Those that the source knows of need no room.
    Known,
    /// They are written like all else.
    Written,
}

/// In which order the target is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// From the first byte to the last.
    Sequential,
    /// As it comes.
    Any,
}

/// How a disk is copied.
#[derive(Clone, Copy, Debug)]
pub struct Manner {
    /// Pieces under way at the same time.
    pub lanes: usize,
    /// What becomes of zeros.
    pub zeros: Zeros,
    /// The order of writes.
    pub order: Order,
    /// What the target reads before.
    pub blank: Blank,
}

impl Manner {
    /// Into a new image, as `qemu-img convert` does it unless told otherwise.
    #[must_use]
    pub fn new() -> Self {
        Self {
            lanes: 8,
            zeros: Zeros::Found(4096),
            order: Order::Sequential,
            blank: Blank::Zeros,
        }
    }
}

impl Default for Manner {
    fn default() -> Self {
        Self::new()
    }
}

/// Copies all of `source` to the beginning of `target`, and makes it durable there.
///
/// # Errors
/// What reading the source or writing the target fails with; what has been written until then stays.
pub fn copy(
    source: &dyn Source,
    target: &Target<'_>,
    manner: Manner,
    progress: &Progress,
) -> Result<()> {
    progress.expect(source.size());
    let plan = Plan::new(source, target, manner);
    let job = Copy {
        source,
        target,
        manner,
        progress,
        plan: async_lock::Mutex::new(plan),
        lanes: Lanes::default(),
    };
    job.lanes.run(manner.lanes.max(1), || job.lane())?;
    block_on(target.image().close())
}

impl Target<'_> {
    fn image(&self) -> &dyn Image {
        match self {
            Self::Plain(image) => *image,
            Self::Compressed(image) => *image,
        }
    }

    /// What has to be written as a whole.
    fn unit(&self) -> u64 {
        match self {
            Self::Plain(_) => 1,
            Self::Compressed(image) => image.cluster_size(),
        }
    }
}

/// A part of the copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Step {
    number: u64,
    at: GuestOffset,
    len: u64,
    what: Content,
}

/// What is still to be handed out.
struct Plan<'a> {
    walk: Box<dyn Walk + 'a>,
    at: u64,
    end: u64,
    /// What is known of the bytes at `at` already.
    ahead: Option<(Content, u64)>,
    next_number: u64,
    unit: u64,
    chunk: u64,
    zeros: Zeros,
    blank: Blank,
}

impl<'a> Plan<'a> {
    fn new(source: &'a dyn Source, target: &Target<'_>, manner: Manner) -> Self {
        let unit = target.unit();
        Self {
            walk: source.walk(),
            at: 0,
            end: source.size(),
            ahead: None,
            next_number: 0,
            unit,
            chunk: if unit == 1 {
                CHUNK
            } else {
                COMPRESSED_CHUNK.max(unit)
            },
            zeros: manner.zeros,
            blank: manner.blank,
        }
    }

    /// The next part that needs something done.
    async fn next(&mut self, progress: &Progress) -> Result<Option<Step>> {
        while self.at < self.end {
            let (what, len) = match self.ahead.take() {
                Some(ahead) => ahead,
                None => self.look(self.at).await?,
            };
            let is_done =
                what == Content::Inherited || (what == Content::Zero && self.blank == Blank::Zeros);
            if is_done {
                self.at += len;
                progress.advance(len);
                continue;
            }
            let most = match what {
                Content::Data => self.chunk - self.at % self.chunk,
                _ => ZERO_CHUNK,
            };
            let mut taken = len.min(most);
            if taken < len {
                self.ahead = Some((what, len - taken));
            } else if what == Content::Data {
                taken = self.join_data(taken, most).await?;
            }
            let step = Step {
                number: self.next_number,
                at: GuestOffset(self.at),
                len: taken,
                what,
            };
            self.at += taken;
            self.next_number += 1;
            return Ok(Some(step));
        }
        Ok(None)
    }

    /// How many bytes of data there are in a row, at most `most`.
    async fn join_data(&mut self, len: u64, most: u64) -> Result<u64> {
        let mut joined = len;
        while joined < most && self.at + joined < self.end {
            let (what, len) = self.look(self.at + joined).await?;
            let taken = len.min(most - joined);
            if what != Content::Data {
                self.ahead = Some((what, len));
                break;
            }
            if taken < len {
                self.ahead = Some((what, len - taken));
            }
            joined += taken;
        }
        Ok(joined)
    }

    /// What the next whole units are.
    async fn look(&mut self, at: u64) -> Result<(Content, u64)> {
        let (what, len) = self.look_once(at, self.end).await?;
        let end = at + len;
        if end == self.end {
            return Ok((what, len));
        }
        let whole = len - len % self.unit;
        if whole > 0 {
            return Ok((what, whole));
        }
        // A unit of several parts: what they are together.
        let unit_end = at.saturating_add(self.unit).min(self.end);
        let mut all = what;
        let mut part = end;
        while part < unit_end {
            let (what, len) = self.look_once(part, unit_end).await?;
            if what != all {
                all = Content::Data;
            }
            part += len;
        }
        Ok((all, unit_end - at))
    }

    async fn look_once(&mut self, at: u64, end: u64) -> Result<(Content, u64)> {
        let (what, len) = self.walk.next(GuestOffset(at), end).await?;
        let what = match (what, self.zeros) {
            (Content::Zero, Zeros::Written) => Content::Data,
            _ => what,
        };
        Ok((what, len.clamp(1, end - at)))
    }
}

/// A write that is ready to be made.
enum Write {
    Plain(GuestOffset, IoBuf),
    Zeroes(GuestOffset, u64),
    Compressed(GuestOffset, IoBuf),
}

struct Copy<'a> {
    source: &'a dyn Source,
    target: &'a Target<'a>,
    manner: Manner,
    progress: &'a Progress,
    plan: async_lock::Mutex<Plan<'a>>,
    lanes: Lanes,
}

impl Copy<'_> {
    async fn lane(&self) -> Result<()> {
        let size = CHUNK.min(self.source.size().next_multiple_of(self.target.unit()));
        let buf = IoBuf::zeroed(in_memory(size));
        while !self.lanes.is_stopped() {
            let Some(step) = self.plan.lock().await.next(self.progress).await? else {
                break;
            };
            let writes = match step.what {
                Content::Data => self.read(&step, &buf).await?,
                _ => vec![Write::Zeroes(step.at, step.len)],
            };
            let in_order = self.manner.order == Order::Sequential;
            if in_order && !self.lanes.take_turn(step.number).await {
                break;
            }
            self.write(writes).await?;
            if in_order {
                self.lanes.pass_turn();
            }
            self.progress.advance(step.len);
        }
        Ok(())
    }

    /// Reads a part, and says how to write it.
    async fn read(&self, step: &Step, buf: &IoBuf) -> Result<Vec<Write>> {
        let len = in_memory(step.len);
        let whole = buf.slice(0..len);
        self.source
            .read(step.at, whole.clone())
            .await
            .context(|| "reading the source")?;
        match self.target {
            Target::Plain(image) => Ok(self.plain_writes(*image, step.at, &whole)),
            Target::Compressed(image) => {
                let cluster_size = in_memory(image.cluster_size());
                // The disk may end within its last cluster.
                let padded = len.next_multiple_of(cluster_size);
                buf.zero(len..padded);
                self.compressed_writes(image, step.at, &buf.slice(0..padded), len)
            }
        }
    }

    fn plain_writes(&self, image: &dyn Image, at: GuestOffset, data: &IoBuf) -> Vec<Write> {
        let holes = match self.manner.zeros {
            Zeros::Found(least) => {
                let granularity = u64::from(image.limits().discard_granularity);
                let end = image.virtual_size();
                holes(at.0, data, least, granularity, end)
            }
            Zeros::Known | Zeros::Written => Vec::new(),
        };
        let mut writes = Vec::new();
        let mut done = 0;
        let place = |index: usize| GuestOffset(at.0 + index as u64);
        for hole in holes {
            if done < hole.start {
                writes.push(Write::Plain(place(done), data.slice(done..hole.start)));
            }
            if self.manner.blank == Blank::Unknown {
                writes.push(Write::Zeroes(place(hole.start), hole.len() as u64));
            }
            done = hole.end;
        }
        if done < data.len() {
            writes.push(Write::Plain(place(done), data.slice(done..data.len())));
        }
        writes
    }

    fn compressed_writes(
        &self,
        image: &Qcow2,
        at: GuestOffset,
        data: &IoBuf,
        len: usize,
    ) -> Result<Vec<Write>> {
        let size = in_memory(image.cluster_size());
        let mut cluster = vec![0; size];
        let mut compressed = vec![0; size];
        let mut writes = Vec::new();
        for start in (0..data.len()).step_by(size) {
            let place = GuestOffset(at.0 + start as u64);
            let used = size.min(len - start);
            if used < size && place.0 + (used as u64) < image.virtual_size() {
                // A longer target goes on there, and keeps that.
                writes.push(Write::Plain(place, data.slice(start..start + used)));
                continue;
            }
            let finds_zeros = matches!(self.manner.zeros, Zeros::Found(_));
            if finds_zeros && data.is_zero(start..start + size) {
                if self.manner.blank == Blank::Unknown {
                    writes.push(Write::Zeroes(place, used as u64));
                }
                continue;
            }
            data.copy_to(start, &mut cluster);
            let fit = compress(image.compression_type(), &cluster, &mut compressed);
            writes.push(match fit.and_then(|fit| compressed.get(..fit)) {
                Some(bytes) => Write::Compressed(place, IoBuf::from_bytes(bytes)),
                None => Write::Plain(place, data.slice(start..start + used)),
            });
        }
        Ok(writes)
    }

    async fn write(&self, writes: Vec<Write>) -> Result<()> {
        let image = self.target.image();
        let pieces = writes.into_iter().map(|write| -> Piece<'_> {
            match (write, self.target) {
                (Write::Plain(at, data), _) => Piece::boxed(image.write(at, data)),
                (Write::Zeroes(at, len), _) => {
                    Piece::boxed(image.write_zeroes(at, len, ZeroMode::MayUnmap))
                }
                (Write::Compressed(at, data), Target::Compressed(image)) => {
                    Piece::boxed(image.write_compressed(at, data))
                }
                (Write::Compressed(..), Target::Plain(image)) => {
                    Piece::ready(Err(cannot_compress(*image)))
                }
            }
        });
        join_all(pieces).await
    }
}

fn cannot_compress(image: &dyn Image) -> Error {
    Error::new(
        ErrorKind::Unsupported,
        format!("{}: its format has no compressed clusters", image.name()),
    )
}

/// The runs of zeros in `data`, which lies at `at`, of at least `least` bytes, cut down to multiples of `granularity`
/// or the end of the disk.
fn holes(at: u64, data: &IoBuf, least: u64, granularity: u64, disk_end: u64) -> Vec<Range<usize>> {
    let block = SCAN_BLOCK.min(least.max(512));
    let end = at + data.len() as u64;
    let mut found = Vec::new();
    let mut run: Option<u64> = None;
    let mut start = at;
    while start < end {
        let stop = (start - start % block + block).min(end);
        if data.is_zero(in_memory(start - at)..in_memory(stop - at)) {
            run.get_or_insert(start);
        } else if let Some(first) = run.take() {
            found.push(first..start);
        }
        start = stop;
    }
    found.extend(run.map(|first| first..end));
    let cut = |hole: Range<u64>| {
        let first = hole.start.next_multiple_of(granularity);
        let last = if hole.end == disk_end {
            hole.end
        } else {
            hole.end - hole.end % granularity
        };
        first..last
    };
    found
        .into_iter()
        .filter(|hole| hole.end - hole.start >= least.min(data.len() as u64))
        .map(cut)
        .filter(|hole| hole.start < hole.end)
        .map(|hole| in_memory(hole.start - at)..in_memory(hole.end - at))
        .collect()
}

fn in_memory(len: u64) -> usize {
    usize::try_from(len).expect("a chunk fits in memory")
}
