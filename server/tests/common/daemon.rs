//! `shootdownd` as a process.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

use rustix::process::{Pid, Signal, kill_process};

use super::until;

pub const DAEMON: &str = env!("CARGO_BIN_EXE_shootdownd");

/// The flags by which it listens in a folder: on `device`, `source` and `admin`.
pub fn listens_in(folder: &Path) -> Vec<String> {
    let flag =
        |(flag, name): (&str, &str)| [flag.to_owned(), format!("unix:{}", folder.join(name).display())];
    [("--listen", "device"), ("--source-listen", "source"), ("--admin-listen", "admin")]
        .into_iter()
        .flat_map(flag)
        .collect()
}

/// One that is ended when the test is.
pub struct Daemon {
    child: Child,
    log: Arc<Mutex<String>>,
}

impl Daemon {
    /// Returns when it listens.
    pub fn start(mut command: Command) -> Self {
        let mut child = command.stderr(Stdio::piped()).env_remove("RUST_LOG").spawn().unwrap();
        let mut stderr = BufReader::new(child.stderr.take().unwrap());
        let log = Arc::new(Mutex::new(String::new()));
        let mut line = String::new();
        while !line.contains("listening for devices") {
            line.clear();
            assert!(stderr.read_line(&mut line).unwrap() > 0, "it ended: {}", log.lock().unwrap());
            log.lock().unwrap().push_str(&line);
        }
        let rest = Arc::clone(&log);
        // Also so that its log never blocks it.
        std::thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                rest.lock().unwrap().push_str(&format!("{line}\n"));
            }
        });
        Self { child, log }
    }

    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).unwrap();
    }

    /// kill -9, and gone.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub async fn end_as_planned(self) {
        self.signal(Signal::TERM);
        self.ended_as_planned().await;
    }

    pub async fn ended_as_planned(mut self) {
        assert_eq!(self.exit_code().await, Some(0));
    }

    pub async fn exit_code(&mut self) -> Option<i32> {
        let mut status = None;
        until(|| {
            status = self.child.try_wait().unwrap();
            status.is_some()
        })
        .await;
        status.unwrap().code()
    }

    pub fn says(&self, word: &str) -> bool {
        self.times_said(word) > 0
    }

    pub fn times_said(&self, word: &str) -> usize {
        self.log.lock().unwrap().matches(word).count()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended by itself.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
