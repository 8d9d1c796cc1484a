//! The vhost-user back-end: lifecycle, queue workers. Nothing outside this folder knows the transport.
