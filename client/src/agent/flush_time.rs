//! How long a flush of the accelerator takes.

use std::str::FromStr;
use std::time::Duration;

use rand::{Rng, RngExt as _};
use rand_distr::{Exp1, Pareto};

/// The longest flush that is drawn: a heavy tail must not outlive every lease by chance.
const LONGEST: Duration = Duration::from_secs(60);

/// How long a flush takes: `none`, `fixed:500us`, `exp:1ms` (the mean), or `pareto:200us,1.5` (the
/// shortest, and the shape: the smaller, the heavier the tail).
#[derive(Debug, Clone, Copy, PartialEq, Default, serde::Deserialize)]
#[serde(try_from = "String")]
pub enum FlushTime {
    /// No time: the flush does not sleep.
    #[default]
    None,
    /// The same each time.
    Fixed(Duration),
    /// Exponentially distributed.
    Exponential {
        /// The mean.
        mean: Duration,
    },
    /// Pareto distributed: most are short, few are very long.
    Pareto {
        /// The shortest.
        scale: Duration,
        /// The exponent of the tail; more than 0.
        shape: f64,
    },
}

/// Why a flush time was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FlushTimeError {
    /// Not a distribution.
    #[error("`{given}` is not a flush time; write none, fixed:500us, exp:1ms or pareto:200us,1.5")]
    Distribution {
        /// What was given.
        given: String,
    },
    /// Not a duration.
    #[error("`{given}` is not a duration; write a number and ns, us, ms or s")]
    Duration {
        /// What was given.
        given: String,
    },
    /// Not a shape.
    #[error("`{given}` is not a shape; write a number above 0")]
    Shape {
        /// What was given.
        given: String,
    },
}

impl FlushTime {
    /// Draws one; `None`: the flush does not sleep.
    pub fn draw(self, random: &mut impl Rng) -> Option<Duration> {
        let time = match self {
            Self::None => return None,
            Self::Fixed(time) => time,
            Self::Exponential { mean } => bounded(mean.as_secs_f64() * random.sample::<f64, _>(Exp1)),
            Self::Pareto { scale, shape } => match Pareto::new(scale.as_secs_f64(), shape) {
                Ok(pareto) => bounded(random.sample(pareto)),
                // A scale of no time.
                Err(_) => Duration::ZERO,
            },
        };
        (!time.is_zero()).then_some(time)
    }
}

fn bounded(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or(LONGEST).min(LONGEST)
}

impl FromStr for FlushTime {
    type Err = FlushTimeError;

    fn from_str(given: &str) -> Result<Self, FlushTimeError> {
        if given == "none" {
            return Ok(Self::None);
        }
        match given.split_once(':') {
            Some(("fixed", time)) => Ok(Self::Fixed(duration(time)?)),
            Some(("exp", mean)) => Ok(Self::Exponential { mean: duration(mean)? }),
            Some(("pareto", both)) => {
                let (scale, shape) = both
                    .split_once(',')
                    .ok_or_else(|| FlushTimeError::Distribution { given: given.to_owned() })?;
                let parsed =
                    shape.trim().parse().ok().filter(|shape: &f64| shape.is_finite() && *shape > 0.0);
                let shape = parsed.ok_or_else(|| FlushTimeError::Shape { given: shape.to_owned() })?;
                Ok(Self::Pareto { scale: duration(scale)?, shape })
            }
            _ => Err(FlushTimeError::Distribution { given: given.to_owned() }),
        }
    }
}

impl TryFrom<String> for FlushTime {
    type Error = FlushTimeError;

    fn try_from(given: String) -> Result<Self, FlushTimeError> {
        given.parse()
    }
}

/// A duration as people write it: `500us`, `1.5ms`.
pub(crate) fn duration(given: &str) -> Result<Duration, FlushTimeError> {
    let refused = || FlushTimeError::Duration { given: given.to_owned() };
    let text = given.trim();
    let unit_at = text.find(|c: char| c.is_ascii_alphabetic()).ok_or_else(refused)?;
    let (number, unit) = text.split_at(unit_at);
    let seconds_a_unit = match unit {
        "ns" => 1e-9,
        "us" => 1e-6,
        "ms" => 1e-3,
        "s" => 1.0,
        _ => return Err(refused()),
    };
    let number: f64 = number.trim().parse().map_err(|_| refused())?;
    Duration::try_from_secs_f64(number * seconds_a_unit).map_err(|_| refused())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng as _;

    #[test]
    fn a_flush_time_is_read_as_it_is_documented() {
        let us = Duration::from_micros;
        let read = |given: &str| given.parse::<FlushTime>();
        assert_eq!(read("none"), Ok(FlushTime::None));
        assert_eq!(read("fixed:500us"), Ok(FlushTime::Fixed(us(500))));
        assert_eq!(read("exp:1.5ms"), Ok(FlushTime::Exponential { mean: us(1500) }));
        assert_eq!(read("pareto:200us,1.5"), Ok(FlushTime::Pareto { scale: us(200), shape: 1.5 }));
        for given in [
            "",
            "fixed",
            "fixed:",
            "fixed:5",
            "fixed:-1s",
            "exp:1h",
            "pareto:1ms",
            "pareto:1ms,0",
            "uniform:1s",
        ] {
            assert!(read(given).is_err(), "{given}");
        }
    }

    #[test]
    fn what_is_drawn_has_the_mean_or_the_least_that_was_asked_for() {
        let mut random = rand::rngs::StdRng::seed_from_u64(7);
        let mean = Duration::from_millis(1);
        let exponential = FlushTime::Exponential { mean };
        let total: Duration = (0..20_000).filter_map(|_| exponential.draw(&mut random)).sum();
        let drawn = total / 20_000;
        assert!(drawn > mean * 95 / 100 && drawn < mean * 105 / 100, "{drawn:?}");
        let pareto = FlushTime::Pareto { scale: mean, shape: 0.1 };
        let least = (0..1000).filter_map(|_| pareto.draw(&mut random)).min();
        assert!(least >= Some(mean * 999 / 1000) && least < Some(mean * 2), "{least:?}");
        assert_eq!(FlushTime::None.draw(&mut random), None);
    }
}
