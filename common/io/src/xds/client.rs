//! The delta ADS client.

use super::{
    decode::{self, DecodeError, TYPES, decode_sharing},
    last_good::{self, QUESTION, Recorder, Saved},
    questions::{Question, Questions},
    response::{self, Response},
    stats::{Stats, Termination},
};
use crate::control::{Backoff, Control, ControlError};
use arc_swap::ArcSwap;
use culvert_core::{
    ids::{NetworkAddress, ServiceKey, WorkloadUid},
    snapshot::{Change, Snapshot},
};
use culvert_proto::{
    discovery::{DeltaDiscoveryRequest, Node, Resource},
    rpc, type_url,
};
use parking_lot::Mutex;
use prost::Message;
use std::{
    collections::HashMap,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, client::Grpc, service::interceptor::InterceptedService, transport::Channel};
use tonic_prost::ProstCodec;

/// How much of the mesh is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    Wildcard,
    /// What is looked up, and the node's own pods.
    OnDemand,
}

/// What the client needs to know.
#[derive(Debug, Clone)]
pub struct Settings {
    pub control: Control,
    pub node: String,
    pub mode: Mode,
    /// Folder of the last good state; none is kept without it.
    pub state: Option<PathBuf>,
}

/// How long a look-up waits for control's answer (settled D12).
const ANSWER_DEADLINE: Duration = Duration::from_secs(5);

/// How long a name waits: resolvers of applications give up after a few seconds, and what is not answered
/// here is asked of the cluster's own resolver.
const NAME_DEADLINE: Duration = Duration::from_secs(1);

/// Largest response that is read.
const MAX_RESPONSE: usize = 200 * 1024 * 1024;

/// Resources that a NACK names one by one.
const MAX_REFUSED: usize = 20;

/// Look-ups that wait to be sent.
const QUEUED_LOOKUPS: usize = 1024;

/// The mesh as it is known now. Clones share it.
#[derive(Clone)]
pub struct Discovery(Arc<Shared>);

struct Shared {
    snapshot: ArcSwap<Snapshot>,
    generation: watch::Sender<u64>,
    ready: watch::Sender<bool>,
    lookups: mpsc::Sender<Question>,
    stats: Stats,
    heard: Mutex<Heard>,
}

/// When control was last heard.
#[derive(Debug, Clone, Copy, Default)]
enum Heard {
    #[default]
    Never,
    /// Its stream is up.
    Now,
    /// So long before that moment.
    Before(Instant, Duration),
}

/// Makes a client. The second value is its task: it never ends by itself.
pub fn start(settings: Settings) -> Result<(Discovery, impl Future<Output = ()> + Send), ControlError> {
    let channel = settings.control.channel()?;
    let credentials = settings.control.credentials();
    let (lookups, wanted) = mpsc::channel(QUEUED_LOOKUPS);
    let shared = Arc::new(Shared {
        snapshot: ArcSwap::default(),
        generation: watch::Sender::new(0),
        ready: watch::Sender::new(false),
        lookups,
        stats: Stats::default(),
        heard: Mutex::default(),
    });
    let service =
        Grpc::new(InterceptedService::new(channel, credentials)).max_decoding_message_size(MAX_RESPONSE);
    let mut client = Client {
        settings,
        shared: shared.clone(),
        snapshot: Snapshot::default(),
        types: TYPES.map(|url| (url, TypeState::default())).into(),
        shared_names: decode::Shared::default(),
        questions: Questions::default(),
        source: None,
        recorder: None,
    };
    let folder = client.settings.state.clone();
    if let Some(saved) = folder
        .as_deref()
        .and_then(|folder| last_good::load(folder, SystemTime::now()))
    {
        client.restore(saved);
    }
    let recorder = Recorder::default();
    client.recorder = folder.is_some().then(|| recorder.clone());
    let listed = shared.ready.subscribe();
    let heard = Discovery(shared.clone());
    let record = async move {
        if let Some(folder) = folder {
            let age = || heard.config_age().unwrap_or_default();
            recorder.keep(folder, listed, age).await;
        }
    };
    let talk = async move {
        let mut wanted = wanted;
        let mut backoff = Backoff::default();
        loop {
            let started = Instant::now();
            let (how, ended) = client.stream(service.clone(), &mut wanted).await;
            client.shared.stats.went_down(how);
            client.lost();
            if started.elapsed() > Duration::from_secs(1) {
                backoff.reset();
            }
            let pause = backoff.pause();
            tracing::warn!(reason = %ended, retry_in = ?pause, "stream to control ended; serving what is known");
            tokio::time::sleep(pause).await;
        }
    };
    let task = async move {
        tokio::join!(talk, record);
    };
    Ok((Discovery(shared), task))
}

