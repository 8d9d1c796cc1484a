//! What the client does to a disk.

use crate::cpus::Room;
use crate::device::Waiting;

/// What a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Read,
    Write,
    /// A write, and a flush when it has ended: one request for the measurement.
    WriteFlush,
}

/// Where requests go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pattern {
    Random,
    /// Forward, and from the start again.
    Sequential,
    /// To every unit of so many bytes once, until none is left.
    Once {
        unit: u64,
        order: Order,
    },
}

/// In which order units are visited, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// From first to last, at their start.
    Forward,
    /// At random, at their start.
    Random,
    /// At random, at any block of theirs.
    RandomInside,
}

/// A load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Load {
    /// As in the tables.
    pub(crate) name: &'static str,
    pub(crate) kind: Kind,
    pub(crate) pattern: Pattern,
    /// Bytes of a request.
    pub(crate) len: usize,
    /// Requests under way in each queue.
    pub(crate) depth: usize,
    pub(crate) queues: usize,
    /// Disks at once, each with so many queues.
    pub(crate) disks: usize,
    pub(crate) waiting: Waiting,
    pub(crate) room: Room,
}

const RANDOM_4K: Load = Load {
    name: "4K random read, qd1",
    kind: Kind::Read,
    pattern: Pattern::Random,
    len: 4 << 10,
    depth: 1,
    queues: 1,
    disks: 1,
    waiting: Waiting::Interrupts,
    room: Room::Beside,
};
const SEQUENTIAL_1M: Load = Load {
    name: "1M sequential read, qd8",
    pattern: Pattern::Sequential,
    len: 1 << 20,
    depth: 8,
    ..RANDOM_4K
};

pub(crate) const READ_QD1: Load = RANDOM_4K;
pub(crate) const READ_QD1_POLLING: Load = Load {
    name: "4K random read, qd1 polling",
    waiting: Waiting::Polling,
    ..RANDOM_4K
};
pub(crate) const READ_QD32: Load = Load {
    name: "4K random read, qd32",
    depth: 32,
    ..RANDOM_4K
};
pub(crate) const READ_QD128: Load = Load {
    name: "4K random read, qd128",
    depth: 128,
    ..RANDOM_4K
};
pub(crate) const WRITE_QD1: Load = Load {
    name: "4K random write, qd1",
    kind: Kind::Write,
    ..RANDOM_4K
};
pub(crate) const WRITE_QD1_POLLING: Load = Load {
    name: "4K random write, qd1 polling",
    waiting: Waiting::Polling,
    ..WRITE_QD1
};
pub(crate) const WRITE_QD32: Load = Load {
    name: "4K random write, qd32",
    depth: 32,
    ..WRITE_QD1
};
pub(crate) const WRITE_FLUSH: Load = Load {
    name: "4K random write + flush, qd1",
    kind: Kind::WriteFlush,
    ..RANDOM_4K
};
pub(crate) const READ_64K: Load = Load {
    name: "64K random read, qd32",
    len: 64 << 10,
    depth: 32,
    ..RANDOM_4K
};
pub(crate) const READ_1M: Load = SEQUENTIAL_1M;
pub(crate) const WRITE_1M: Load = Load {
    name: "1M sequential write, qd8",
    kind: Kind::Write,
    ..SEQUENTIAL_1M
};
pub(crate) const FOUR_QUEUES: Load = Load {
    name: "4K random read, 4 queues of qd32",
    depth: 32,
    queues: 4,
    room: Room::Everywhere,
    ..RANDOM_4K
};
pub(crate) const EIGHT_VMS: Load = Load {
    name: "4K random read, 8 VMs at qd8",
    depth: 8,
    disks: 8,
    room: Room::Everywhere,
    ..RANDOM_4K
};

impl Load {
    /// The same with the contender on all CPUs.
    pub(crate) const fn everywhere(self) -> Self {
        Self {
            room: Room::Everywhere,
            ..self
        }
    }

    /// The same, each unit of `unit` bytes once.
    pub(crate) const fn once(self, unit: u64, order: Order) -> Self {
        Self {
            pattern: Pattern::Once { unit, order },
            ..self
        }
    }

    pub(crate) fn writes(&self) -> bool {
        self.kind != Kind::Read
    }

    /// Requests under way at the same time, on all queues of all disks.
    pub(crate) fn under_way(&self) -> usize {
        self.depth * self.queues * self.disks
    }
}
