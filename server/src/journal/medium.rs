//! What a journal asks of the disk beyond reading and writing: that bytes and names survive a power loss.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

/// The disk under a state directory. Everything but these two goes to the file system as it is: what is not
/// synced may be there after a power loss, or not.
pub trait Medium: fmt::Debug + Send + Sync {
    /// Returns when what was written to a file survives a power loss.
    ///
    /// # Errors
    /// Nobody knows whether it does.
    fn sync_file(&self, file: &File) -> io::Result<()>;

    /// Returns when the names that there are in a folder do, and those that were removed stay so.
    ///
    /// # Errors
    /// Nobody knows whether they do.
    fn sync_folder(&self, folder: &OwnedFd) -> io::Result<()>;
}

/// The real one.
#[derive(Debug)]
pub(crate) struct Disk;

impl Medium for Disk {
    fn sync_file(&self, file: &File) -> io::Result<()> {
        file.sync_data()
    }

    fn sync_folder(&self, folder: &OwnedFd) -> io::Result<()> {
        Ok(rustix::fs::fsync(folder)?)
    }
}