impl Discovery {
    /// A discovery that has what is put into it: for tests and for state read from disk.
    pub fn fixed(snapshot: Snapshot) -> Self {
        let (lookups, _) = mpsc::channel(1);
        Self(Arc::new(Shared {
            generation: watch::Sender::new(snapshot.generation),
            snapshot: ArcSwap::new(Arc::new(snapshot)),
            ready: watch::Sender::new(true),
            lookups,
            stats: Stats::default(),
            heard: Mutex::default(),
        }))
    }

    /// What the stream to control has carried.
    pub fn stats(&self) -> &Stats {
        &self.0.stats
    }

    /// The latest snapshot. Load it once for a decision and decide on that one view.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.0.snapshot.load_full()
    }

    /// Tells when a newer snapshot is there.
    pub fn generations(&self) -> watch::Receiver<u64> {
        self.0.generation.subscribe()
    }

    /// Returns once every type has been listed.
    pub async fn ready(&self) {
        // The sender lives as long as `self`.
        let _ = self.0.ready.subscribe().wait_for(|ready| *ready).await;
    }

    pub fn is_ready(&self) -> bool {
        *self.0.ready.borrow()
    }

    /// How long ago control was last heard: nothing while its stream is up, none if it never was.
    pub fn config_age(&self) -> Option<Duration> {
        match *self.0.heard.lock() {
            Heard::Never => None,
            Heard::Now => Some(Duration::ZERO),
            Heard::Before(since, age) => Some(since.elapsed() + age),
        }
    }

    /// Waits until control has answered for `address`, at most 5 s. Returns at once when it has.
    /// Cancel safe; the question stays asked.
    pub async fn resolve(&self, address: &NetworkAddress) {
        self.ask(Question::Address(address.clone()), ANSWER_DEADLINE)
            .await;
    }

    /// Waits until control has answered for a service, at most 1 s; otherwise as `resolve`.
    pub async fn resolve_service(&self, key: &ServiceKey) {
        self.ask(Question::Service(key.clone()), NAME_DEADLINE).await;
    }

    async fn ask(&self, question: Question, patience: Duration) {
        if question.is_answered(&self.0.snapshot.load()) {
            return;
        }
        let mut generations = self.0.generation.subscribe();
        let answer = async {
            if self.0.lookups.send(question.clone()).await.is_err() {
                return;
            }
            while !question.is_answered(&self.0.snapshot.load()) {
                if generations.changed().await.is_err() {
                    return;
                }
            }
        };
        let _ = Box::pin(tokio::time::timeout(patience, answer)).await;
    }
}

/// What one type's resources are, as control has named them.
#[derive(Default)]
struct TypeState {
    listed: bool,
    held: HashMap<Arc<str>, Held>,
}

struct Held {
    version: Box<str>,
    names: Named,
}

/// What a resource's name stands for, so that its removal can be carried out.
#[derive(Clone)]
enum Named {
    Workload(WorkloadUid),
    Service(ServiceKey),
    Policy(culvert_core::ids::PolicyKey),
    OutboundPolicy(culvert_core::ids::PolicyKey),
    Config,
}

impl Named {
    /// A resource has the name of what it is: under another it would take that one's place.
    fn check(&self, name: &str) -> Result<(), DecodeError> {
        let own = match self {
            Self::Workload(uid) => uid.to_string(),
            Self::Service(key) => key.to_string(),
            Self::Policy(key) | Self::OutboundPolicy(key) => key.to_string(),
            Self::Config => return Ok(()),
        };
        if name.eq_ignore_ascii_case(&own) {
            Ok(())
        } else {
            Err(DecodeError::Name(own))
        }
    }
}

