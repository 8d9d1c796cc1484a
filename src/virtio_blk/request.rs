//! From a descriptor chain to a request (virtio 1.3, section 5.2.6).

use std::sync::Arc;

use virtio_bindings::virtio_blk as spec;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::chain::{ChainReader, Stream};
use super::config::{MAX_RANGE_SECTORS, MAX_RANGE_SEGMENTS};
use super::{Device, Status};
use crate::storage::ZeroMode;
use crate::sys::IoBuf;
use crate::units::{GuestOffset, SECTOR_SIZE, Sector};

/// Bytes in a request's header: type, reserved, sector.
const HEADER_LEN: usize = 16;

/// Bytes in a segment of a discard or write-zeroes request: sector, count, flags.
const SEGMENT_LEN: usize = 16;

/// The most data bytes of a request: what UEFI firmware splits its own at, and far above any kernel.
const MAX_DATA_LEN: u64 = 1 << 30;

/// A range to discard or to zero; it lies within the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// The first byte.
    pub at: GuestOffset,
    /// Bytes.
    pub len: u64,
    /// Whether the range may lose its room on the host. (Discards always may.)
    pub mode: ZeroMode,
}

/// What a request asks for. Its ranges lie within the disk, its buffers within guest memory.
#[derive(Debug)]
pub enum Operation {
    /// Fill the buffer from the disk.
    Read {
        /// The first byte on disk.
        at: GuestOffset,
        /// Where the bytes go.
        into: IoBuf,
    },
    /// Write the buffer to the disk.
    Write {
        /// The first byte on disk.
        at: GuestOffset,
        /// Where the bytes come from.
        from: IoBuf,
    },
    /// Make completed writes durable.
    Flush,
    /// Tell the serial.
    GetId {
        /// Where it goes.
        into: IoBuf,
    },
    /// The ranges are no longer needed.
    Discard(Vec<Segment>),
    /// The ranges shall read as zeros.
    WriteZeroes(Vec<Segment>),
}

impl Operation {
    /// The bytes that the device writes to guest memory when the operation succeeds, the status byte aside.
    #[must_use]
    pub fn written_len(&self) -> u32 {
        match self {
            Self::Read { into, .. } | Self::GetId { into } => {
                u32::try_from(into.len()).unwrap_or(u32::MAX - 1)
            }
            _ => 0,
        }
    }
}

/// A request, parsed and checked.
#[derive(Debug)]
pub struct Request {
    /// Where the status byte goes.
    pub status_at: GuestAddress,
    /// What to do.
    pub operation: Operation,
}

/// Why a chain is not carried out; its descriptor goes back to the driver all the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rejection {
    /// Where the status byte goes, if the chain has one.
    pub status_at: Option<GuestAddress>,
    /// What to tell.
    pub status: Status,
}

impl ChainReader {
    /// Reads the request that `chain` holds.
    ///
    /// # Errors
    /// The status to answer with, if it is malformed, goes beyond the disk or a limit, or is of an unknown type.
    pub fn parse(
        &mut self,
        chain: impl Iterator<Item = Descriptor>,
        memory: &Arc<GuestMemoryMmap>,
        device: &Device,
    ) -> Result<Request, Rejection> {
        let walked = self.walk(chain, memory);
        let reject = |status| Rejection {
            status_at: walked.status_at,
            status,
        };
        let (Some(status_at), true) = (walked.status_at, walked.well_formed) else {
            return Err(reject(Status::IoErr));
        };
        let operation = self.operation(memory, device).map_err(reject)?;
        Ok(Request {
            status_at,
            operation,
        })
    }

