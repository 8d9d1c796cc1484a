//! Opening images by their explicit format: backing chains, locks, and one object per file however many VMs use it.
