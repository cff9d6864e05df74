//! The directory of a run: its socket, its files, and what the processes share. It goes when the run ends,
//! however it ends.

use std::io;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

/// A directory that is removed when this is dropped.
#[derive(Debug)]
pub struct Workspace(TempDir);

impl Workspace {
    /// A new one, which nobody else can enter.
    ///
    /// # Errors
    /// When the system's directory for temporary files cannot be written.
    pub fn new() -> io::Result<Self> {
        tempfile::Builder::new().prefix("shootdown-loadgen-").tempdir().map(Self)
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// The host agent's socket for devices.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.0.path().join("device.sock")
    }
}