    fn operation(
        &mut self,
        memory: &Arc<GuestMemoryMmap>,
        device: &Device,
    ) -> Result<Operation, Status> {
        let mut header = [0; HEADER_LEN];
        self.readable
            .take_front(memory, &mut header)
            .ok_or(Status::IoErr)?;
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
        let sector = Sector(u64::from_le_bytes(sector));
        match u32::from_le_bytes([t0, t1, t2, t3]) {
            spec::VIRTIO_BLK_T_IN => {
                none_left(&self.readable)?;
                let at = data_range(device, sector, self.writable.len())?;
                Ok(Operation::Read {
                    at,
                    into: buffer(memory, &self.writable)?,
                })
            }
            spec::VIRTIO_BLK_T_OUT => {
                none_left(&self.writable)?;
                may_write(device)?;
                let at = data_range(device, sector, self.readable.len())?;
                Ok(Operation::Write {
                    at,
                    from: buffer(memory, &self.readable)?,
                })
            }
            spec::VIRTIO_BLK_T_FLUSH => Ok(Operation::Flush),
            spec::VIRTIO_BLK_T_GET_ID => {
                let into = buffer(memory, &self.writable)?;
                let len = into.len().min(device.id().len());
                Ok(Operation::GetId {
                    into: into.slice(0..len),
                })
            }
            spec::VIRTIO_BLK_T_DISCARD => {
                may_write(device)?;
                let segments = self.segments(memory, device, Flags::None)?;
                Ok(Operation::Discard(segments))
            }
            spec::VIRTIO_BLK_T_WRITE_ZEROES => {
                may_write(device)?;
                let segments = self.segments(memory, device, Flags::Unmap)?;
                Ok(Operation::WriteZeroes(segments))
            }
            _ => Err(Status::Unsupported),
        }
    }

    /// The segments of a discard or write-zeroes request, all of them checked before any is carried out.
    fn segments(
        &mut self,
        memory: &Arc<GuestMemoryMmap>,
        device: &Device,
        allowed: Flags,
    ) -> Result<Vec<Segment>, Status> {
        none_left(&self.writable)?;
        let len = usize::try_from(self.readable.len()).map_err(|_| Status::IoErr)?;
        let most = usize::try_from(MAX_RANGE_SEGMENTS).expect("a small constant");
        if len == 0 || !len.is_multiple_of(SEGMENT_LEN) || len / SEGMENT_LEN > most {
            return Err(Status::IoErr);
        }
        let mut segments = Vec::with_capacity(len / SEGMENT_LEN);
        for _ in 0..len / SEGMENT_LEN {
            let mut bytes = [0; SEGMENT_LEN];
            self.readable
                .take_front(memory, &mut bytes)
                .ok_or(Status::IoErr)?;
            segments.push(segment(bytes, device, allowed)?);
        }
        Ok(segments)
    }
}

/// The flags that a segment may have.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Flags {
    None,
    Unmap,
}

fn segment(bytes: [u8; SEGMENT_LEN], device: &Device, allowed: Flags) -> Result<Segment, Status> {
    let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = bytes;
    let sector = Sector(u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]));
    let num_sectors = u32::from_le_bytes([n0, n1, n2, n3]);
    let mode = match (u32::from_le_bytes(flags), allowed) {
        (0, Flags::Unmap) => ZeroMode::KeepAllocated,
        (0, Flags::None) | (spec::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP, Flags::Unmap) => {
            ZeroMode::MayUnmap
        }
        _ => return Err(Status::Unsupported),
    };
    if num_sectors > MAX_RANGE_SECTORS {
        return Err(Status::IoErr);
    }
    let len = u64::from(num_sectors) * SECTOR_SIZE;
    Ok(Segment {
        at: disk_range(device, sector, len)?,
        len,
        mode,
    })
}

/// Where the data of a read or a write begins on disk.
fn data_range(device: &Device, sector: Sector, len: u64) -> Result<GuestOffset, Status> {
    if len > MAX_DATA_LEN || !len.is_multiple_of(SECTOR_SIZE) {
        return Err(Status::IoErr);
    }
    disk_range(device, sector, len)
}