struct Client {
    settings: Settings,
    shared: Arc<Shared>,
    snapshot: Snapshot,
    types: HashMap<&'static str, TypeState>,
    shared_names: decode::Shared,
    questions: Questions,
    /// Control's uid and the highest version it has served.
    source: Option<(String, u64)>,
    recorder: Option<Recorder>,
}

type Service = Grpc<InterceptedService<Channel, crate::control::Credentials>>;

impl Client {
    /// Takes up where an earlier process has left off.
    fn restore(&mut self, saved: Saved) {
        let mut changes = vec![];
        for record in saved.records {
            let Some(any) = &record.resource else { continue };
            if any.type_url == QUESTION {
                let Some((question, unknown)) = Question::restore(&record.name, &any.value) else {
                    continue;
                };
                self.questions.ask(&question, &self.snapshot);
                changes.extend(unknown.then(|| question.unknown()));
            } else if let Some(url) = TYPES.into_iter().find(|url| *url == any.type_url) {
                match self.read(url, record) {
                    Ok(change) => changes.push(change),
                    Err(error) => tracing::warn!(%error, "a resource of the last good state is not used"),
                }
            }
        }
        self.types.values_mut().for_each(|state| state.listed = true);
        self.version_went_back(&saved.source);
        self.publish(changes);
        *self.shared.heard.lock() = Heard::Before(Instant::now(), saved.age);
        self.shared.ready.send_replace(true);
        tracing::info!(age = ?saved.age, workloads = self.snapshot.workload_count(), "the last good state is served until control answers");
    }

    fn lost(&self) {
        let mut heard = self.shared.heard.lock();
        if let Heard::Now = *heard {
            *heard = Heard::Before(Instant::now(), Duration::ZERO);
        }
    }

    /// Notes what has become of a question that control was asked.
    fn record(&self, question: &Question) {
        if let Some(recorder) = &self.recorder {
            let (name, value) = (question.resource_name(), question.save(&self.snapshot));
            recorder.put(QUESTION, name, String::new(), value);
        }
    }

    /// Runs one stream to its end and says how and why it ended.
    async fn stream(
        &mut self,
        mut service: Service,
        wanted: &mut mpsc::Receiver<Question>,
    ) -> (Termination, String) {
        let closed = || (Termination::Complete, "control has closed the stream".to_owned());
        let (requests, outgoing) = mpsc::channel(64);
        for url in TYPES {
            let first = self.first_request(url);
            if requests.try_send(first).is_err() {
                return (Termination::Error, "request queue is full".to_owned());
            }
        }
        if let Err(error) = service.ready().await {
            return (Termination::ConnectionError, error.to_string());
        }
        let codec = ProstCodec::<DeltaDiscoveryRequest, Response>::default();
        let outgoing = Request::new(ReceiverStream::new(outgoing));
        let mut responses = match service.streaming(outgoing, response::method(), codec).await {
            Ok(response) => response.into_inner(),
            Err(status) => return (Termination::ConnectionError, status.message().to_owned()),
        };
        self.shared.stats.came_up();
        loop {
            tokio::select! {
                response = responses.message() => match response {
                    Ok(Some(response)) => {
                        let answer = self.take(response);
                        if requests.send(answer).await.is_err() {
                            return closed();
                        }
                    }
                    Ok(None) => return closed(),
                    Err(status) => return (Termination::Error, status.message().to_owned()),
                },
                Some(question) = wanted.recv() => {
                    if let Some(request) = self.ask(question)
                        && requests.send(request).await.is_err()
                    {
                        return closed();
                    }
                }
            }
        }
    }

