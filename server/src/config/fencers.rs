//! Who cuts devices off, from the settings.

use std::fs;
use std::path::Path;
use std::time::Duration;

use rustix::fs::{Access, AtFlags, CWD, accessat};

use super::error::ConfigError;
use super::{FencerSettings, Settings};
use crate::fence::{DevicePattern, Fencer, FencerRule};

/// T_fence where nothing else is said: a switch or an IOMMU is told in milliseconds, a power controller in
/// seconds.
const DEFAULT_FENCE_TIMEOUT: Duration = Duration::from_secs(5);

impl Settings {
    /// Those of certain devices first, then that of all.
    pub(super) fn fencers(&self) -> Result<Vec<FencerRule>, ConfigError> {
        let for_all = FencerSettings {
            devices: vec!["*".to_owned()],
            command: self.fence_command.clone(),
            endpoint: self.fence_endpoint.clone(),
            timeout: None,
        };
        let is_set = for_all.command.is_some() || for_all.endpoint.is_some();
        if self.fence_timeout.is_some() && !is_set && self.fencer.is_empty() {
            return Err(ConfigError::FenceTimeoutOfNobody);
        }
        self.fencer.iter().chain(is_set.then_some(&for_all)).map(|fencer| self.fencer_rule(fencer)).collect()
    }

    fn fencer_rule(&self, fencer: &FencerSettings) -> Result<FencerRule, ConfigError> {
        let who = match (&fencer.command, &fencer.endpoint) {
            (Some(program), None) if program.is_absolute() => {
                can_run(program)?;
                Fencer::Command(program.clone())
            }
            (Some(program), None) => {
                return Err(ConfigError::Value {
                    setting: "fence_command",
                    value: program.display().to_string(),
                    expected: "an absolute path",
                });
            }
            (None, Some(endpoint)) if endpoint.is_local() || self.insecure => {
                Fencer::Service(endpoint.clone())
            }
            (None, Some(endpoint)) => {
                return Err(ConfigError::FencerInPlaintext { endpoint: endpoint.clone() });
            }
            (None, None) | (Some(_), Some(_)) => {
                return Err(ConfigError::Fencer { devices: fencer.devices.clone() });
            }
        };
        let time_limit = fencer.timeout.or(self.fence_timeout).map_or(DEFAULT_FENCE_TIMEOUT, |span| span.0);
        if time_limit.is_zero() {
            return Err(ConfigError::Value {
                setting: "fence_timeout",
                value: "0s".to_owned(),
                expected: "longer than 0",
            });
        }
        let devices = fencer.devices.iter().map(|pattern| DevicePattern::new(pattern)).collect();
        Ok(FencerRule { devices, fencer: who, time_limit })
    }
}

/// Strict address spaces admit devices that do not enforce a lease because they have a fencer: one that could not
/// even be started is none.
fn can_run(program: &Path) -> Result<(), ConfigError> {
    let metadata =
        fs::metadata(program).map_err(|error| ConfigError::FenceCommand { path: program.into(), error })?;
    let may = accessat(CWD, program, Access::EXEC_OK, AtFlags::EACCESS);
    if !metadata.is_file() || may.is_err() {
        return Err(ConfigError::FenceCommandNotExecutable { path: program.into() });
    }
    Ok(())
}
