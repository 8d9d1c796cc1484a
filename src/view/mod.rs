//! What one VM sees of a shared disk, and what it may write.
