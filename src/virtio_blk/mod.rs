//! The virtio block device (virtio 1.3, section 5.2): requests, configuration space and features, with no vhost in it.
