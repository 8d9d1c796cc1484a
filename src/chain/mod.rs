//! Opening images: by an explicit format, with their backing chains and their locks, each file once.

pub mod backing;
pub mod create;
pub mod data_file;
pub mod format;
pub mod host;
pub mod inspect;
mod json_name;
pub mod part_file;
pub mod registry;
pub mod single;
