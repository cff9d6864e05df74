//! What a journal promised is there after a power loss: a disk that keeps what was synced, and nothing else for sure.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};

use rustix::fs::AtFlags;
use shootdown_proto::v1;
use shootdown_proto::v1::device_service_client::DeviceServiceClient;
use shootdown_proto::v1::session_request::Message as Ask;
use shootdown_proto::v1::session_response::Message as Say;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::config::Settings;
use crate::embed;
use crate::host::Host;
use crate::journal::medium::Medium;
use crate::restart::Restart;
use crate::source::memory::FrameStore;

/// Whether what was not synced is there all the same. Both are in the disk's hand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Unsynced {
    Lost,
    Kept,
}

/// The file system under a folder, and what of it was synced.
#[derive(Debug, Default)]
struct Forgetful(Mutex<Kept>);

#[derive(Debug, Default)]
struct Kept {
    /// By the number of the file, which is held open so that no other gets it.
    files: HashMap<u64, (File, Vec<u8>)>,
    names: BTreeMap<String, u64>,
    /// Whether the next syncs succeed; all behind the last do.
    outcomes: VecDeque<bool>,
}

impl Kept {
    fn outcome(&mut self) -> std::io::Result<()> {
        match self.outcomes.pop_front() {
            Some(false) => Err(std::io::Error::other("the disk does not say")),
            Some(true) | None => Ok(()),
        }
    }
}

impl Medium for Forgetful {
    fn sync_file(&self, file: &File) -> std::io::Result<()> {
        let mut kept = self.0.lock();
        kept.outcome()?;
        let now = (file.try_clone()?, bytes_of(file));
        kept.files.insert(file.metadata()?.ino(), now);
        Ok(())
    }

    fn sync_folder(&self, folder: &OwnedFd) -> std::io::Result<()> {
        let mut kept = self.0.lock();
        kept.outcome()?;
        kept.names = names_in(folder);
        Ok(())
    }
}

