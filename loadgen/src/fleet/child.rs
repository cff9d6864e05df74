//! One process of a run.

use std::io;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::process::{ChildStderr, ChildStdin, ChildStdout, Command};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::control::{FromAgent, ToAgent};

/// How much of an agent's standard error is kept for the case that it fails.
const KEPT_BYTES: usize = 64 * 1024;

/// How long an agent has to end by itself.
const PATIENCE: Duration = Duration::from_secs(10);

/// What becomes of the agents' standard error.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Noise {
    /// It is told when an agent fails.
    WhenFailing,
    /// It is passed through.
    Always,
}

/// Why an agent is of no use.
#[derive(Debug, thiserror::Error)]
pub enum ChildError {
    /// It could not be started.
    #[error("{name} could not be started")]
    Spawn {
        /// Which.
        name: String,
        /// Why.
        #[source]
        error: io::Error,
    },
    /// It does not listen.
    #[error("{name} does not listen")]
    Say {
        /// Which.
        name: String,
        /// Why.
        #[source]
        error: io::Error,
    },
    /// It ended, and was not asked to.
    #[error("{name} ended by itself ({status}){}", said(stderr))]
    Ended {
        /// Which.
        name: String,
        /// How.
        status: String,
        /// The end of what it said.
        stderr: String,
    },
}

fn said(stderr: &str) -> String {
    if stderr.is_empty() { String::new() } else { format!("; it said:\n{}", stderr.trim_end()) }
}

/// An agent that runs. Dropped, it is killed.
#[derive(Debug)]
pub(super) struct Agent {
    name: String,
    process: tokio::process::Child,
    stdin: Option<ChildStdin>,
    reader: JoinHandle<()>,
    stderr: Option<JoinHandle<String>>,
}

/// What an agent said, or that it says nothing any more.
pub(super) type Said = (usize, Option<FromAgent>);

impl Agent {
    /// Starts this program again as `command`. What it says goes to `tx` with `number`.
    pub(super) fn start(
        name: String,
        command: &str,
        noise: Noise,
        number: usize,
        tx: mpsc::Sender<Said>,
    ) -> Result<Self, ChildError> {
        let mut process = Command::new("/proc/self/exe");
        process
            .arg(command)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(match noise {
                Noise::WhenFailing => Stdio::piped(),
                Noise::Always => Stdio::inherit(),
            })
            // Ctrl-C is for the parent, which ends its agents in order.
            .process_group(0)
            .kill_on_drop(true);
        let mut process = process.spawn().map_err(|error| ChildError::Spawn { name: name.clone(), error })?;
        let stdin = process.stdin.take();
        let stdout = process.stdout.take().expect("it was asked for");
        let stderr = process.stderr.take().map(|stderr| tokio::spawn(keep(stderr)));
        let reader = tokio::spawn(relay(stdout, number, tx));
        Ok(Self { name, process, stdin, reader, stderr })
    }

    pub(super) async fn say(&mut self, what: &ToAgent) -> Result<(), ChildError> {
        let failed = |error| ChildError::Say { name: self.name.clone(), error };
        let mut line = serde_json::to_vec(what).map_err(|error| failed(io::Error::other(error)))?;
        line.push(b'\n');
        let stdin = self.stdin.as_mut().ok_or_else(|| failed(io::ErrorKind::BrokenPipe.into()))?;
        stdin.write_all(&line).await.map_err(failed)
    }

    /// Why it said nothing any more.
    pub(super) async fn post_mortem(mut self) -> ChildError {
        self.stdin = None;
        let status = self.wait().await;
        let stderr = match self.stderr.take() {
            Some(stderr) => stderr.await.unwrap_or_default(),
            None => String::new(),
        };
        let status = status.map_or_else(|error| error.to_string(), |status| status.to_string());
        ChildError::Ended { name: self.name.clone(), status, stderr }
    }

    /// Lets it end by itself, and kills it where it does not.
    pub(super) async fn finish(mut self) -> Result<(), ChildError> {
        self.stdin = None;
        let ended = self.wait().await;
        if ended.is_ok_and(|status| status.success()) { Ok(()) } else { Err(self.post_mortem().await) }
    }

    async fn wait(&mut self) -> io::Result<ExitStatus> {
        match tokio::time::timeout(PATIENCE, self.process.wait()).await {
            Ok(ended) => ended,
            Err(_) => {
                self.process.start_kill()?;
                self.process.wait().await
            }
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

async fn relay(stdout: ChildStdout, number: usize, tx: mpsc::Sender<Said>) {
    let mut lines = BufReader::new(stdout).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        let Ok(said) = serde_json::from_str(&line) else { break };
        if tx.send((number, Some(said))).await.is_err() {
            return;
        }
    }
    // The parent may be at its end too.
    let _ = tx.send((number, None)).await;
}

async fn keep(mut stderr: ChildStderr) -> String {
    let (mut kept, mut buffer) = (Vec::new(), vec![0; 4096]);
    while let Ok(read @ 1..) = stderr.read(&mut buffer).await {
        kept.extend_from_slice(&buffer[..read]);
        let excess = kept.len().saturating_sub(KEPT_BYTES);
        kept.drain(..excess);
    }
    String::from_utf8_lossy(&kept).into_owned()
}