/// The first byte of `len` bytes at `sector`, if all of them lie within the disk.
fn disk_range(device: &Device, sector: Sector, len: u64) -> Result<GuestOffset, Status> {
    let disk_len = device.image().virtual_size() / SECTOR_SIZE * SECTOR_SIZE;
    let at = sector.to_guest_offset().ok_or(Status::IoErr)?;
    let end = at.checked_add(len).ok_or(Status::IoErr)?;
    if end.0 > disk_len {
        Err(Status::IoErr)
    } else {
        Ok(at)
    }
}

fn may_write(device: &Device) -> Result<(), Status> {
    if device.image().is_read_only() {
        Err(Status::IoErr)
    } else {
        Ok(())
    }
}

/// Refuses data that goes the wrong way.
fn none_left(stream: &Stream) -> Result<(), Status> {
    if stream.rest().next().is_some() {
        Err(Status::IoErr)
    } else {
        Ok(())
    }
}

fn buffer(memory: &Arc<GuestMemoryMmap>, stream: &Stream) -> Result<IoBuf, Status> {
    IoBuf::from_guest(memory, stream.rest()).ok_or(Status::IoErr)
}

#[cfg(test)]
mod tests {
    use super::super::testing::{DATA, Driver, Part, device, read_only_device};
    use super::*;
    use vm_memory::Bytes;

    const STATUS: u64 = DATA + 0x8_0000;
    const PAYLOAD: u64 = DATA + 0x1_0000;
    const DISK_LEN: u64 = 1 << 20;

    /// Parses a request of `kind` at `sector` whose chain has `data` between header and status.
    fn parse_on(
        device: &Device,
        driver: &Driver,
        kind: u32,
        sector: u64,
        data: &[Part],
    ) -> Result<Request, Rejection> {
        driver.header(kind, sector);
        let mut parts = vec![Part::Out(DATA, 16)];
        parts.extend_from_slice(data);
        parts.push(Part::In(STATUS, 1));
        let mut reader = ChainReader::new(device.seg_max());
        let direct = reader.parse(driver.chain(&parts), driver.memory(), device);
        let indirect = reader.parse(driver.indirect_chain(&parts), driver.memory(), device);
        assert_eq!(format!("{direct:?}"), format!("{indirect:?}"));
        direct
    }

    fn parse(kind: u32, sector: u64, data: &[Part]) -> Result<Request, Rejection> {
        parse_on(&device(DISK_LEN), &Driver::new(), kind, sector, data)
    }

    fn status(kind: u32, sector: u64, data: &[Part]) -> Status {
        let rejection = parse(kind, sector, data).unwrap_err();
        assert_eq!(rejection.status_at, Some(GuestAddress(STATUS)));
        rejection.status
    }