    fn first_request(&self, url: &'static str) -> DeltaDiscoveryRequest {
        let state = &self.types[url];
        let mut request = DeltaDiscoveryRequest {
            node: Some(Node {
                id: format!("ztunnel~{}", self.settings.node),
                cluster: String::new(),
                metadata: None,
                build_version: env!("CARGO_PKG_VERSION").to_owned(),
            }),
            type_url: url.to_owned(),
            initial_resource_versions: state
                .held
                .iter()
                .map(|(name, held)| (name.to_string(), held.version.to_string()))
                .collect(),
            ..DeltaDiscoveryRequest::default()
        };
        if url == type_url::ADDRESS && self.settings.mode == Mode::OnDemand {
            request.resource_names_subscribe = std::iter::once("*".to_owned())
                .chain(self.questions.names().map(str::to_owned))
                .collect();
            request.resource_names_unsubscribe = vec!["*".to_owned()];
        }
        request
    }

    /// What to send so that a question is answered, if anything.
    fn ask(&mut self, question: Question) -> Option<DeltaDiscoveryRequest> {
        if question.is_answered(&self.snapshot) {
            return None;
        }
        match self.settings.mode {
            // Everything has been listed: what is not there is not known.
            Mode::Wildcard => {
                if self.types[type_url::ADDRESS].listed {
                    let asked = self.questions.ask(&question, &self.snapshot);
                    let forgotten = asked.and_then(|asked| asked.forgotten);
                    self.publish(
                        forgotten
                            .map(|old| old.forget())
                            .into_iter()
                            .chain([question.unknown()]),
                    );
                }
                None
            }
            Mode::OnDemand => {
                let asked = self.questions.ask(&question, &self.snapshot)?;
                self.record(&question);
                if let (Some(recorder), Some(old)) = (&self.recorder, &asked.forgotten) {
                    recorder.remove(QUESTION, &old.resource_name());
                }
                let unsubscribe = asked.forgotten.iter().map(Question::resource_name).collect();
                self.publish(asked.forgotten.map(|old| old.forget()));
                Some(DeltaDiscoveryRequest {
                    type_url: type_url::ADDRESS.to_owned(),
                    resource_names_subscribe: vec![question.resource_name()],
                    resource_names_unsubscribe: unsubscribe,
                    ..DeltaDiscoveryRequest::default()
                })
            }
        }
    }

    /// Applies one response as one change and says ACK or NACK.
    fn take(&mut self, response: impl Into<Response>) -> DeltaDiscoveryRequest {
        let response = response.into();
        let mut refused = vec![];
        let stats = &self.shared.stats;
        let bytes: usize = response.resources.iter().map(bytes::Bytes::len).sum();
        stats.arrived(&response.type_url, bytes as u64);
        if let Some(published) = response.published() {
            stats.pushed(published);
        }
        let known = TYPES.into_iter().find(|url| *url == response.type_url);
        match (known, self.version_went_back(&response.system_version_info)) {
            (None, _) => refused.push(format!("type {} was not asked for", response.type_url)),
            (_, Some(why)) => refused.push(why),
            (Some(url), None) => {
                *self.shared.heard.lock() = Heard::Now;
                if let Some(recorder) = &self.recorder {
                    recorder.source(&response.system_version_info);
                }
                // Nobody sees the snapshot before all of the response is in it.
                let (mut changed, mut more) = (false, 0usize);
                for resource in response.resources {
                    let resource = match Resource::decode(resource) {
                        Ok(resource) => resource,
                        Err(error) => {
                            refused.push(format!("a resource: {error}"));
                            continue;
                        }
                    };
                    let name = resource.name.clone();
                    match self.read(url, resource) {
                        Ok(change) => {
                            self.snapshot.apply(change);
                            changed = true;
                        }
                        Err(why) if refused.len() < MAX_REFUSED => refused.push(format!("{name}: {why}")),
                        Err(_) => more += 1,
                    }
                }
                if more > 0 {
                    refused.push(format!("and {more} more"));
                }
                let mut removed = vec![];
                for name in &response.removed_resources {
                    self.remove(url, name, &mut removed);
                }
                self.types.entry(url).or_default().listed = true;
                changed |= self.apply(removed);
                if changed {
                    self.show();
                }
                for name in &response.removed_resources {
                    if let Some(question) = self.questions.named(name) {
                        self.record(question);
                    }
                }
                if self.types.values().all(|state| state.listed) {
                    self.shared
                        .ready
                        .send_if_modified(|ready| !std::mem::replace(ready, true));
                }
            }
        }
        if !refused.is_empty() {
            self.shared.stats.refused(&response.type_url);
            tracing::warn!(type_url = %response.type_url, refused = ?refused, "resources refused");
        }
        DeltaDiscoveryRequest {
            type_url: response.type_url,
            response_nonce: response.nonce,
            error_detail: (!refused.is_empty()).then(|| rpc::Status {
                code: 3, // INVALID_ARGUMENT
                message: refused.join("; "),
                details: vec![],
            }),
            ..DeltaDiscoveryRequest::default()
        }
    }

