//! The qcow2 format, versions 2 and 3: an in-process copy-on-write engine.
