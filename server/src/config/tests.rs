use std::os::unix::fs::PermissionsExt as _;

use std::fs;
use std::path::Path;
use std::time::Duration;

use super::*;
use crate::fence::{DevicePattern, Fencer};

fn settings(text: &str) -> Result<Config, String> {
    let settings: Settings = toml::from_str(text).map_err(|error| error.to_string())?;
    settings.resolve().map_err(|error| error.to_string())
}

#[test]
fn a_wrong_setting_is_refused_by_name_with_what_would_do() {
    let refused = |text: &str| settings(text).unwrap_err();
    assert!(refused("").contains("--listen"));
    assert!(refused("listne = ['127.0.0.1:1']").contains("listne"));
    assert!(refused("listen = ['127.0.0.1']").contains("IP:PORT"));
    assert!(refused("listen = ['127.0.0.1:1']\nwindow = 0").contains("window is 0"));
    assert!(refused("listen = ['127.0.0.1:1']\nmax_connections = 0").contains("max_connections is 0"));
    assert!(refused("listen = ['127.0.0.1:1']\nmax_connections = 9223372036854775807").contains("ulimit -n"));
    assert!(refused("listen = ['127.0.0.1:1']\nmemory_limit_bytes = 4095").contains("at least a page"));
    assert!(
        refused("listen = ['127.0.0.1:1']\nlease = '49ms'").contains("lease is 49ms; it must be from 50ms")
    );
    assert!(refused("listen = ['127.0.0.1:1']\nlease = '2h'").contains("to 1h"));
    let no_margin = "listen = ['127.0.0.1:1']\nlease = '100ms'\nlease_margin = '100ms'";
    assert!(refused(no_margin).contains("lease_margin is 100ms"));
    assert!(refused("listen = ['127.0.0.1:1']\nlease = 'soon'").contains("lease"));
    assert!(refused("listen = ['127.0.0.1:1']\nsource_fault_timeout = '0s'").contains("longer than 0"));
    assert!(refused("listen = ['127.0.0.1:1']\nadmin_listen = ['127.0.0.1:2']").contains("no Unix socket"));
}

#[test]
fn a_short_lease_has_a_margin_that_leaves_most_of_it() {
    let lease =
        |text: &str| settings(&format!("listen = ['127.0.0.1:1']\n{text}")).unwrap().host.session.lease;
    assert_eq!(lease("").margin, Duration::from_millis(100));
    assert_eq!(lease("lease = '50ms'").margin, Duration::from_millis(5));
    assert!(lease("lease = '50ms'").device_duration() > Duration::from_millis(44));
    assert_eq!(lease("lease = '1h'").margin, Duration::from_millis(100));
    assert_eq!(lease("lease = '1s'\nlease_margin = '10ms'").margin, Duration::from_millis(10));
}

#[test]
fn each_device_has_the_first_fencer_that_means_it() {
    let fencers =
        |text: &str| settings(&format!("listen = ['127.0.0.1:1']\n{text}")).map(|config| config.host.fencers);
    assert_eq!(fencers("").unwrap(), []);
    let all = "fence_command = '/bin/sh'\nfence_timeout = '2s'\n";
    let some = "[[fencer]]\ndevices = ['gpu*']\nendpoint = 'unix:/f'\ntimeout = '1s'\n";
    let rules = fencers(&format!("{all}{some}")).unwrap();
    assert_eq!(rules.len(), 2);
    assert_eq!(rules[0].fencer, Fencer::Service("unix:/f".parse().unwrap()));
    assert_eq!((rules[0].time_limit, rules[1].time_limit), (Duration::from_secs(1), Duration::from_secs(2)));
    assert_eq!(
        (&rules[1].devices[0], &rules[1].fencer),
        (&DevicePattern::every(), &Fencer::Command("/bin/sh".into()))
    );
    let refused = |text: &str| fencers(text).unwrap_err();
    assert!(refused("[[fencer]]\ndevices = ['a']").contains("either a command or an endpoint"));
    assert!(refused("fence_command = 'fence'").contains("absolute path"));
    assert!(refused("fence_endpoint = '10.0.0.1:1'").contains("--insecure"));
    assert!(refused("fence_endpoint = 'tcp://pdu.example:1'").contains("pdu.example:1 may be on another"));
    assert!(refused("fence_endpoint = 'fd://fencer'").contains("tcp://HOST:PORT"));
    assert_eq!(fencers("fence_endpoint = 'localhost:1'").unwrap().len(), 1);
    let by_name = fencers("fence_endpoint = 'pdu.example:1'\ninsecure = true").unwrap();
    assert_eq!(by_name[0].fencer, Fencer::Service("tcp://pdu.example:1".parse().unwrap()));
    assert!(refused("fence_command = '/bin/sh'\nfence_timeout = '0s'").contains("fence_timeout"));
    assert!(refused("quarantine_pages = 0").contains("quarantine_pages"));
}