fn bytes_of(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

fn names_in(folder: &OwnedFd) -> BTreeMap<String, u64> {
    let names = rustix::fs::Dir::read_from(folder).unwrap().map(|entry| entry.unwrap());
    let names = names.map(|entry| entry.file_name().to_str().unwrap().to_owned());
    names
        .filter(|name| !name.starts_with('.'))
        .map(|name| {
            let stat = rustix::fs::statat(folder, &name, AtFlags::SYMLINK_NOFOLLOW).unwrap();
            (name, stat.st_ino)
        })
        .collect()
}

impl Forgetful {
    /// The next syncs fail where `outcomes` are `false`.
    fn plan(&self, outcomes: impl IntoIterator<Item = bool>) {
        self.0.lock().outcomes = outcomes.into_iter().collect();
    }

    /// What a machine finds that lost its power now.
    fn after_power_loss(&self, folder: &Path, names: Unsynced, bytes: Unsynced) -> tempfile::TempDir {
        let kept = self.0.lock();
        let there = match names {
            Unsynced::Lost => kept.names.clone(),
            Unsynced::Kept => names_in(&File::open(folder).unwrap().into()),
        };
        let found = tempfile::tempdir().unwrap();
        for (name, inode) in there {
            let content = match (kept.files.get(&inode), bytes) {
                (Some((_, synced)), Unsynced::Lost) => synced.clone(),
                (Some((file, _)), Unsynced::Kept) => bytes_of(file),
                (None, _) => Vec::new(),
            };
            fs::write(found.path().join(name), content).unwrap();
        }
        found
    }

    /// The sessions that the next run would know of, whatever the disk did with what was not synced.
    fn survivors(&self, folder: &Path) -> Vec<BTreeSet<u64>> {
        use Unsynced::{Kept, Lost};
        let all = [(Lost, Lost), (Lost, Kept), (Kept, Lost), (Kept, Kept)];
        let opened = all.map(|(names, bytes)| {
            let found = self.after_power_loss(folder, names, bytes);
            let history = file::inspect(found.path()).unwrap();
            ids(&history).into_iter().collect()
        });
        opened.into()
    }
}

fn take_on(folder: &Path, disk: &Arc<Forgetful>) -> JournalFile {
    let medium = Arc::clone(disk) as Arc<dyn Medium>;
    let (mut file, _) = JournalFile::take(folder, Takeover::Never, medium).unwrap();
    let run = Run { number: 0, incarnation: now(1), terms: LeaseTerms::default() };
    file.append(&[Record::Began(run)]).unwrap();
    file
}

/// The file that it went on in may be gone with its name, and everything that was promised in it.
#[test]
fn nothing_is_promised_in_a_file_whose_name_was_not_synced() {
    let folder = tempfile::tempdir().unwrap();
    let disk = Arc::new(Forgetful::default());
    let mut file = take_on(folder.path(), &disk);
    file.append(&[Record::Opened(session(1))]).unwrap();
    // Its file is synced, its folder is not.
    disk.plan([true, false]);
    assert!(matches!(file.compact(), Err(AppendError::Io(_))));
    // However often it is tried, and no file too many is left.
    for _ in 0..3 {
        disk.plan([true, false]);
        assert!(matches!(file.append(&[Record::Opened(session(2))]), Err(AppendError::Io(_))));
        assert!(fs::read_dir(folder.path()).unwrap().count() <= 2);
        assert_eq!(file.claim().standing(), Standing::Current);
    }
    file.append(&[Record::Opened(session(3))]).unwrap();
    for found in disk.survivors(folder.path()) {
        assert!(found.is_superset(&[1, 3].into()), "{found:?}");
    }
    only(folder.path());
    assert_eq!(file.claim().standing(), Standing::Current);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// Whatever fails, and whenever the power goes.
    #[test]
    fn what_was_appended_is_there_after_a_power_loss(
        steps in prop::collection::vec((0..8_u8, 1..20_u64), 1..16),
        outcomes in prop::collection::vec(prop::bool::weighted(0.8), 0..40),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let disk = Arc::new(Forgetful::default());
        let mut file = take_on(folder.path(), &disk);
        disk.plan(outcomes);
        let mut promised = BTreeSet::new();
        for (step, id) in steps {
            match step {
                0..=4 => {
                    if file.append(&[Record::Opened(session(id))]).is_ok() {
                        promised.insert(id);
                    }
                }
                5 => {
                    // Whatever is written of it, it need not be waited for any more.
                    promised.remove(&id);
                    let over = [Record::Over(SessionId::new(id).unwrap())];
                    if file.append(&over).is_err() {
                        file.forget(&over);
                    }
                }
                _ => drop(file.compact()),
            }
            for found in disk.survivors(folder.path()) {
                prop_assert!(found.is_superset(&promised), "{found:?} for {promised:?}");
            }
        }
    }
}

/// A host agent on that disk.
fn host_on(folder: &Path, disk: &Arc<Forgetful>, writer: Writer) -> Host {
    let listen = vec!["unix:/nowhere".parse().unwrap()];
    let mut config = Settings { listen, ..Settings::default() }.resolve().unwrap().host;
    let taken = JournalFile::take(folder, Takeover::Never, Arc::clone(disk) as Arc<dyn Medium>).unwrap();
    let terms = config.session.lease;
    let opened = Journal::begin(taken, folder, writer, config.incarnation, terms, || boot_moment(1)).unwrap();
    config.incarnation = opened.run.incarnation;
    let (restart, history) = Restart::on(opened);
    let host = Host::restarted(config, tokio::runtime::Handle::current(), restart);
    Restart::bring_back(&host, history);
    host
}

/// The host agent's answer to a device that says Hello.
async fn hello(channel: &tonic::transport::Channel, name: String) -> Say {
    let hello = v1::Hello {
        device_id: name,
        incarnation: 1,
        protocol_versions: vec![1],
        capabilities: Some(v1::Capabilities { enforces_lease: true, change_pte: true }),
        ..v1::Hello::default()
    };
    let asks = tokio_stream::iter([v1::SessionRequest { message: Some(Ask::Hello(hello)) }]);
    let asks = tokio_stream::StreamExt::chain(asks, tokio_stream::pending());
    let mut says = DeviceServiceClient::new(channel.clone()).session(asks).await.unwrap().into_inner();
    says.message().await.unwrap().unwrap().message.unwrap()
}

/// The sync goes before the Welcome: from the moment on that a device hears it, the next run knows of it.
#[tokio::test]
async fn who_was_welcomed_is_waited_for_after_a_power_loss() {
    for writer in [Writer::Caller, Writer::Thread] {
        let folder = tempfile::tempdir().unwrap();
        let disk = Arc::new(Forgetful::default());
        let host = host_on(folder.path(), &disk, writer);
        let (near, far) = tokio::io::duplex(1 << 16);
        let stop = CancellationToken::new();
        let frames = FrameStore::new(1).unwrap();
        let devices = tokio_stream::StreamExt::chain(tokio_stream::iter([Ok(far)]), tokio_stream::pending());
        let (served, until) = (host.clone(), stop.clone());
        tokio::spawn(async move { embed::serve_devices(&served, &frames, devices, until).await });
        let mut near = Some(near);
        let channel = tonic::transport::Endpoint::from_static("http://host-agent")
            .connect_with_connector(tower::service_fn(move |_| {
                let io = near.take().map(hyper_util::rt::TokioIo::new);
                async move { io.ok_or_else(|| std::io::Error::other("it is one connection")) }
            }))
            .await
            .unwrap();
        for number in 1..=4 {
            let Say::Welcome(welcome) = hello(&channel, format!("gpu{number}")).await else {
                panic!("not welcomed")
            };
            for found in disk.survivors(folder.path()) {
                assert!(found.contains(&welcome.session_id), "{writer:?}: {found:?}");
            }
        }
        // Where the disk does not say that it has it, there is no Welcome.
        disk.plan([false, false, false]);
        let Say::Error(refused) = hello(&channel, "late".to_owned()).await else { panic!("welcomed") };
        assert_eq!(refused.reason(), shootdown_proto::error::Reason::StoreFailed);
        stop.cancel();
        let journal = host.restart().journal().unwrap().clone();
        tokio::task::spawn_blocking(move || journal.close(None)).await.unwrap();
    }
}
