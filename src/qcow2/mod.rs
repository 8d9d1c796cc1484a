//! The qcow2 format, versions 2 and 3: an in-process copy-on-write engine.

pub mod compressed;
pub mod create;
pub mod features;
pub mod header;
pub mod header_extension;
mod header_parse;
pub mod header_update;
mod supported;