#[test]
fn a_fencer_that_could_not_run_is_refused_by_its_path() {
    let folder = tempfile::tempdir().unwrap();
    let fencer = |text: &str| settings(&format!("listen = ['127.0.0.1:1']\n{text}"));
    let given = |path: &Path| fencer(&format!("fence_command = '{}'", path.display()));
    let nowhere = folder.path().join("nowhere");
    let refused = given(&nowhere).unwrap_err();
    assert!(refused.contains(nowhere.to_str().unwrap()) && refused.contains("fence_command"), "{refused}");
    assert!(given(folder.path()).unwrap_err().contains("no executable file"), "a directory is no program");
    let program = folder.path().join("fence");
    fs::write(&program, "#!/bin/sh\n").unwrap();
    assert!(given(&program).unwrap_err().contains("executable"));
    let of_some = format!("[[fencer]]\ndevices = ['gpu*']\ncommand = '{}'", program.display());
    assert!(fencer(&of_some).unwrap_err().contains("executable"));
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    assert!(given(&program).is_ok() && fencer(&of_some).is_ok());
}

#[test]
fn a_time_limit_for_no_fencer_is_refused() {
    let refused = settings("listen = ['127.0.0.1:1']\nfence_timeout = '2s'").unwrap_err();
    assert!(refused.contains("fence_timeout") && refused.contains("--fence-command"), "{refused}");
}

#[test]
fn a_fencer_by_flag_takes_the_place_of_the_other_kind_in_the_file() {
    let file: Settings = toml::from_str("listen = ['127.0.0.1:1']\nfence_endpoint = 'unix:/f'").unwrap();
    let flags = Settings { fence_command: Some("/bin/sh".into()), ..Settings::default() };
    let fencers = flags.or(file).resolve().unwrap().host.fencers;
    assert_eq!(
        fencers.iter().map(|rule| &rule.fencer).collect::<Vec<_>>(),
        [&Fencer::Command("/bin/sh".into())]
    );
}

#[test]
fn plaintext_that_leaves_the_machine_must_be_asked_for() {
    assert!(settings("listen = ['0.0.0.0:1']").unwrap_err().contains("--insecure"));
    assert!(settings("listen = ['0.0.0.0:1']\ninsecure = true").is_ok());
}

#[test]
fn memory_is_limited_in_bytes_and_swaps_only_where_it_is_told_to() {
    let config = settings("listen = ['127.0.0.1:1']\nmemory_frames = 100").unwrap();
    assert_eq!((config.memory_limit_frames, config.swap), (100, None));
    let text = "listen = ['127.0.0.1:1']\nmemory_limit_bytes = 40960\nswap_file = '/s'\nswap_bytes = 8192";
    let config = settings(text).unwrap();
    assert_eq!((config.memory_limit_frames, config.swap), (10, Some(("/s".into(), 2))));
}

#[test]
fn a_flag_wins_over_the_file() {
    let file: Settings = toml::from_str("listen = ['127.0.0.1:1']\nwindow = 7\nlease = '3s'").unwrap();
    let flags = Settings { window: Some(9), ..Settings::default() };
    let config = flags.or(file).resolve().unwrap();
    assert_eq!(config.host.session.outbox.window, 9);
    assert_eq!(config.host.session.lease.duration, Duration::from_secs(3));
    assert_eq!(config.listen, ["127.0.0.1:1".parse().unwrap()]);
}
