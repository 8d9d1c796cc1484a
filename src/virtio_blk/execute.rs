//! Carrying out a request on the image, whatever it takes: the way of all requests that the fast path does
//! not serve.

use super::config::WriteCache;
use super::{Device, Operation, Segment, Status, status_of};
use crate::error::Result;
use crate::sys::IoBuf;
use crate::units::GuestOffset;

/// The most bytes of one read or write that the image sees at once; it bounds what bounce buffers hold.
const PIECE_LEN: usize = 4 << 20;

/// Carries `operation` out; what the driver is to be told.
pub async fn execute(device: &Device, operation: Operation) -> Status {
    let (what, result) = match operation {
        Operation::Read { at, into } => ("read", read(device, at, &into).await),
        Operation::Write { at, from } => ("write", write(device, at, &from).await),
        Operation::Flush => ("flush", device.image().flush().await),
        Operation::GetId { into } => {
            into.copy_from(0, &device.id()[..into.len().min(device.id().len())]);
            ("get-id", Ok(()))
        }
        Operation::Discard(segments) => ("discard", discard(device, &segments).await),
        Operation::WriteZeroes(segments) => ("write-zeroes", write_zeroes(device, &segments).await),
    };
    match result {
        Ok(()) => Status::Ok,
        Err(error) => {
            device.note_failure(what, &error);
            status_of(error.kind())
        }
    }
}

/// The pieces of `buf` and where on disk each belongs.
fn pieces(at: GuestOffset, buf: &IoBuf) -> impl Iterator<Item = (GuestOffset, IoBuf)> + '_ {
    (0..buf.len()).step_by(PIECE_LEN).map(move |start| {
        let end = buf.len().min(start.saturating_add(PIECE_LEN));
        let offset =
            at.0.saturating_add(u64::try_from(start).unwrap_or(u64::MAX));
        (GuestOffset(offset), buf.slice(start..end))
    })
}

async fn read(device: &Device, at: GuestOffset, into: &IoBuf) -> Result<()> {
    for (at, piece) in pieces(at, into) {
        device.image().read(at, piece).await?;
    }
    Ok(())
}

async fn write(device: &Device, at: GuestOffset, from: &IoBuf) -> Result<()> {
    for (at, piece) in pieces(at, from) {
        device.image().write(at, piece).await?;
    }
    write_through(device).await
}

async fn discard(device: &Device, segments: &[Segment]) -> Result<()> {
    for segment in segments.iter().filter(|segment| segment.len > 0) {
        device.image().discard(segment.at, segment.len).await?;
    }
    Ok(())
}

async fn write_zeroes(device: &Device, segments: &[Segment]) -> Result<()> {
    for segment in segments.iter().filter(|segment| segment.len > 0) {
        device
            .image()
            .write_zeroes(segment.at, segment.len, segment.mode)
            .await?;
    }
    write_through(device).await
}

/// Without a write cache, a write that completes is durable.
async fn write_through(device: &Device) -> Result<()> {
    match device.write_cache() {
        WriteCache::WriteBack => Ok(()),
        WriteCache::WriteThrough => device.image().flush().await,
    }
}

#[cfg(test)]
mod tests {
    use super::super::WRITEBACK_OFFSET;
    use super::super::testing::{Call, device, failing_device, recorded_device};
    use super::*;
    use crate::error::ErrorKind;
    use crate::storage::ZeroMode;
    use crate::sys::block_on;

    const AT: GuestOffset = GuestOffset(512);

    fn write_of(len: usize) -> Operation {
        Operation::Write {
            at: AT,
            from: IoBuf::from_bytes(&vec![7; len]),
        }
    }

    #[test]
    fn what_was_written_is_read() {
        let device = device(1 << 20);
        assert_eq!(block_on(execute(&device, write_of(1024))), Status::Ok);
        let into = IoBuf::zeroed(2048);
        let read = Operation::Read {
            at: GuestOffset(0),
            into: into.clone(),
        };
        assert_eq!(block_on(execute(&device, read)), Status::Ok);
        let bytes = into.to_vec();
        assert!(bytes[512..1536].iter().all(|b| *b == 7));
        assert!(bytes[..512].iter().chain(&bytes[1536..]).all(|b| *b == 0));
    }

    #[test]
    fn the_serial_is_told() {
        let into = IoBuf::from_bytes(&[9; 20]);
        let status = block_on(execute(
            &device(1 << 20),
            Operation::GetId { into: into.clone() },
        ));
        assert_eq!(status, Status::Ok);
        assert_eq!(into.to_vec(), b"serial\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    }

    #[test]
    fn long_requests_reach_the_image_in_pieces() {
        let (device, calls) = recorded_device(64 << 20);
        assert_eq!(
            block_on(execute(&device, write_of(2 * PIECE_LEN + 512))),
            Status::Ok
        );
        let piece = u64::try_from(PIECE_LEN).unwrap();
        let expected = [
            Call::Write(AT, piece),
            Call::Write(GuestOffset(AT.0 + piece), piece),
            Call::Write(GuestOffset(AT.0 + 2 * piece), 512),
        ];
        assert_eq!(*calls.lock().unwrap(), expected);
    }

    #[test]
    fn without_a_write_cache_every_write_is_flushed_before_it_completes() {
        let (device, calls) = recorded_device(1 << 20);
        device.write_config(WRITEBACK_OFFSET, &[0]);
        let zeroes = vec![Segment {
            at: AT,
            len: 512,
            mode: ZeroMode::MayUnmap,
        }];
        assert_eq!(block_on(execute(&device, write_of(512))), Status::Ok);
        assert_eq!(
            block_on(execute(&device, Operation::WriteZeroes(zeroes))),
            Status::Ok
        );
        let expected = [
            Call::Write(AT, 512),
            Call::Flush,
            Call::WriteZeroes(AT, 512, ZeroMode::MayUnmap),
            Call::Flush,
        ];
        assert_eq!(*calls.lock().unwrap(), expected);
    }

    #[test]
    fn every_segment_is_carried_out_with_its_own_mode() {
        let (device, calls) = recorded_device(1 << 20);
        let segments = vec![
            Segment {
                at: GuestOffset(0),
                len: 512,
                mode: ZeroMode::KeepAllocated,
            },
            Segment {
                at: GuestOffset(512),
                len: 0,
                mode: ZeroMode::MayUnmap,
            },
            Segment {
                at: GuestOffset(4096),
                len: 1024,
                mode: ZeroMode::MayUnmap,
            },
        ];
        assert_eq!(
            block_on(execute(&device, Operation::WriteZeroes(segments.clone()))),
            Status::Ok
        );
        assert_eq!(
            block_on(execute(&device, Operation::Discard(segments))),
            Status::Ok
        );
        let expected = [
            Call::WriteZeroes(GuestOffset(0), 512, ZeroMode::KeepAllocated),
            Call::WriteZeroes(GuestOffset(4096), 1024, ZeroMode::MayUnmap),
            Call::Discard(GuestOffset(0), 512),
            Call::Discard(GuestOffset(4096), 1024),
        ];
        assert_eq!(*calls.lock().unwrap(), expected);
    }

    #[test]
    fn a_failure_becomes_the_status_of_its_kind() {
        for (kind, status) in [
            (ErrorKind::Io, Status::IoErr),
            (ErrorKind::Refused, Status::IoErr),
            (ErrorKind::Unsupported, Status::Unsupported),
        ] {
            let device = failing_device(kind);
            assert_eq!(block_on(execute(&device, write_of(512))), status);
            assert_eq!(block_on(execute(&device, Operation::Flush)), status);
        }
    }
}
