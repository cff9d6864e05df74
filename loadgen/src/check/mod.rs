//! The checker: how a device that reads through a stale translation is caught, by what it reads.
//!
//! ```text
//!   host agent                                   device agent
//!   ----------                                   ------------
//!   the operation returns: pages are released    read the floor of the page  (before the read begins)
//!   raise the page's floor  ------------------>  read the page
//!                                                is what was read below the floor? then it is stale
//! ```
//!
//! A floor is raised only after the operation has returned, and it is read before the read begins. So a
//! read that finds less than its floor began after the release was over: real-time order, without comparing
//! two clocks. A read that began earlier may find either; the floor it has allows both.
//!
//! [`stamp`] is what pages hold, [`floor`] is what they must hold at least, [`verdict`] compares the two.

pub mod stamp;
pub mod floor;
pub mod verdict;