    fn segments(kind: u32, segments: &[(u64, u32, u32)]) -> Result<Vec<Segment>, Status> {
        let driver = Driver::new();
        let mut at = PAYLOAD;
        for (sector, count, flags) in segments {
            driver
                .memory()
                .write_obj(*sector, GuestAddress(at))
                .unwrap();
            driver
                .memory()
                .write_obj(*count, GuestAddress(at + 8))
                .unwrap();
            driver
                .memory()
                .write_obj(*flags, GuestAddress(at + 12))
                .unwrap();
            at += 16;
        }
        let len = u32::try_from(at - PAYLOAD).unwrap();
        let parsed = parse_on(
            &device(DISK_LEN),
            &driver,
            kind,
            0,
            &[Part::Out(PAYLOAD, len)],
        );
        match parsed.map_err(|rejection| rejection.status)?.operation {
            Operation::Discard(segments) | Operation::WriteZeroes(segments) => Ok(segments),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_read_names_its_range_and_its_pages() {
        let request = parse(
            0,
            8,
            &[Part::In(PAYLOAD, 512), Part::In(PAYLOAD + 0x2000, 1024)],
        )
        .unwrap();
        assert_eq!(request.status_at, GuestAddress(STATUS));
        assert_eq!(request.operation.written_len(), 1536);
        let Operation::Read { at, into } = request.operation else {
            panic!("not a read")
        };
        assert_eq!((at, into.len()), (GuestOffset(4096), 1536));
    }

    #[test]
    fn a_write_up_to_the_last_sector_is_taken_and_one_beyond_refused() {
        let last = DISK_LEN / 512 - 1;
        let request = parse(1, last, &[Part::Out(PAYLOAD, 512)]).unwrap();
        assert_eq!(request.operation.written_len(), 0);
        assert!(matches!(request.operation, Operation::Write { at, .. } if at.0 == DISK_LEN - 512));
        assert_eq!(status(1, last, &[Part::Out(PAYLOAD, 1024)]), Status::IoErr);
        assert_eq!(
            status(0, last + 1, &[Part::In(PAYLOAD, 512)]),
            Status::IoErr
        );
        for sector in [u64::MAX, u64::MAX / 512, u64::MAX / 512 + 1] {
            assert_eq!(status(0, sector, &[Part::In(PAYLOAD, 512)]), Status::IoErr);
        }
    }

    #[test]
    fn a_disk_that_ends_within_a_sector_ends_before_it() {
        let device = device(1000);
        let data = [Part::In(PAYLOAD, 512)];
        assert!(parse_on(&device, &Driver::new(), 0, 0, &data).is_ok());
        assert!(parse_on(&device, &Driver::new(), 0, 1, &data).is_err());
    }

    #[test]
    fn lengths_that_are_not_sectors_are_refused() {
        assert_eq!(status(0, 0, &[Part::In(PAYLOAD, 511)]), Status::IoErr);
        assert_eq!(status(1, 0, &[Part::Out(PAYLOAD, 513)]), Status::IoErr);
        assert!(parse(0, 0, &[]).is_ok(), "nothing is a multiple of 512");
    }

    #[test]
    fn data_that_goes_the_wrong_way_is_refused() {
        assert_eq!(status(0, 0, &[Part::Out(PAYLOAD, 512)]), Status::IoErr);
        assert_eq!(status(1, 0, &[Part::In(PAYLOAD, 512)]), Status::IoErr);
        assert_eq!(status(11, 0, &[Part::In(PAYLOAD, 16)]), Status::IoErr);
    }

    #[test]
    fn pages_outside_guest_memory_are_refused() {
        assert_eq!(status(0, 0, &[Part::In(1 << 40, 512)]), Status::IoErr);
        assert_eq!(status(1, 0, &[Part::Out(u64::MAX, 512)]), Status::IoErr);
    }

    #[test]
    fn more_data_than_any_driver_sends_is_refused() {
        let device = device(8 << 30);
        let driver = Driver::new();
        let half = vec![Part::In(DATA, 1 << 20); 64];
        assert!(parse_on(&device, &driver, 0, 0, &half).is_ok());
        let huge = vec![Part::In(DATA, 16 << 20); 65];
        assert_eq!(
            parse_on(&device, &driver, 0, 0, &huge).unwrap_err().status,
            Status::IoErr
        );
    }

    #[test]
    fn a_header_cut_short_is_refused() {
        let driver = Driver::new();
        driver.header(0, 0);
        let parts = [Part::Out(DATA, 15), Part::In(STATUS, 1)];
        let rejection =
            ChainReader::new(8).parse(driver.chain(&parts), driver.memory(), &device(DISK_LEN));
        let expected = Rejection {
            status_at: Some(GuestAddress(STATUS)),
            status: Status::IoErr,
        };
        assert_eq!(rejection.unwrap_err(), expected);
    }

    #[test]
    fn unknown_types_are_unsupported() {
        for kind in [2, 3, 5, 14, 15, 0x8000_0000, u32::MAX] {
            assert_eq!(status(kind, 0, &[]), Status::Unsupported);
        }
    }

    #[test]
    fn the_serial_goes_into_as_many_bytes_as_there_are() {
        for (room, written) in [(20, 20), (64, 20), (5, 5), (0, 0)] {
            let request = parse(8, 0, &[Part::In(PAYLOAD, room)]).unwrap();
            assert_eq!(request.operation.written_len(), written);
        }
    }

    #[test]
    fn segments_carry_their_own_unmap_flag() {
        let zeroes = segments(13, &[(0, 8, 0), (100, 1, 1)]).unwrap();
        assert_eq!(
            zeroes[0],
            Segment {
                at: GuestOffset(0),
                len: 4096,
                mode: ZeroMode::KeepAllocated
            }
        );
        assert_eq!(
            zeroes[1],
            Segment {
                at: GuestOffset(51200),
                len: 512,
                mode: ZeroMode::MayUnmap
            }
        );
        assert_eq!(segments(11, &[(2048, 0, 0)]).unwrap().len(), 1);
    }

    #[test]
    fn reserved_flags_are_unsupported() {
        assert_eq!(
            segments(13, &[(0, 1, 0), (0, 1, 2)]).unwrap_err(),
            Status::Unsupported
        );
        assert_eq!(segments(13, &[(0, 1, 3)]).unwrap_err(), Status::Unsupported);
        assert_eq!(segments(11, &[(0, 1, 1)]).unwrap_err(), Status::Unsupported);
    }

    #[test]
    fn segments_beyond_a_limit_are_refused() {
        assert_eq!(segments(11, &[(2047, 2, 0)]).unwrap_err(), Status::IoErr);
        assert_eq!(
            segments(11, &[(u64::MAX, 1, 0)]).unwrap_err(),
            Status::IoErr
        );
        assert_eq!(
            segments(13, &[(0, MAX_RANGE_SECTORS + 1, 0)]).unwrap_err(),
            Status::IoErr
        );
        assert_eq!(segments(13, &[]).unwrap_err(), Status::IoErr);
        assert!(segments(13, &[(0, 1, 0); 16]).is_ok());
        assert_eq!(segments(13, &[(0, 1, 0); 17]).unwrap_err(), Status::IoErr);
        assert_eq!(status(13, 0, &[Part::Out(PAYLOAD, 17)]), Status::IoErr);
    }

    #[test]
    fn a_range_longer_than_told_is_refused_on_a_disk_that_has_it() {
        let device = device(8 << 30);
        let driver = Driver::new();
        for (count, fits) in [(MAX_RANGE_SECTORS, true), (MAX_RANGE_SECTORS + 1, false)] {
            driver
                .memory()
                .write_obj(0u64, GuestAddress(PAYLOAD))
                .unwrap();
            driver
                .memory()
                .write_obj(count, GuestAddress(PAYLOAD + 8))
                .unwrap();
            let parsed = parse_on(&device, &driver, 13, 0, &[Part::Out(PAYLOAD, 16)]);
            assert_eq!(parsed.is_ok(), fits);
        }
    }

    #[test]
    fn a_read_only_disk_refuses_all_that_writes() {
        let device = read_only_device(DISK_LEN);
        let driver = Driver::new();
        let refused = |kind, data: &[Part]| {
            parse_on(&device, &driver, kind, 0, data)
                .unwrap_err()
                .status
        };
        assert_eq!(refused(1, &[Part::Out(PAYLOAD, 512)]), Status::IoErr);
        assert_eq!(refused(11, &[Part::Out(PAYLOAD, 16)]), Status::IoErr);
        assert_eq!(refused(13, &[Part::Out(PAYLOAD, 16)]), Status::IoErr);
        assert!(parse_on(&device, &driver, 0, 0, &[Part::In(PAYLOAD, 512)]).is_ok());
        assert!(parse_on(&device, &driver, 4, 0, &[]).is_ok());
    }
}