    /// `uid/n`: a lower n of the same source is an older view, which never replaces a newer one
    /// (settled D18).
    fn version_went_back(&mut self, version: &str) -> Option<String> {
        let (uid, number) = version.rsplit_once('/')?;
        let number: u64 = number.parse().ok()?;
        match &mut self.source {
            Some((source, highest)) if source == uid => {
                if number < *highest {
                    return Some(format!("version {version} is older than {highest}"));
                }
                *highest = number;
            }
            source => *source = Some((uid.to_owned(), number)),
        }
        None
    }

    fn read(&mut self, url: &'static str, resource: Resource) -> Result<Change, DecodeError> {
        let bytes = resource.resource.map(|any| any.value).unwrap_or_default();
        let change = decode_sharing(url, &bytes, &mut self.shared_names)?;
        let names = match &change {
            Change::Workload(workload) => Named::Workload(workload.uid.clone()),
            Change::Service(service) => Named::Service(service.key.clone()),
            Change::Policy(policy) => Named::Policy(policy.key.clone()),
            Change::OutboundPolicy(policy) => Named::OutboundPolicy(policy.key.clone()),
            _ => Named::Config,
        };
        names.check(&resource.name)?;
        if let Some(recorder) = &self.recorder {
            recorder.put(url, resource.name.clone(), resource.version.clone(), bytes);
        }
        let name = match &names {
            // Control names a workload by its uid, which is kept once.
            Named::Workload(uid) if uid.as_str() == resource.name => uid.clone().into(),
            _ => Arc::from(resource.name),
        };
        let version = resource.version.into();
        let state = self.types.entry(url).or_default();
        state.held.insert(name, Held { version, names });
        Ok(change)
    }

    fn remove(&mut self, url: &'static str, name: &str, changes: &mut Vec<Change>) {
        if let Some(recorder) = &self.recorder {
            recorder.remove(url, name);
        }
        let held = self.types.entry(url).or_default().held.remove(name);
        changes.extend(held.and_then(|held| match held.names {
            Named::Workload(uid) => Some(Change::RemoveWorkload(uid)),
            Named::Service(key) => Some(Change::RemoveService(key)),
            Named::Policy(key) => Some(Change::RemovePolicy(key)),
            Named::OutboundPolicy(key) => Some(Change::RemoveOutboundPolicy(key)),
            Named::Config => None,
        }));
        if url == type_url::ADDRESS {
            // What was asked for by this name is answered: nothing has it.
            changes.extend(self.questions.named(name).map(Question::unknown));
        }
    }

    fn publish(&mut self, changes: impl IntoIterator<Item = Change>) {
        if self.apply(changes) {
            self.show();
        }
    }

    /// Carries changes out, which nobody sees yet; whether there were any.
    fn apply(&mut self, changes: impl IntoIterator<Item = Change>) -> bool {
        let mut changed = false;
        for change in changes {
            self.snapshot.apply(change);
            changed = true;
        }
        changed
    }

    /// Publishes the snapshot as it is now.
    fn show(&mut self) {
        self.snapshot.generation += 1;
        self.shared.snapshot.store(Arc::new(self.snapshot.clone()));
        self.shared.generation.send_replace(self.snapshot.generation);
    }
}

#[cfg(test)]
mod tests;
