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
//! [`stamp`] is what pages hold, [`layout`] is where they are, [`floor`] is what they must hold at least, and
//! [`verdict`] compares the two. [`lost`] looks the other way: at what devices wrote and used. [`history`] tells
//! how it came to it.

pub mod stamp;
pub mod layout;
pub mod table;
pub mod floor;
pub mod history;
pub mod verdict;
pub mod lost;
