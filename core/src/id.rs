//! Names of things. Each is a type of its own, so that no two can be confused, and none of the
//! numbers may be 0: "nothing yet" is not a valid number (SeqCompare), it is `None`.

use std::fmt;
use std::num::NonZeroU64;
use std::sync::Arc;

macro_rules! number {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(NonZeroU64);

        impl $name {
            /// The first number there is.
            pub const FIRST: Self = Self(NonZeroU64::MIN);

            /// `None` for 0, which means "nothing yet" and is not a number.
            #[must_use]
            pub const fn new(value: u64) -> Option<Self> {
                match NonZeroU64::new(value) {
                    Some(value) => Some(Self(value)),
                    None => None,
                }
            }

            /// The number itself, never 0.
            #[must_use]
            pub const fn get(self) -> u64 {
                self.0.get()
            }

            /// The number after this one. 64 bits at a thousand million a second last 584 years, so
            /// the top is not a case to handle: it saturates, and never wraps to an older number.
            #[must_use]
            pub const fn next(self) -> Self {
                Self(self.0.saturating_add(1))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }
    };
}

number! {
    /// An address space: what the kernel calls an mm.
    AddressSpaceId
}
number! {
    /// A subscription, numbered by the host agent and never used twice: a late unsubscribe cannot
    /// end a newer subscription of the same range.
    SubscriptionId
}
number! {
    /// A session between one device and one host agent.
    SessionId
}
number! {
    /// The sequence of an event in its address space. 64-bit, total order.
    Seq
}
number! {
    /// The number of a notice in its session: 1, 2, 3 … without a gap.
    NoticeNumber
}
number! {
    /// One run of a host agent, or of a device agent. A later run has a higher number.
    Incarnation
}
number! {
    /// Rises whenever a session is fenced; whoever may grant or serve bytes compares against it.
    Epoch
}
number! {
    /// Says on whose behalf an event happens, so that a device can skip what it caused itself.
    OwnerTag
}

/// A frame of host memory, by its index in the source's frame store. 0 is a frame like any other.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct FrameNumber(pub u64);

impl fmt::Display for FrameNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// The name that a device gives itself: stable over its restarts.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceId(Arc<str>);

/// Why a device's name was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DeviceIdError {
    /// The name is empty.
    #[error("a device id must not be empty")]
    Empty,
    /// The name is too long.
    #[error("a device id has at most {max} bytes, this one has {length}", max = DeviceId::MAX_BYTES)]
    TooLong {
        /// The refused name's length in bytes.
        length: usize,
    },
    /// The name has a byte that would need quoting in a log, a metric label or a path.
    #[error("a device id consists of letters, digits, '.', '_', ':' and '-'")]
    Character,
}

impl DeviceId {
    /// The longest name, in bytes: it is a label on every metric and log line of the device.
    pub const MAX_BYTES: usize = 64;

    /// # Errors
    /// [`DeviceIdError`] when the name is empty, too long, or has a character outside `[A-Za-z0-9._:-]`.
    pub fn new(name: &str) -> Result<Self, DeviceIdError> {
        if name.is_empty() {
            return Err(DeviceIdError::Empty);
        }
        if name.len() > Self::MAX_BYTES {
            return Err(DeviceIdError::TooLong { length: name.len() });
        }
        if !name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b':' | b'-')) {
            return Err(DeviceIdError::Character);
        }
        Ok(Self(name.into()))
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DeviceId({})", self.0)
    }
}

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Invariant 22.
    #[test]
    fn seq_compare() {
        assert_eq!(Seq::new(0), None, "nothing yet is not a number");
        assert!(Seq::FIRST < Seq::FIRST.next());
        let top = Seq::new(u64::MAX).unwrap();
        assert_eq!(top.next(), top, "the top never wraps to an older number");
        assert!(Seq::new(u64::MAX >> 1).unwrap() < top, "compared as unsigned 64 bits, not by difference");
    }

    #[test]
    fn a_device_id_that_would_need_quoting_is_refused() {
        assert_eq!(DeviceId::new(""), Err(DeviceIdError::Empty));
        assert_eq!(DeviceId::new("gpu 0"), Err(DeviceIdError::Character));
        assert_eq!(DeviceId::new(&"g".repeat(65)), Err(DeviceIdError::TooLong { length: 65 }));
        assert_eq!(DeviceId::new("rack-7.gpu_0:1").unwrap().as_str(), "rack-7.gpu_0:1");
    }
}
